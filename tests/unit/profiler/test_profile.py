"""Whole profiles in virtual time: what is measured, what is reported, and what happens when something goes wrong."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tightship.api.units import parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.__main__ import AGAIN, FINISHED, kept, profile
from tightship.profiler.gpu import GIB
from tightship.profiler.meter import Meter, Reading
from tightship.profiler.profile import Profiler, largest_batch, make_job
from tightship.profiler.report import Away, Report
from unit.profiler.fakes import (
    FakeDevice,
    FakeLauncher,
    FakeModel,
    MemorySink,
    VirtualClock,
    in_virtual_time,
    make_profile,
)


class Run:
    """A profile that was run, and what can be seen of it afterwards."""

    def __init__(
        self,
        *models: FakeModel,
        device: FakeDevice | None = None,
        environ: Mapping[str, str] | None = None,
        in_flight_most: int | None = None,
        **profile: Any,
    ) -> None:
        self.in_flight_most = in_flight_most
        self.environ = dict(environ or {})
        self.device = device or FakeDevice()
        self.launcher = FakeLauncher(self.device, list(models) or [FakeModel()])
        self.sink = MemorySink(make_profile(**profile))
        self.seconds = 0.0

    def go(self) -> api.BatchProfileStatus:
        return in_virtual_time(self._story)

    async def _story(self) -> api.BatchProfileStatus:
        profile, clock = await self.sink.read(), VirtualClock()
        report = Report(self.sink, kept(profile) or profile.status, standing=profile if profile.standing else None)
        job = replace(
            make_job(profile, "facebook/opt-1.3b", self.device, self.environ), in_flight_most=self.in_flight_most
        )
        began = clock.now()
        await Profiler(
            job, launcher=self.launcher, device=self.device, report=report, clock=clock, environ={"HF_HOME": "/nowhere"}
        ).run()
        self.seconds = clock.now() - began
        assert await report.flush(1000)
        await report.close()
        return self.status

    @property
    def said(self) -> list[dict[str, Any]]:
        """The progress that was reported, one after the other; that time went by meanwhile is no other."""
        told = [{**one["progress"], "elapsed": None} for one in self.sink.written]
        return [one for one, _ in itertools.groupby(told)]

    @property
    def status(self) -> api.BatchProfileStatus:
        return api.BatchProfileStatus.model_validate(self.sink.written[-1])


@functools.cache
def usual() -> Run:
    """A profile in which nothing goes wrong, run once for all who look at it."""
    run = Run()
    run.go()
    return run


def batches(status: api.BatchProfileStatus) -> list[int]:
    return sorted(point.batch for point in status.points)


def point(status: api.BatchProfileStatus, batch: int) -> api.Point:
    return next(one for one in status.points if one.batch == batch)


def test_a_whole_profile() -> None:
    run = usual()
    status = run.status

    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Completed", "Completed")
    assert batches(status) == [1, 2, 4, 8, 16, 32, 64, 96, 104, 112, 128, 256, 512, 1024]
    # The model's own figures: a step of 10 ms + 0.2 ms a request, each request a token; in/out = 111/292.
    for batch, step in ((1, 0.0102), (64, 0.0228), (256, 0.0612)):
        total = float(point(status, batch).total_tokens_per_second or 0)
        assert total == pytest.approx(batch / step * (1 + 111 / 292), rel=0.02), batch
        assert float(
            (point(status, batch).inter_token_latency or api.Latency()).mean.removesuffix("ms")
        ) == pytest.approx(  # type: ignore[union-attr]
            1000 * step, rel=0.02
        )
    # 30 ms hold up to batch 100: the sweep's 96 is confirmed, as a replica would run.
    assert len(run.launcher.launched) == 2
    assert run.device.stopped == 2
    replica = run.launcher.launched[1]
    assert replica.max_num_seqs == 96
    assert replica.max_num_batched_tokens == 8192
    assert replica.capture_sizes == (1, 2, 4, 8)
    memory = status.memory
    assert memory is not None
    assert memory.confirmed_batch == 96
    assert memory.kv_cache_tokens == replica.kv_cache_bytes // 100_000  # type: ignore[operator]
    assert parse_quantity(memory.replica or "0") == pytest.approx(
        12 * GIB + memory.kv_cache_tokens * 100_000, abs=16 * 100_000
    )
    assert status.confirmation is not None
    assert status.confirmation.agrees is True


def test_kv_cache_of_a_replica_covers_what_was_seen_and_the_method_asks() -> None:
    memory = usual().status.memory
    assert memory is not None
    # 96 (111 + 292 + 8) + 4 sqrt(96) hypot(111, 292) = 39,456 + 12,243, rounded up to blocks of 16
    assert memory.kv_cache_tokens == pytest.approx(51_699, abs=16)
    assert memory.basis == "Assumed"


def test_every_point_is_reported_at_once_and_with_all_others() -> None:
    counts = [len(status["points"]) for status in usual().sink.written]
    assert counts == sorted(counts)
    assert set(range(1, 15)) <= set(counts)


def test_a_restarted_profiler_measures_nothing_twice() -> None:
    first = usual().status
    known = [one.to_dict() for one in first.points if one.batch <= 64]
    run = Run(status={"points": known, "gpuSeconds": "100"})
    status = run.go()
    assert batches(status) == batches(first)
    assert [one.to_dict() for one in status.points if one.batch <= 64] == known
    assert float(status.gpu_seconds or 0) > 100
    progress = [status["progress"] for status in run.sink.written]
    assert {one["batch"] for one in progress if one["stage"] == "Sweeping"} == {96, 104, 112, 128, 256, 512, 1024}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (FakeModel(host=0.0, per_request=0.001), [1, 2]),  # no gain at all from batching
        # 64 / 33 ms is 0.045 of 64 / 1.5 ms; the floor of 0.1 is at batch 28
        (FakeModel(host=0.001, per_request=0.0005), [1, 2, 4, 8, 16, 24, 32, 64]),
    ],
    ids=["no-gain", "plateau"],
)
def test_the_ladder_ends_where_more_cannot_be_learned(model: FakeModel, expected: list[int]) -> None:
    status = Run(model, itl=None).go()
    assert batches(status) == expected
    assert status.outcome is not None
    assert status.outcome.state == "Completed"


def test_a_full_kv_cache_shows_as_preemptions() -> None:
    status = Run(FakeModel(kv_tokens=20_000), itl=None).go()
    # 20,000 tokens over a mean context of 111 + 292/2 + 8 are 75 requests: 72, the first probe, may preempt or not, by lot; 80 does.
    crowded = {one.batch for one in status.points if (one.preemptions or 0) > 3}
    assert {80, 128}.intersection(batches(status)) <= crowded
    assert {1, 2, 4, 8, 16, 32, 64, 72}.issubset(batches(status))
    assert not crowded.intersection([1, 2, 4, 8, 16, 32, 64])
    assert status.memory is not None
    assert status.memory.confirmed_batch == (64 if 72 in crowded else 72)
    assert "KV cache is full" in (status.outcome.message if status.outcome else "") or ""


def test_requests_are_drawn_by_lot_where_they_may_fill_the_kv_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    by_lot: dict[int, bool] = {}
    measure = Meter._reading

    def reading(self: Meter, batch: int, *others: Any) -> Reading:
        by_lot.setdefault(batch, self._load.by_lot)
        return measure(self, batch, *others)

    monkeypatch.setattr(Meter, "_reading", reading)
    Run(FakeModel(kv_tokens=20_000), itl=None).go()
    # 64 x 265 + 4 x 84.3 x 8 are 19,660 tokens, and for 72 requests 21,940
    assert not any(by_lot[batch] for batch in (1, 2, 4, 8, 16, 32, 64))
    assert by_lot[128]
    assert by_lot[72]


def test_the_budget_ends_the_sweep_and_still_confirms() -> None:
    run = Run(budget="80s")
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "BudgetExceeded"
    assert "budget of 80 s" in (status.outcome.message or "")
    assert 3 <= len(status.points) < 14
    assert status.memory is not None
    # The first start is free, the second counts.
    assert run.seconds - 30 <= 80 + 2
    assert float(status.gpu_seconds or 0) == pytest.approx(run.seconds - 30, abs=2)


def test_a_budget_too_small_for_one_point_is_a_failure_that_says_so() -> None:
    status = Run(budget="2s").go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Failed", "NoPointInBudget")
    assert "raise profiling.budget" in (status.outcome.message or "")


def test_an_engine_that_does_not_start_is_a_failure_with_its_last_words() -> None:
    run = Run(FakeModel(fails_to_start="api_server.py: error: unrecognized arguments: --nope"))
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Failed", "EngineFailed")
    assert "unrecognized arguments: --nope" in (status.outcome.message or "")


def test_an_engine_that_dies_once_is_started_again_and_nothing_is_measured_twice() -> None:
    run = Run(FakeModel(dies_after=20), FakeModel())
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert "restarted once" in (status.outcome.message or "")
    assert len(run.launcher.launched) == 3
    measuring = [one["message"] for one in run.said]
    again = [
        message
        for message in dict.fromkeys(measuring)
        if message.startswith("measuring") and measuring.count(message) > 1
    ]
    assert len(again) <= 1  # only the level that the engine died in
    assert len(status.points) == 14


def test_an_engine_that_dies_again_before_there_is_a_curve_fails_with_its_last_words_and_keeps_its_points() -> None:
    status = Run(FakeModel(dies_after=6)).go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Failed", "EngineFailed")
    assert "the last words" in (status.outcome.message or "")
    assert 0 < len(status.points) < 4


def test_an_engine_that_dies_at_two_batches_leaves_a_curve_to_advise_from_and_to_go_on_with() -> None:
    run = Run(FakeModel(dies_after=17), FakeModel(dies_after=17), FakeModel())
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.unfinished) == ("Completed", ["Sweep"])
    assert (status.outcome.message or "").startswith("the engine failed again after 7 points: the engine died: ")
    assert "`tightship profile --resume`, makes up for it" in (status.outcome.message or "")
    assert status.memory is not None
    assert status.confirmation is not None

    again = Run(status={**run.sink.written[-1], "outcome": None}).go()
    assert [one for one in again.points if one.batch <= 64] == status.points
    assert batches(again) == batches(usual().status)
    assert again.outcome is not None
    assert again.outcome.unfinished == []


def test_an_engine_that_hangs_is_no_engine() -> None:
    run = Run(FakeModel(hangs_after=5), budget="20m")
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "Failed"
    assert "no token has come for" in (status.outcome.message or "")
    assert "its last words: INFO the engine's last line" in (status.outcome.message or "")


@pytest.mark.parametrize(
    ("itl", "measured", "launched"),
    [("30ms", [1, 2, 4, 8, 16, 32, 64], 3), ("20ms", [1, 2, 4, 8, 16, 32, 48, 56, 64], 4)],
    ids=["nothing to refine below it", "a bisection below it"],
)
def test_a_batch_that_ends_the_engine_twice_ends_the_ladder_and_not_the_profile(
    itl: str, measured: list[int], launched: int
) -> None:
    run = Run(FakeModel(dies_above=100), itl=itl)
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert batches(status) == measured
    message = status.outcome.message or ""
    assert message.startswith("batch 128 ended the engine twice: neither it nor larger ones were measured; ")
    assert "at batch 128: the engine died: ValueError: the last words" in message
    assert status.outcome.unfinished == [], "it is the engine's nature, and no accident"
    assert status.baseline is None
    assert len(run.launcher.launched) == launched
    assert run.device.stopped == launched
    assert status.memory is not None
    assert status.memory.confirmed_batch == (64 if itl == "30ms" else 48)


def test_a_batch_that_ends_the_engine_twice_below_measured_ones_is_left_out_alone() -> None:
    known = [one.to_dict() for one in usual().status.points if one.batch.bit_count() == 1]
    run = Run(FakeModel(dies_above=80), FakeModel(dies_above=80), FakeModel(), status={"points": known})
    status = run.go()
    assert status.outcome is not None
    message = status.outcome.message or ""
    assert "batch 96 ended the engine twice and has no point, though batch 128 has one" in message
    assert "larger ones were measured" not in message
    assert batches(status) == [1, 2, 4, 8, 16, 32, 64, 80, 88, 128, 256, 512, 1024]
    assert status.baseline is not None


@pytest.mark.parametrize("seconds", [3.0, 12.0])
def test_the_memory_that_the_sweeps_engine_still_holds_is_not_the_replicas(seconds: float) -> None:
    status = Run(device=FakeDevice(lingers=seconds)).go()
    assert status.memory is not None
    assert status.memory == usual().status.memory


def test_a_reading_that_no_replica_can_have_makes_no_ledger_but_a_word_with_numbers() -> None:
    status = Run(device=FakeDevice(lingers=20.0)).go()
    assert status.memory is None
    assert status.confirmation is not None
    assert status.confirmation.arrivals is not None
    assert status.outcome is not None
    assert (
        "the memory of a replica is unknown: 49.75 GiB were in use before the start and 17.32 GiB at the most, which leaves less than "
        "the 4.82 GiB of its KV cache alone" in (status.outcome.message or "")
    )


def test_a_gpu_that_is_lost_after_the_sweep_costs_no_point() -> None:
    status = Run(device=FakeDevice(lost_with=1)).go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.unfinished) == ("Completed", ["Confirmation"])
    assert "14 batches were measured, but running as a replica would failed: the GPU is lost" in (
        status.outcome.message or ""
    )
    assert batches(status) == batches(usual().status)


def test_batches_that_have_no_sockets_have_no_point() -> None:
    run = Run(in_flight_most=300)
    status = run.go()
    assert batches(status)[-1] == 256
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    message = status.outcome.message or ""
    assert (
        "batch 512 has no point: 512 requests at once need as many sockets, and this process may open files for 300"
        in message
    )
    assert "no baseline: 1024 requests at once need" in message


def test_no_batch_meets_the_objective_memory_is_still_read() -> None:
    status = Run(itl="1ms").go()
    assert status.memory is not None
    assert status.memory.confirmed_batch is not None
    assert status.outcome is not None
    assert status.outcome.state == "Completed"


def test_a_confirmation_that_disagrees_says_by_how_much() -> None:
    status = Run(FakeModel(slower_as_replica=1.3)).go()
    assert status.confirmation is not None
    assert status.confirmation.agrees is False
    assert "1.3" in (status.confirmation.message or "")
    assert status.outcome is not None
    assert status.outcome.state == "Completed"


def test_percentiles_that_the_confirmation_left_open_are_no_figures_of_a_replica() -> None:
    status = usual().status
    assert status.confirmation is not None
    shown = status.confirmation.inter_token_latency
    assert shown is not None
    assert shown.mean
    assert shown.p99 is None, "15 s are no 2,000 engine steps of 29 ms"


def test_a_replica_that_does_not_start_is_tried_again() -> None:
    status = Run(FakeModel(), FakeModel(fails_to_start="RuntimeError: chance"), FakeModel()).go()
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert "was repeated" in (status.outcome.message or "")
    assert status.memory is not None


def test_a_replica_that_never_starts_costs_the_confirmation_and_no_point() -> None:
    run = Run(FakeModel(), FakeModel(fails_to_start="RuntimeError: always"))
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.unfinished) == ("Completed", ["Confirmation"])
    assert "14 batches were measured, but running as a replica would failed" in (status.outcome.message or "")
    assert "RuntimeError: always" in (status.outcome.message or "")
    assert "not finished, because the load ran late or the engine failed: Confirmation; " in (
        status.outcome.message or ""
    )
    assert len(status.points) == 14
    assert status.memory is None

    again = Run(status={**run.sink.written[-1], "outcome": None})
    status = again.go()
    assert "Sweeping" not in {one["stage"] for one in again.said}
    assert status.confirmation is not None
    assert status.memory is not None
    assert status.outcome is not None
    assert status.outcome.unfinished == []


def test_a_replica_that_does_not_fit_fails_the_profile() -> None:
    status = Run(FakeModel(), FakeModel(out_of_memory=True)).go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Failed", "InsufficientMemory")
    assert "14 batches were measured, but running as a replica would failed" in (status.outcome.message or "")


def test_the_time_spent_is_saved_also_while_nothing_is_found() -> None:
    """An attempt that is killed leaves at most 10 s of its time to the next one's budget; the second engine's start alone takes 30."""
    spent = [float(one.get("gpuSeconds", 0)) for one in usual().sink.written]
    assert max(later - earlier for earlier, later in itertools.pairwise(spent)) <= 10.5


@pytest.mark.parametrize("metric", ["InterTokenLatency", "TimeToFirstToken"])
def test_a_percentile_objective_gets_the_steps_it_needs(metric: str) -> None:
    objective = {"metric": metric, "statistic": "p95", "max": "30ms"}
    status = Run(objectives=[objective]).go()
    assert all("p95" not in one.unresolved for one in status.points if one.batch <= 256)
    if metric == "TimeToFirstToken":
        assert all(one.time_to_first_token and one.time_to_first_token.p95 for one in status.points if one.batch >= 8)
    assert "p95" in point(usual().status, 256).unresolved


def test_an_engine_whose_own_histogram_says_otherwise_is_quoted_beside_the_client() -> None:
    told = Run(FakeModel(itl_told=0.8)).go().outcome
    assert told is not None
    assert "batch 64: 22.8 ms between tokens at the client, 18.2 ms by the engine" in (told.message or "")
    agreed = usual().status.outcome
    assert agreed is not None
    assert "by the engine" not in (agreed.message or "")


def test_the_api_server_is_away_while_points_are_reported() -> None:
    run = Run()
    run.sink.errors = [Away("connection refused")] * 8
    status = run.go()
    assert len(run.sink.written[0]["points"]) >= 2, (
        "those that were measured meanwhile came with the first report that got through"
    )
    assert status.points == usual().status.points
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert status.gpu_seconds == usual().status.gpu_seconds, "nobody waits for the API server"


def test_an_api_server_that_stays_away_leaves_the_end_to_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaving(MemorySink):
        """Away from the fifth point on."""

        async def write(self, status: Mapping[str, Any]) -> None:
            if len(status.get("points", ())) > 4 and not self.back:
                raise Away("connection refused")
            await super().write(status)

        back = False

    device, environ = FakeDevice(), {"HF_HOME": "/nowhere"}
    monkeypatch.setattr("tightship.profiler.__main__.open_device", lambda *_: device)
    sink = Leaving(make_profile())

    def attempt() -> int:
        return in_virtual_time(lambda: profile(sink, environ, VirtualClock(), FakeLauncher(device, [FakeModel()])))

    assert attempt() == AGAIN
    before = sink.written[-1]
    assert len(before["points"]) == 4
    assert before.get("outcome") is None

    sink.back = True
    sink.profile = sink.profile.model_copy(update={"status": api.BatchProfileStatus.model_validate(before)})
    assert attempt() == FINISHED
    assert sink.written[-1]["points"][:4] == before["points"]
    assert sink.written[-1]["outcome"]["state"] == "Completed"


def test_stopping_in_the_middle_keeps_the_points_and_stops_the_engine() -> None:
    run = Run(rerun="first")

    async def story() -> None:
        profile, clock = await run.sink.read(), VirtualClock()
        report = Report(run.sink, profile.status)
        job = make_job(profile, "m", run.device, {})
        profiler = Profiler(
            job, launcher=run.launcher, device=run.device, report=report, clock=clock, environ={"HF_HOME": "/nowhere"}
        )
        task = asyncio.get_running_loop().create_task(profiler.run())
        while len(report.points) < 3:  # noqa: ASYNC110 (virtual time: it costs nothing)
            await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await report.flush(5)
        await report.close()

    in_virtual_time(story)
    assert len(run.status.points) == 3
    assert run.status.outcome is None
    assert float(run.status.gpu_seconds or 0) > 5
    assert run.device.stopped == 1
    # Which `rerun` the points are of is in what was written, for whoever goes on or begins anew.
    assert {status["progress"].get("rerun") for status in run.sink.written} == {"first"}

    # The next pod goes on from what was written, and measures nothing twice.
    written = run.sink.written[-1]
    again = Run(status=written)
    status = again.go()
    assert [one.to_dict() for one in status.points][:3] == written["points"]
    measured = {one["progress"].get("batch") for one in again.sink.written if one["progress"]["stage"] == "Sweeping"}
    assert not measured & {1, 2, 4}
    assert batches(status) == batches(usual().status)


def test_an_engine_that_answers_with_errors_is_no_engine() -> None:
    run = Run(FakeModel(refuses_after=4, says="RuntimeError: the cause"))
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Failed", "EngineFailed")
    assert (
        "requests failed in a row, the last because the engine answered 500: oops; its last words: RuntimeError: the cause"
        in (status.outcome.message or "")
    )
    assert status.points
    assert len(run.launcher.launched) == 2
    assert run.device.stopped == 2


def test_an_engine_that_dies_while_requests_arrive_is_started_again_for_the_arrivals_alone() -> None:
    run = Run(FakeModel(), FakeModel(dies_after=20), FakeModel())
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert "the confirmation run was repeated" in (status.outcome.message or "")
    assert status.confirmation is not None
    assert status.confirmation.arrivals is not None
    said = [one["progress"]["message"] for one in run.sink.written]
    assert len({text for text in said if text.startswith("a replica of batch")}) == 1


def test_an_engine_that_does_not_count_its_tokens_is_told_of_at_once() -> None:
    run = Run(FakeModel(counts=False))
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "Failed"
    assert "counter vllm:generation_tokens_total stands still" in (status.outcome.message or "")
    assert status.points == []
    assert run.seconds < 120


def test_an_engine_that_never_comes_up_again_ends_the_sweep_with_the_budget() -> None:
    run = Run(FakeModel(dies_after=20), FakeModel(start_seconds=3600), budget="4m")
    status = run.go()
    assert status.outcome is not None
    assert status.outcome.state == "BudgetExceeded"
    assert status.points
    assert "started again, was still starting" in (status.outcome.message or "")
    assert "the engine died: ValueError: the last words" in (status.outcome.message or "")
    assert float(status.gpu_seconds or 0) == pytest.approx(240, abs=1)


@pytest.mark.parametrize(
    ("models", "state", "words"),
    [
        ([FakeModel(fails_to_start="RuntimeError: no")], "Failed", "RuntimeError: no"),
        (
            [FakeModel(dies_after=20)],
            "Completed",
            "failed again after 8 points: the engine died: ValueError: the last words",
        ),
        (
            [FakeModel(hangs_after=40)],
            "BudgetExceeded",
            "when the time was over; its last words: INFO the engine's last line",
        ),
        (
            [FakeModel(refuses_after=20)],
            "Completed",
            "failed again after 8 points: 20 requests failed in a row, the last because",
        ),
        (
            [FakeModel(), FakeModel(dies_after=3)],
            "BudgetExceeded",
            "running as a replica would failed: the engine died: ",
        ),
        (
            [FakeModel(), FakeModel(hangs_after=3)],
            "BudgetExceeded",
            "no token has come for 90 s with 96 requests in flight",
        ),
        ([FakeModel(kv_tokens=20_000)], "Completed", "the KV cache is full"),
        ([FakeModel(dies_after=20), FakeModel(start_seconds=3600)], "BudgetExceeded", "was still starting"),
        ([FakeModel(), FakeModel(start_seconds=3600)], "BudgetExceeded", "was cut at the end of the budget"),
        ([FakeModel(slower_as_replica=100)], "BudgetExceeded", "time between tokens 100.000 times the sweep's"),
    ],
    ids=[
        "no start",
        "death",
        "hang",
        "errors",
        "a replica's death",
        "a replica's hang",
        "preemption",
        "a slow restart",
        "a replica's slow start",
        "a long worst step",
    ],
)
def test_whatever_happens_it_is_said_the_budget_holds_nothing_is_measured_twice_and_every_engine_is_stopped(
    models: list[FakeModel], state: str, words: str
) -> None:
    run = Run(*models, budget="4m")
    status = run.go()
    assert status.outcome is not None
    assert (status.outcome.state, words in (status.outcome.message or "")) == (state, True), status.outcome.message
    assert float(status.gpu_seconds or 0) <= 240 + 2
    assert run.device.stopped == len(run.launcher.engines)
    levels = [one["message"] for one in run.said if one["message"].startswith("measuring")]
    # Only what the engine failed in is begun again, once for each engine.
    assert len(levels) - len(set(levels)) < len(run.launcher.launched)
    told = [{one["batch"]: one for one in written.get("points", ())} for written in run.sink.written]
    for earlier, later in itertools.pairwise(told):
        assert {batch: later.get(batch) for batch in earlier} == earlier


@pytest.mark.parametrize(
    ("device", "args", "expected"),
    [
        (FakeDevice(), (), 1024),
        (FakeDevice(memory=80 * GIB, product="NVIDIA A100-SXM4-80GB"), (), 256),
        (FakeDevice(memory=24 * GIB, product="NVIDIA L4"), (), 256),
        (FakeDevice(kind="cpu", product="cpu", memory=8 * GIB), (), 128),
        (FakeDevice(), ("--max-num-batched-tokens=512",), 512),
        (FakeDevice(), ("--max_num_batched_tokens", "600"), 600),
    ],
)
def test_the_ladders_top_is_the_engines_default(device: FakeDevice, args: tuple[str, ...], expected: int) -> None:
    assert largest_batch(device, args) == expected
