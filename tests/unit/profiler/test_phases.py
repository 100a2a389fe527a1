"""What follows the ladder: the baseline, random arrivals, what a late load does, extensions, and the account of it all."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tightship.api.units import parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.curve import Curve, Point
from tightship.profiler import arrivals, points
from tightship.profiler.__main__ import kept
from tightship.profiler.budget import Budget
from tightship.profiler.engine import EngineSettings
from tightship.profiler.errors import EngineError, LengthsError
from tightship.profiler.histogram import Histogram
from tightship.profiler.job import make_job, read_lengths
from tightship.profiler.lengths import Length, Lengths, Prompts
from tightship.profiler.packing import prepare
from tightship.profiler.report import Report
from tightship.profiler.session import Session
from tightship.profiler.sharing import CoreSharing
from unit.profiler.fakes import (
    FakeDevice,
    FakeEngine,
    FakeLauncher,
    FakeModel,
    MemorySink,
    VirtualClock,
    in_virtual_time,
    make_profile,
)
from unit.profiler.test_profile import Run, batches, point, usual

QUICK = FakeModel(host=0.0052, per_request=0.00009, start_seconds=45)
"""About OPT-1.3B on an H100."""
FLAT = FakeModel(host=0.001, per_request=0.0005)
"""A ladder that ends at 64."""


def message(status: api.BatchProfileStatus) -> str:
    assert status.outcome is not None
    return status.outcome.message or ""


def stages(run: Run) -> list[tuple[str, int | None]]:
    """The stages in order, each once, with their batch."""
    seen = [(one["progress"]["stage"], one["progress"].get("batch")) for one in run.sink.written]
    return list(dict.fromkeys(seen))


# --- the account ---


def test_a_sweep_costs_a_fiftieth_of_an_engine_restarted_for_every_batch() -> None:
    status = Run(QUICK, budget="20m", itl="14ms", device=FakeDevice(memory=64 << 30)).go()
    assert status.cost is not None
    assert batches(status) == [1, 2, 4, 8, 16, 32, 64, 96, 104, 112, 128, 256]
    assert float(status.cost.sweep) <= 5040 / 50
    assert float(status.cost.starts) == pytest.approx(90, abs=0.1)
    # All device time is accounted for: what counts for the budget, and the first start, which doesn't.
    total = sum(float(part) for part in status.cost.to_dict().values())
    assert total == pytest.approx(float(status.gpu_seconds or 0) + 45, abs=1)


@pytest.mark.parametrize("budget", ["45s", "60s", "75s"])
def test_a_short_budget_still_gives_a_curve_a_replicas_memory_and_time_for_a_trial(budget: str) -> None:
    run = Run(replace(QUICK, start_seconds=1.5), budget=budget, itl="14ms")
    status = run.go()
    assert len(status.points) >= 5
    assert status.memory is not None
    assert status.confirmation is not None
    left = parse_duration(budget) - float(status.gpu_seconds or 0)
    assert left >= 2 * 1.5 + 8


def test_cost_and_time_go_on_from_attempt_to_attempt() -> None:
    first = usual().status
    assert first.cost is not None
    points = [one.to_dict() for one in first.points if one.batch < 512]
    second = Run(status={"points": points, "cost": first.cost.to_dict(), "gpuSeconds": "100"}).go()
    assert second.cost is not None
    assert float(second.cost.starts) == 2 * float(first.cost.starts)
    assert float(first.cost.sweep) < float(second.cost.sweep) < 2 * float(first.cost.sweep)
    assert float(second.gpu_seconds or 0) > 100


def test_an_attempt_that_finds_all_done_starts_no_engine() -> None:
    done = usual().status.to_dict()
    del done["outcome"]
    run = Run(status=done)
    status = run.go()
    assert run.launcher.launched == []
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    for part in ("points", "baseline", "memory", "confirmation", "load", "cost"):
        assert status.to_dict()[part] == done[part], part


# --- the baseline ---


def test_a_ladder_that_reaches_the_engines_own_batch_has_the_baseline_in_it() -> None:
    run = usual()
    status = run.status
    assert status.baseline == point(status, 1024)
    assert "Baseline" not in dict(stages(run))
    assert status.cost is not None
    assert float(status.cost.baseline) == 0


def test_a_ladder_that_ends_early_is_followed_by_the_engines_own_batch() -> None:
    run = Run(FLAT, itl=None)
    status = run.go()
    assert batches(status)[-1] == 64
    baseline = status.baseline
    assert baseline is not None
    assert baseline.batch == 1024
    assert float(baseline.total_tokens_per_second or 0) == pytest.approx(1024 / 0.513 * (1 + 111 / 292), rel=0.03)
    assert [stage for stage, _ in stages(run)].index("Baseline") < [stage for stage, _ in stages(run)].index(
        "Confirming"
    )
    assert status.cost is not None
    assert float(status.cost.baseline) > 0
    # Nor is it measured again by the next attempt.
    again = Run(FLAT, itl=None, status={"points": [], "baseline": baseline.to_dict()})
    assert again.go().baseline == baseline
    assert "Baseline" not in dict(stages(again))


def test_a_baseline_that_preempts_is_what_it_is() -> None:
    baseline = Run(FakeModel(kv_tokens=20_000), itl=None).go().baseline
    assert baseline is not None
    assert (baseline.preemptions or 0) > 3
    assert float(baseline.running_mean or 0) < 100


def test_an_engine_that_dies_at_its_own_batch_costs_only_the_baseline() -> None:
    run = Run(FakeModel(host=0.001, per_request=0.0005, dies_above=100), FLAT, itl=None)
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert status.baseline is None
    assert "no baseline: the engine died: ValueError: the last words" in message(status)
    assert status.memory is not None


# --- a load that can't be driven ---


def test_a_level_that_the_load_cannot_drive_has_no_point_and_ends_the_ladder() -> None:
    # A client that takes 0.6 ms a token is busy for 63 % of a step from batch 64 on.
    run = Run(FakeModel(client_seconds=0.0006), itl=None)
    status = run.go()
    last = batches(status)[-1]
    assert last < 128
    assert f"the load could not drive batch {2 * last}, which has no point: its event loop ran" in message(status)
    assert f"the load could not drive batch {4 * last}, nor the one before it" in message(status)
    measuring = [
        one["batch"] for one in run.said if one["message"].startswith("measuring batch") and one["stage"] == "Sweeping"
    ]
    assert len(measuring) == len(set(measuring))
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert status.memory is not None

    # Once the machine is idle, going on measures the rest, and nothing twice.
    assert status.outcome.unfinished == ["Sweep"]
    assert "not finished, because the load ran late or the engine failed: Sweep; once" in message(status)
    assert (
        "a new text in profiling.extend, or `tightship profile --resume`, makes up for it and keeps the rest"
        in message(status)
    )
    again = Run(status={**run.sink.written[-1], "outcome": None}, itl=None).go()
    assert [one for one in again.points if one.batch <= last] == status.points
    assert batches(again)[-1] == 1024
    assert again.outcome is not None
    assert again.outcome.unfinished == []


def test_a_confirmation_that_the_load_cannot_drive_is_made_up_for_later() -> None:
    run = Run(FakeModel(), FakeModel(client_seconds=0.0006))
    status = run.go()
    assert status.confirmation is None
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.unfinished) == ("Completed", ["Confirmation"])
    assert "confirmation run: the load could not drive batch 96" in message(status)
    assert "late or the engine failed: Confirmation; once the cause is gone" in message(status)

    again = Run(status={**run.sink.written[-1], "outcome": None}).go()
    assert again.points == status.points
    assert again.confirmation is not None
    assert again.confirmation.arrivals is not None
    assert again.outcome is not None
    assert again.outcome.unfinished == []


EXTENSION = {"request": "more", "budget": "10m"}


def test_an_extension_makes_up_for_what_was_left_unfinished() -> None:
    run = Run(FakeModel(), FakeModel(client_seconds=0.0006))
    status = run.go()
    again = Run(status=run.sink.written[-1], extend=EXTENSION).go()
    assert again.points == status.points
    assert again.confirmation is not None
    assert again.outcome is not None
    assert (again.outcome.state, again.outcome.extend, again.outcome.unfinished) == ("Completed", "more", [])

    failed = Run(FakeModel(fails_to_start="ValueError: no"), status=run.sink.written[-1], extend=EXTENSION).go()
    assert failed.points == status.points
    assert failed.outcome is not None
    assert (failed.outcome.state, failed.outcome.extend) == ("Completed", "more")
    assert failed.outcome.unfinished == ["Confirmation"]
    assert "ValueError: no" in message(failed)


def test_a_baseline_that_the_load_cannot_drive_is_none() -> None:
    status = Run(FakeModel(client_seconds=0.0006), args=["--max-num-batched-tokens=64"], itl=None).go()
    assert batches(status)[-1] == 32
    assert status.baseline is None
    assert "no baseline: the load could not drive batch 64" in message(status)


def test_a_load_that_can_drive_nothing_is_a_failure_that_says_so() -> None:
    status = Run(FakeModel(client_seconds=0.1)).go()
    assert status.outcome is not None
    assert status.outcome.state == "Failed"
    assert "could not drive batch 1" in message(status)
    assert status.points == []


def test_a_machine_that_is_busy_at_first_costs_no_point() -> None:
    run = Run(FakeModel(client_seconds=0.02, client_calm_after=40.0), itl=None)
    status = run.go()
    assert batches(status)[:4] == [1, 2, 4, 8]
    assert "could not drive" not in message(status)
    said = [one["message"] for one in run.said]
    tries = [each.removeprefix("measuring ") for each in said if each.startswith("measuring batch")]
    assert tries.count("batch 1") == 2, tries


# --- random arrivals ---


def test_random_arrivals_follow_the_confirmation() -> None:
    confirmation = usual().status.confirmation
    assert confirmation is not None
    found = confirmation.arrivals
    assert found is not None
    # 96 requests at once take 29.2 ms a token and 292 tokens each: 11.26 requests/s, of which 80 % are offered.
    assert float(found.offered_requests_per_second) == pytest.approx(0.8 * 96 / 0.0292 / 292, rel=0.03)
    assert found.sustained is True
    assert confirmation.sustainable_requests_per_second == found.offered_requests_per_second
    assert found.requests == pytest.approx(9.0 * parse_duration(found.window or "0"), rel=0.2)
    assert 25 <= parse_duration(found.window or "0") <= 26
    assert found.inter_token_latency is not None
    # Fewer run than 96, so tokens come faster.
    assert 0.010 < parse_duration(found.inter_token_latency.mean or "0") < 0.0292
    assert found.time_to_first_token is not None
    assert float(found.running_mean or 0) < 96
    assert confirmation.message is None


def test_an_engine_that_does_worse_than_the_sweep_promised_is_said() -> None:
    # The replica slows down after 15 s: the closed loop has seen it quick, the arrivals find it slow.
    status = Run(FakeModel(), FakeModel(slows_after=15.0)).go()
    confirmation = status.confirmation
    assert confirmation is not None
    assert confirmation.agrees is True
    assert confirmation.arrivals is not None
    assert confirmation.arrivals.sustained is False
    assert confirmation.sustainable_requests_per_second == confirmation.arrivals.requests_per_second
    assert "the queue grew" in (confirmation.message or "")
    assert "mean InterTokenLatency is" in (confirmation.message or "")
    assert "the queue grew" in message(status)


def test_an_engine_that_dies_under_random_arrivals_costs_the_arrivals_only() -> None:
    run = Run(FakeModel(), FakeModel(dies_after=15.0))
    status = run.go()
    assert len(run.launcher.launched) == 3
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert status.memory is not None
    assert status.confirmation is not None
    assert status.confirmation.agrees is True
    assert status.confirmation.arrivals is None
    assert "no random arrivals: " in message(status)
    assert "the last words" in message(status)


def test_arrivals_that_find_no_time_are_left_out_and_said() -> None:
    status = Run(replace(QUICK, start_seconds=1.5), budget="45s").go()
    assert status.confirmation is not None
    assert status.confirmation.arrivals is None
    assert "arrivals at random were left out" in message(status)
    assert status.outcome is not None
    assert status.outcome.state == "BudgetExceeded"


def test_arrivals_that_find_no_time_in_a_later_attempt_either_are_said_again() -> None:
    done = usual().status.to_dict()
    del done["outcome"], done["confirmation"]["arrivals"]
    run = Run(status=done | {"gpuSeconds": "599"})
    status = run.go()
    assert run.launcher.launched == []
    assert status.outcome is not None
    assert status.outcome.state == "BudgetExceeded"
    assert "arrivals at random were left out" in message(status)


def test_the_first_engine_of_an_attempt_has_all_the_time_it_takes_for_a_confirmation_too() -> None:
    done = usual().status.to_dict()
    del done["outcome"], done["confirmation"]["arrivals"]
    run = Run(FakeModel(start_seconds=1200), status=done | {"gpuSeconds": "530"})
    status = run.go()
    assert len(run.launcher.launched) == 1
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert status.confirmation is not None
    assert status.confirmation.arrivals is not None
    assert 530 < float(status.gpu_seconds or 0) <= 600
    assert run.seconds > 1200


def test_an_attempt_that_finds_the_comparison_done_goes_on_with_the_arrivals() -> None:
    done = usual().status.to_dict()
    del done["outcome"], done["confirmation"]["arrivals"]
    run = Run(status=done)
    status = run.go()
    assert len(run.launcher.launched) == 1
    assert run.launcher.launched[0].max_num_seqs == 96
    assert status.confirmation is not None
    assert status.confirmation.arrivals is not None
    assert status.memory is not None
    assert status.memory.to_dict() == done["memory"]
    assert status.confirmation.throughput_ratio == done["confirmation"]["throughputRatio"]


SHORT = Lengths.constant(20, 100)


def offer(model: FakeModel, plan: arrivals.Plan, batch: int = 8, lengths: Lengths = SHORT) -> api.Arrivals:
    """Random arrivals on a fake engine."""

    async def story() -> api.Arrivals:
        clock = VirtualClock()
        engine = FakeEngine(model, EngineSettings(model="m", max_num_seqs=batch), FakeDevice())
        load = arrivals.OpenLoop(engine.channel(), lengths, Prompts(1000, 1), clock, seed=1)
        try:
            found, _ = await arrivals.offer(engine, load, clock, plan)
        finally:
            await load.close()
            await engine.stop()
        return found

    return in_virtual_time(story)


@pytest.mark.parametrize(
    ("share", "sustained"),
    [(0.3, True), (0.8, True), (1.5, False), (3.0, False)],
)
def test_a_queue_that_grows_is_no_sustained_rate(share: float, sustained: bool) -> None:
    capacity = 8 / 0.0116 / 100
    found = offer(FakeModel(), arrivals.Plan(rate=share * capacity, in_flight=round(8 * min(1, share)), seconds=30))
    assert found.sustained is sustained
    rate = float(arrivals.sustainable(found) or 0)
    assert rate == pytest.approx(min(share, 1) * capacity, rel=0.1)


@pytest.mark.parametrize(
    ("host", "seconds", "sustained"),
    [
        # A request lives 40 s with the 20 ms a token that the closed loop saw.
        (0.020, 30, None),
        (0.040, 30, None),
        (0.020, 300, True),
        (0.040, 300, False),
    ],
)
def test_long_lives_need_a_long_window_to_show_whether_a_rate_is_sustained(
    host: float, seconds: float, sustained: bool | None
) -> None:
    rate = 0.8 * 64 / (0.020 * 2000)
    model = FakeModel(host=host, per_request=0.0)
    plan = arrivals.Plan(rate=rate, in_flight=51, seconds=seconds)
    found = offer(model, plan, batch=64, lengths=Lengths.constant(500, 2000))
    assert found.sustained is sustained
    if host == 0.040 and seconds == 30:
        assert float(found.waiting_mean or 0) < 2, "the queue alone shows nothing"
    if sustained is None:
        assert arrivals.sustainable(found) is None


def test_arrivals_that_can_not_tell_are_said_and_give_no_rate() -> None:
    status = Run(
        FakeModel(host=0.05, per_request=0.0),
        itl=None,
        args=["--max-num-batched-tokens=64"],
        workload={"inputTokens": 100, "outputTokens": 1000},
    ).go()
    confirmation = status.confirmation
    assert confirmation is not None
    assert confirmation.arrivals is not None
    assert confirmation.arrivals.sustained is None
    assert confirmation.sustainable_requests_per_second is None
    assert "requests/s are sustained is not known: in 25" in (confirmation.message or "")


def test_arrivals_on_an_engine_that_refuses_or_hangs_are_an_engines_failure() -> None:
    with pytest.raises(EngineError, match="20 requests failed in a row, the last because the engine answered 500"):
        offer(FakeModel(refuses_after=3), arrivals.Plan(rate=5, in_flight=4, seconds=60))
    for seconds in (600, 30):  # the second window is shorter than what it takes to know
        with pytest.raises(EngineError, match="no token has come for"):
            offer(FakeModel(hangs_after=3), arrivals.Plan(rate=5, in_flight=4, seconds=seconds))


@pytest.mark.parametrize(
    ("batch", "share", "expected"),
    [(8, 1.0, 8), (8, 0.8, 6), (4, 0.5, 2), (1, 0.8, 1), (6, 0.8, 5)],
)
def test_arrivals_begin_with_as_many_requests_as_their_rate_keeps_busy(batch: int, share: float, expected: int) -> None:
    curve = Curve([Point(1, 10.0), Point(2, 20.0), Point(4, 40.0), Point(8, 60.0)])
    assert arrivals.busy(curve, batch, share) == expected


# --- lengths ---


def lengths_profile(text: str) -> api.BatchProfile:
    return make_profile(workload={"lengthsDigest": hashlib.sha256(text.encode()).hexdigest()})


def no_tokenizer() -> Any:
    raise AssertionError("numbers need no tokenizer")


def test_lengths_come_from_the_file_that_the_key_is_of(tmp_path: Path) -> None:
    text = "10,20\n30,40\n"
    file = tmp_path / "lengths"
    file.write_text(text)
    lengths = read_lengths(lengths_profile(text), {"TIGHTSHIP_LENGTHS_FILE": str(file)}, no_tokenizer)
    assert [(one.input, one.output) for one in lengths.pairs] == [(10, 20), (30, 40)]
    assert lengths.basis == "Lengths"


@pytest.mark.parametrize(
    ("key", "content", "words"),
    [
        ("10,20\n", "10,21\n", hashlib.sha256(b"10,21\n").hexdigest()),
        ("10,20\n", "10,21\n", hashlib.sha256(b"10,20\n").hexdigest()),
        ("10,20\n", "10,21\n", "the ConfigMap was changed after the profile was created"),
        ("10,20\n", None, "can't be read"),
        ("ten,twenty\n10;x\n", "ten,twenty\n10;x\n", "can't be used"),
    ],
    ids=["found", "expected", "advice", "no file", "no lengths"],
)
def test_lengths_that_are_not_the_keys_are_refused(tmp_path: Path, key: str, content: str | None, words: str) -> None:
    file = tmp_path / "lengths"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LengthsError) as refused:
        read_lengths(lengths_profile(key), {"TIGHTSHIP_LENGTHS_FILE": str(file)}, no_tokenizer)
    assert words in str(refused.value)


def test_a_profile_of_lengths_needs_their_file() -> None:
    with pytest.raises(LengthsError, match="TIGHTSHIP_LENGTHS_FILE"):
        read_lengths(lengths_profile("1,2"), {}, no_tokenizer)


def test_known_lengths_make_the_memory_ledger_measured_and_too_long_ones_are_left_out(tmp_path: Path) -> None:
    text = "100,200\n100,400\n2000,2000\n"
    (tmp_path / "lengths").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    status = Run(
        workload={"lengthsDigest": digest},
        environ={"TIGHTSHIP_LENGTHS_FILE": str(tmp_path / "lengths"), "TIGHTSHIP_SEED": "7"},
    ).go()
    assert status.memory is not None
    assert status.memory.basis == "Measured"
    # Length-biased: (200 (100 + 100) + 400 (100 + 200)) / 600, and half a block
    assert float(status.memory.context_mean or 0) == pytest.approx(160_000 / 600 + 8, rel=0.001)
    assert status.load is not None
    assert (status.load.basis, status.load.requests, status.load.seed) == ("Lengths", 2, 7)
    assert (float(status.load.input_tokens or 0), float(status.load.output_tokens or 0)) == (100, 300)
    assert "1 of 3 requests are longer than max_model_len 2048" in message(status)


def test_trials_are_told_of_the_lengths_that_are_put_on_their_engines() -> None:
    status = usual().status.model_copy(update={"trials": []})

    async def story() -> tuple[Lengths, Lengths]:
        subject, device, clock = make_profile(), FakeDevice(), VirtualClock()
        job = replace(
            make_job(subject, "m", device, {}), lengths=Lengths([Length(100, 200), Length(2000, 2000)]), max_replicas=4
        )
        report = Report(MemorySink(subject), status)
        session = Session(
            job,
            launcher=FakeLauncher(device),
            device=device,
            report=report,
            clock=clock,
            environ={},
            budget=Budget(600.0, 0.0, clock),
        )
        prepared = prepare(session, CoreSharing({0, 1}, 1), asked_only=False)
        await report.close()
        assert not isinstance(prepared, str)
        return prepared[0].lengths, session.lengths

    told, loaded = in_virtual_time(story)
    assert told is loaded
    assert (told.mean_input, told.mean_output) == (100, 200)


# --- what must be said ---


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--speculative-config={}"], "speculative decoding was measured on random tokens"),
        (["--speculative_config", "{}"], "speculative decoding"),
        (["--enable-lora"], "measured on the base model"),
        (["--lora-modules", "a=b"], "measured on the base model"),
    ],
)
def test_what_arguments_mean_for_the_figures_is_said(args: list[str], words: str) -> None:
    assert message(Run(args=args).go()).count(words) == 1
    assert words not in message(usual().status)


def test_a_percentile_that_could_not_be_resolved_is_said() -> None:
    objective = {"metric": "InterTokenLatency", "statistic": "p99", "max": "30ms"}
    status = Run(objectives=[objective], budget="3m").go()
    unresolved = [str(one.batch) for one in status.points if "p99" in one.unresolved]
    assert unresolved
    assert (
        f"p99 InterTokenLatency is unresolved at batch {', '.join(unresolved)}: it takes 2000 engine steps: raise profiling.budget"
        in message(status)
    )


def test_each_cause_of_an_open_percentile_has_an_advice_of_its_own() -> None:
    """A larger budget does not make a load less late."""
    told = usual().status.model_copy(
        update={
            "points": [
                one.model_copy(
                    update={
                        "unresolved": ["p95", "p99"] if one.batch in (8, 16, 32) else [],
                        "blurred": ["p95", "p99"] if one.batch in (16, 32) else [],
                        "time_to_first_token": None if one.batch == 2 else SEEN,
                    }
                )
                for one in usual().status.points
            ],
            "outcome": None,
        }
    )
    objectives = [
        {"metric": metric, "statistic": "p95", "max": "30ms"} for metric in ("InterTokenLatency", "TimeToFirstToken")
    ]
    said = message(Run(status=told.to_dict(), objectives=objectives).go())
    late = "the load's own lateness hides it, and more time does not help: let nothing else run on the load's core"
    assert f"p95 InterTokenLatency is unresolved at batch 16, 32: {late}" in said
    assert "p95 InterTokenLatency is unresolved at batch 8: it takes 500 engine steps: raise profiling.budget" in said
    assert (
        "p95 TimeToFirstToken is unresolved at batch 2: it takes 20 first tokens of requests that begin meanwhile: "
        "raise profiling.budget" in said
    )


SEEN = api.Latency(mean="1ms", p50="1ms", p90="1ms", p95="1ms", p99="1ms")


@pytest.mark.parametrize(
    ("first_tokens", "known"),
    [(1, {"p50", "p90"}), (19, {"p50", "p90"}), (20, {"p50", "p90", "p95"}), (100, {"p50", "p90", "p95", "p99"})],
)
def test_a_percentile_of_the_time_to_first_token_takes_first_tokens(first_tokens: int, known: set[str]) -> None:
    histogram = Histogram()
    for number in range(first_tokens):
        histogram.add(0.1 + 0.001 * number)
    found = points.first_token_latency(histogram)
    assert found is not None
    assert {name for name in ("p50", "p90", "p95", "p99") if getattr(found, name)} == known
    assert points.latency(histogram) is not None


def test_a_level_whose_time_was_over_before_it_was_precise_is_named_with_its_figures() -> None:
    """Points as an earlier attempt left them; 32 was on the way up and steep, where 6 % will do, and 64 is near the objective."""
    widths = {1: "0.031", 32: "0.055", 64: "0.055", 128: "0.024"}
    told = [one.model_copy(update={"half_width": widths.get(one.batch, "0.01")}) for one in usual().status.points]
    kept = usual().status.model_copy(update={"points": told, "outcome": None})
    said = message(Run(status=kept.to_dict(), itl="24ms").go())
    assert (
        "throughput is known less well than it should be at batch 1 to 3.1% (asked 3%), 64 to 5.5% (asked 3%): raise profiling.budget"
        in said
    )
    assert "less well" not in message(usual().status)


# --- extension ---

TRIALS = {"request": "more", "pairs": [{"batch": 64, "replicas": 2}]}


@pytest.mark.parametrize(
    ("outcome", "extend", "left"),
    [
        ({"state": "Completed"}, TRIALS, 1),
        ({"state": "Completed", "extend": "more"}, TRIALS, None),
        ({"state": "Completed", "extend": "earlier"}, TRIALS, 1),
        ({"state": "Completed", "rerun": "1"}, TRIALS, 1),
        ({"state": "Completed", "extend": "more"}, None, None),
        (None, TRIALS, 1),
    ],
)
def test_a_finished_profile_that_is_asked_for_trials_is_kept_whole(
    outcome: dict[str, str] | None, extend: dict[str, Any] | None, left: int | None
) -> None:
    status: dict[str, Any] = {"points": [{"batch": 1}], **({"outcome": outcome} if outcome else {})}
    found = kept(make_profile(status=status, **({"extend": extend} if extend else {})))
    assert (None if found is None else len(found.points)) == left


def test_an_extension_keeps_all_and_its_outcome_answers_the_request() -> None:
    done = usual().status.to_dict()
    run = Run(status=done, extend=TRIALS)
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.extend) == ("Completed", "more")
    assert done["outcome"]["message"] in message(status)
    for part in ("points", "baseline", "memory", "confirmation"):
        assert status.to_dict()[part] == done[part], part
    assert all(one["outcome"]["state"] == "Completed" for one in run.sink.written)


def test_an_extension_takes_the_outcome_back_that_the_operator_wrote_for_a_broken_job() -> None:
    done = usual().status.to_dict()
    done["outcome"] = {"state": "BudgetExceeded", "reason": "JobFailed", "message": "no trials", "extend": "earlier"}
    run = Run(status=done, extend=TRIALS)
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason, status.outcome.extend) == (
        "BudgetExceeded",
        "BudgetExceeded",
        "more",
    )
    # From its first report on: as long as the reason is JobFailed the operator writes an outcome of its own.
    assert all(one["outcome"]["reason"] == "BudgetExceeded" for one in run.sink.written)


# --- measured again ---


def standing(written: dict[str, Any]) -> dict[str, Any]:
    """What a written status holds of the measurement that stands."""
    return api.Measured.model_validate(written).to_dict()


def test_what_was_measured_stands_until_the_new_measurement_has_ended() -> None:
    done = usual().status.to_dict()
    run = Run(FLAT, status=done, rerun="new driver")
    status = run.go()
    *before, last = run.sink.written
    assert len(before) > 10
    for one in before:
        assert standing(one) == standing(done)
        assert one["outcome"] == done["outcome"]
        assert one["rerun"]["request"] == "new driver"
    assert len(before[-1]["rerun"]["points"]) == len(status.points)
    assert "rerun" not in last
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.rerun) == ("Completed", "new driver")
    assert batches(status) == batches(Run(FLAT).go()) != [one["batch"] for one in done["points"]]
    assert float(status.gpu_seconds or 0) < float(done["gpuSeconds"]) + 100


def test_a_new_measurement_that_is_stopped_goes_on_where_it_was() -> None:
    done, first = usual().status.to_dict(), Run(status=usual().status.to_dict(), rerun="2")
    whole = first.go()
    middle = next(one for one in first.sink.written if len(one.get("rerun", {}).get("points", ())) == 5)
    second = Run(status=middle, rerun="2")
    status = second.go()
    assert batches(status) == batches(whole)
    begun = {one["progress"].get("batch") for one in second.sink.written if one["progress"]["stage"] == "Sweeping"}
    assert begun.isdisjoint(point["batch"] for point in middle["rerun"]["points"])
    # Another text has nothing to do with it.
    found = kept(make_profile(status=middle, rerun="3"))
    assert found is not None
    assert found.points == []
    assert standing(middle) == standing(done)


def test_a_new_measurement_that_fails_leaves_what_was_measured_and_says_so() -> None:
    done = usual().status.to_dict()
    done["outcome"] |= {"reason": "JobFailed"}  # the operator's word for an earlier one that broke
    run = Run(status=done, rerun="2", budget="1s")
    status = run.go()
    assert standing(run.sink.written[-1]) == standing(done)
    assert status.rerun is None
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason, status.outcome.rerun) == ("Completed", "Completed", "2")
    assert "the measurement that rerun 2 asked for failed (NoPointInBudget)" in message(status)
    assert "raise profiling.budget" in message(status)
    assert status.progress is not None
    assert status.progress.points == len(status.points)
    assert kept(make_profile(status=run.sink.written[-1], rerun="2")) is None


def test_a_failure_is_nothing_that_could_stand() -> None:
    failed = {"points": [{"batch": 1}], "outcome": {"state": "Failed", "rerun": "1"}}
    run = Run(FLAT, status=failed, rerun="2")
    status = run.go()
    assert all("rerun" not in one for one in run.sink.written)
    assert "outcome" not in run.sink.written[0]
    assert status.outcome is not None
    assert status.outcome.rerun == "2"


def test_a_new_profile_with_an_extension_answers_it_at_once() -> None:
    status = Run(extend=TRIALS).go()
    assert status.outcome is not None
    assert status.outcome.extend == "more"
