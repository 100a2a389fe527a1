"""`tightship advise`: what it reads, what it says, how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tightship import decide
from tightship.__main__ import main as tightship
from tightship.api.v1alpha1.spec import Objective as ApiObjective
from tightship.commands import advise

GIB = 1 << 30
ROWS = [(1, 381.4, 3.623, 0.865), (32, 5734.1, 7.51, 0.643), (96, 9032.8, 13.89, 0.575), (256, 10809.8, 29.27, 0.548)]


def make_points() -> list[dict[str, Any]]:
    return [
        {
            "batch": batch,
            "totalTokensPerSecond": str(throughput),
            "outputTokensPerSecond": str(throughput * 0.7),
            "interTokenLatency": {"mean": f"{itl}ms"},
            "requests": 2000,
            "preemptions": 0,
            "gpuUtilization": str(utilization),
        }
        for batch, throughput, itl, utilization in ROWS
    ]


def make_memory(**changes: Any) -> dict[str, Any]:
    return {
        "confirmedBatch": 96,
        "deviceTotal": "64Gi",
        "blockSize": 16,
        "kvBytesPerToken": 196_608,
        "kvCacheTokens": 51_200,
        "kvCache": "9600Mi",
        "nonKV": "4Gi",
        "replica": "13696Mi",
        "contextMean": "411",
        "contextStd": "312",
        "basis": "Assumed",
    } | changes


def make_profile(memory: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    measured = {"gpu": {"product": "NVIDIA-H100-64GB"}, "points": make_points(), **status}
    if memory is not None:
        measured["memory"] = memory
    return {
        "apiVersion": "tightship.dev/v1alpha1",
        "kind": "BatchProfile",
        "metadata": {"name": "opt"},
        "status": measured,
    }


def write(folder: Path, *documents: Any) -> str:
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    status = tightship(["advise", *args, "-o", "json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, answer


def test_a_recommendation_with_known_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = ask(capsys, "-f", write(tmp_path, make_profile(make_memory())), "--itl", "15ms")

    assert status == 0
    expected = {
        "feasible": True, "batch": 96, "bindingLimit": "SLO", "replicasPerGPU": 1, "basis": "Measured",
        "kvCache": "9600Mi", "kvCacheTokens": 51_200, "memoryPerReplica": "13696Mi",
    }  # fmt: skip
    assert answer.items() >= expected.items()


def test_packing_is_estimated_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = ask(capsys, "-f", write(tmp_path, make_profile(make_memory())), "--itl", "60ms")

    assert answer["basis"] == "Estimated"
    assert answer["replicasPerGPU"] >= 2
    assert float(answer["expectedGain"]) >= 1.05


def test_unknown_memory_still_gives_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = ask(capsys, "-f", write(tmp_path, make_profile()), "--itl", "15ms")

    assert (status, answer["batch"], answer["replicasPerGPU"]) == (0, 96, 1)
    assert (answer["kvCache"], answer["memoryPerReplica"]) == (None, None)


def test_an_infeasible_slo_ends_with_3_and_the_best_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, answer = ask(capsys, "-f", write(tmp_path, make_profile()), "--itl", "2ms")

    assert (status, answer["feasible"], answer["reason"]) == (advise.EXIT_INFEASIBLE, False, "SLOInfeasible")
    assert answer["bestAchievable"]["batch"] == 1
    assert answer["bestAchievable"]["latencies"][0]["value"] == "3.623ms"


def test_imported_results_are_read_where_status_has_no_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = make_profile()
    profile["spec"], profile["status"] = {"results": profile["status"]}, {"conditions": []}
    status, answer = ask(capsys, "-f", write(tmp_path, profile), "--itl", "15ms")
    assert (status, answer["batch"]) == (0, 96)


def test_output_tokens_are_the_throughput_where_totals_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = make_points()
    for point in points:
        del point["totalTokensPerSecond"]
    _, answer = ask(capsys, "-f", write(tmp_path, make_profile(points=points)), "--itl", "15ms")
    assert float(answer["tokensPerSecond"]) == pytest.approx(9032.8 * 0.7, abs=0.06)


def measured_for(**how: Any) -> dict[str, Any]:
    """A profile whose points have tails, and what it was measured for."""
    profile = make_profile(make_memory())
    for point in profile["status"]["points"]:
        mean = float(point["interTokenLatency"]["mean"][:-2])
        point["interTokenLatency"]["p95"] = f"{2 * mean}ms"
        point["timeToFirstToken"] = {"mean": f"{10 * mean}ms", "p95": f"{20 * mean}ms"}
    return {**profile, "spec": {"measurement": how}}


ITL = {"metric": "InterTokenLatency", "max": "20ms"}
TTFT = {"metric": "TimeToFirstToken", "statistic": "p95", "max": "160ms"}


@pytest.mark.parametrize(
    ("words", "bounds"),
    [
        ((), [("InterTokenLatency", "mean", "20ms"), ("TimeToFirstToken", "p95", "160ms")]),
        (("--itl", "15ms"), [("InterTokenLatency", "mean", "15ms")]),
        (("--itl", "p95:30ms", "--ttft", "1s"), [("InterTokenLatency", "p95", "30ms"), ("TimeToFirstToken", "mean", "1s")]),
        (
            ("--itl", "mean:15ms", "--ttft", "1s", "--statistic", "p95"),
            [("InterTokenLatency", "mean", "15ms"), ("TimeToFirstToken", "p95", "1s")],
        ),
        (("--ttft", "p95:1s", "--itl", "none"), [("TimeToFirstToken", "p95", "1s")]),
        (("--itl", "none"), []),
    ],
)  # fmt: skip
def test_each_latency_has_a_statistic_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], bounds: list[tuple[str, ...]]
) -> None:
    file = write(tmp_path, measured_for(objectives=[ITL, TTFT]))
    found = ask(capsys, "-f", file, *words)[1]["latencies"]
    assert [(each["metric"], each["statistic"], each["max"]) for each in found] == bounds


def test_what_a_profile_was_measured_for_is_what_it_is_decided_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"efficiencyFloor": 0.4, "maxReplicasPerGPU": 1}
    file = write(tmp_path, measured_for(objectives=[TTFT], **own))
    assert tightship(["advise", "-f", file]) == 0
    said = capsys.readouterr()
    assert "batch 32: " in said.out, "batch 96 has an efficiency of 0.25, and 160 ms end there too"
    assert said.err == (
        "note: decided for what the profile was measured for, p95 TimeToFirstToken 160ms; --itl and --ttft ask for something else\n"
    )
    assert ask(capsys, "-f", file, "--efficiency-floor", "0.1", "--itl", "15ms")[1]["batch"] == 96


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("much", "spec.measurement is not a mapping"),
        ({"objectives": [{"metric": "Speed", "max": "1s"}]}, "spec.measurement: objectives.0.metric"),
        ({"objectives": [{**ITL, "max": "0s"}]}, "spec.measurement: "),
        ({"efficiencyFloor": "7"}, "spec.measurement: '7': an efficiency floor is a number from 0 to below 1"),
        ({"minimumGain": "nan"}, "spec.measurement: 'nan': a minimum gain is a number from 1"),
        ({"memoryReserve": "some"}, "spec.measurement: "),
        ({"maxReplicasPerGPU": 0}, "spec.measurement: maxReplicasPerGPU"),
    ],
)
def test_what_it_was_measured_for_can_be_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: Any, said: str
) -> None:
    profile = {**make_profile(), "spec": {"measurement": how}}
    for command in ("advise", "plot"):
        assert tightship([command, "-f", write(tmp_path, profile)]) == advise.EXIT_USAGE
        error = capsys.readouterr().err
        assert f"profile.yaml: {said}" in error
        assert len(error.splitlines()) == 1


def test_settings_reach_the_advisor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, make_profile(make_memory()))
    assert ask(capsys, "-f", file, "--efficiency-floor", "0.4")[1]["batch"] == 32
    assert ask(capsys, "-f", file, "--itl", "60ms", "--max-replicas-per-gpu", "1")[1]["replicasPerGPU"] == 1
    assert ask(capsys, "-f", file, "--itl", "60ms", "--minimum-gain", "9")[1]["replicasPerGPU"] == 1
    reserved = ask(capsys, "-f", file, "--itl", "60ms", "--memory-reserve", "40Gi")[1]
    assert reserved["replicasPerGPU"] * decide.parse_quantity(reserved["memoryPerReplica"]) <= 24 * GIB
    assert ask(capsys, "-f", file, "--ttft", "1s")[1]["reason"] == "SLOInfeasible"


def test_explain_gives_every_pair_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, make_profile(make_memory()))
    _, answer = ask(capsys, "-f", file, "--itl", "15ms", "--explain")

    outcomes = [candidate["outcome"] for candidate in answer["candidates"]]
    assert outcomes.count("chosen") == 1
    assert all(c["reasons"] for c in answer["candidates"] if c["outcome"] == "rejected")

    assert tightship(["advise", "-f", file, "--itl", "15ms", "--explain"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1].split()[:2] == ["96", "SLO"]
    assert "mean InterTokenLatency 29.27ms > 15ms" in table


def test_a_replica_that_missed_the_slo_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replica = {
        "batch": 96,
        "totalTokensPerSecond": "8900",
        "interTokenLatency": {"mean": "15.3ms"},
        "throughputRatio": "0.985",
        "latencyRatio": "1.102",
        "agrees": False,
    }
    file = write(tmp_path, make_profile(make_memory(), confirmation=replica))
    _, answer = ask(capsys, "-f", file, "--itl", "15ms")
    assert answer["batch"] == 32

    assert tightship(["advise", "-f", file, "--itl", "15ms", "--explain"]) == 0
    table = capsys.readouterr().out
    assert "mean InterTokenLatency 15.3ms > 15ms as a replica (13.89ms in the sweep)" in table
    assert "batch 96 as a replica disagrees with the sweep: throughput 0.985 times the sweep's" in table


@pytest.mark.parametrize("wrong", [{"agrees": "no"}, {"interTokenLatency": {"mean": "fast"}}, {"latencyRatio": "-1"}])
def test_a_confirmation_that_cannot_be_read_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(decide.ProfileError, match=r"status\.confirmation"):
        decide.decision_from_profile(make_profile(confirmation={"batch": 96, **wrong}))


def test_other_objects_in_the_file_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"kind": "ConfigMap", "metadata": {"name": "x"}}
    listed = {"kind": "List", "items": [other, make_profile()]}
    assert ask(capsys, "-f", write(tmp_path, other, None, make_profile()), "--itl", "15ms")[0] == 0
    assert ask(capsys, "-f", write(tmp_path, listed), "--itl", "15ms")[0] == 0


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(make_profile())))
    assert ask(capsys, "-f", "-", "--itl", "15ms")[1]["batch"] == 96


# The published packings (arXiv:2503.08311): batch, replicas, total tokens/s, mean ITL in ms.
PACKED = [(96, 2, 12313.9, 18.98), (96, 4, 13172.4, 31.52), (256, 2, 14669.5, 37.07)]


def make_trials(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {
            "batch": batch,
            "replicas": replicas,
            "totalTokensPerSecond": str(throughput),
            "interTokenLatency": {"mean": f"{itl}ms"},
            "halfWidth": "0.02",
        }
        for batch, replicas, throughput, itl in PACKED
    ]
    return [*rows, *changes]


def make_baseline() -> dict[str, Any]:
    return {"batch": 512, "totalTokensPerSecond": "11203.6", "interTokenLatency": {"mean": "52.11ms"}}


def test_a_pair_that_was_tried_is_measured_and_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, make_profile(make_memory(), trials=make_trials(), baseline=make_baseline()))
    _, answer = ask(capsys, "-f", file, "--itl", "40ms")

    expected = {"batch": 256, "replicasPerGPU": 2, "basis": "Measured", "applied": None, "tokensPerSecond": "14669.5"}
    assert answer.items() >= expected.items()
    assert float(answer["expectedGain"]) == pytest.approx(14669.5 / 10809.8, abs=0.001)
    assert answer["defaultEngine"] == {
        "batch": 512,
        "totalTokensPerSecond": "11203.6",
        "latencies": [{"metric": "InterTokenLatency", "statistic": "mean", "value": "52.11ms", "max": "40ms"}],
        "meetsObjectives": False,
    }


def test_an_untried_best_waits_and_the_best_measured_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = [row for row in make_trials() if (row["batch"], row["replicas"]) == (96, 2)]
    file = write(tmp_path, make_profile(make_memory(), trials=tried))
    _, answer = ask(capsys, "-f", file, "--itl", "60ms", "--explain")

    assert (answer["basis"], answer["replicasPerGPU"] > 1) == ("Estimated", True)
    assert answer["applied"].items() >= {"batch": 96, "replicasPerGPU": 2, "memoryPerReplica": "13696Mi"}.items()
    assert any("not applied until profiling.extend" in note for note in answer["notes"])
    outcomes = {(c["batch"], c["replicas"]): (c["basis"], c["outcome"]) for c in answer["candidates"]}
    assert outcomes[96, 2] == ("Measured", "applied")
    assert outcomes[answer["batch"], answer["replicasPerGPU"]] == ("Estimated", "chosen")


def test_a_trial_without_any_rate_could_not_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = make_profile(make_memory())
    first = ask(capsys, "-f", write(tmp_path, before), "--itl", "60ms")[1]
    pair = {"batch": first["batch"], "replicas": first["replicasPerGPU"], "message": "the second engine did not start"}
    after = make_profile(make_memory(), trials=[pair])

    _, answer = ask(capsys, "-f", write(tmp_path, after), "--itl", "60ms", "--explain")

    assert (answer["batch"], answer["replicasPerGPU"]) != (pair["batch"], pair["replicas"])
    reasons = {(c["batch"], c["replicas"]): c["reasons"] for c in answer["candidates"]}
    assert reasons[pair["batch"], pair["replicas"]] == ["its trial could not be made"]


def test_explain_shows_the_basis_of_each_pair_and_the_default_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, make_profile(make_memory(), trials=make_trials(), baseline=make_baseline()))
    assert tightship(["advise", "-f", file, "--itl", "40ms", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()

    head = next(line.split() for line in lines if line.startswith("BATCH   REPLICAS"))
    rows = [line.split() for line in lines if line[:1].isdigit()]
    assert head[-2:] == ["BASIS", "OUTCOME"]
    assert ["256", "2"] in [row[:2] for row in rows if "Measured" in row and "chosen:" in row]
    assert rows[-1][:2] == ["512", "1"]
    assert lines[-1].endswith("the engine's default, misses the SLO")


def edit(**changes: Any) -> str:
    points = make_points()
    points[1].update(changes)
    return yaml.safe_dump(make_profile(points=points))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds nothing, no BatchProfile"),
        ("{", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\x00", "not YAML"),
        ("- 1", "a BatchProfile is a mapping, not list"),
        ("just words", "a BatchProfile is a mapping, not str"),
        ("kind: Pod", "holds Pod, no BatchProfile"),
        ("kind: BatchProfile", "no points"),
        ("status: 5", "status is not a mapping"),
        ("status: {points: 7}", "status.points is not a list"),
        ("status: {points: [7]}", "status.points is not a list of points"),
        ("spec: {results: {points: [{batch: 1}]}}", "spec.results.points need totalTokensPerSecond"),
        ("status: {points: [{totalTokensPerSecond: 5}]}", "status.points[0] has no batch"),
        (edit(batch=96), "batch 96 occurs more than once"),
        (edit(batch=0), "status.points[1]: batch 0"),
        (edit(batch=1.5), "status.points[1].batch: 1.5 is not a whole number"),
        (edit(batch=float("nan")), "status.points[1].batch"),
        (edit(batch=float("inf")), "status.points[1].batch"),
        (edit(totalTokensPerSecond="fast"), "status.points[1].totalTokensPerSecond: 'fast' is not a number"),
        (edit(totalTokensPerSecond=10**400), "is not a number"),
        (edit(totalTokensPerSecond=-1), "status.points[1]: throughput"),
        (edit(interTokenLatency=5), "status.points[1].interTokenLatency is not a mapping"),
        (edit(interTokenLatency={"mean": 13.9}), "status.points[1].interTokenLatency.mean: 13.9 has no unit"),
        (edit(interTokenLatency={"mean": "0s"}), "status.points[1]"),
        (edit(gpuUtilization="57.5"), "not between 0 and 1"),
        (edit(unresolved=5), "status.points[1].unresolved"),
        (edit(halfWidth="-0.1"), "status.points[1]: batch 32: half_width -0.1"),
        (yaml.safe_dump(make_profile(trials=5)), "status.trials is not a list of trials"),
        (yaml.safe_dump(make_profile(trials=[{"batch": 1}])), "status.trials[0] needs batch and replicas"),
        (
            yaml.safe_dump(make_profile(trials=[{"batch": 1, "replicas": 0, "totalTokensPerSecond": 5}])),
            "status.trials[0]: 0 replicas are fewer than 1",
        ),
        (
            yaml.safe_dump(make_profile(trials=[{"batch": 1, "replicas": 2, "outputTokensPerSecond": 5}])),
            "status.trials[0] has no totalTokensPerSecond, which the curve is in",
        ),
        (
            yaml.safe_dump(make_profile(trials=[{"batch": 1, "replicas": 2}] * 2)),
            "status.trials[1]: batch 1 with 2 replicas occurs more than once",
        ),
        (yaml.safe_dump(make_profile(baseline={"totalTokensPerSecond": 5})), "status.baseline has no batch"),
        (yaml.safe_dump_all([make_profile(), make_profile()]), "holds 2 BatchProfiles (opt, opt)"),
        (yaml.safe_dump(make_profile(make_memory(nonKV="lots"))), "status.memory.nonKV: 'lots' is not a quantity"),
        (yaml.safe_dump(make_profile(make_memory(contextMean="-5"))), "status.memory"),
        (yaml.safe_dump(make_profile(make_memory(nonKV=None, kvCache="99Gi"))), "status.memory"),
    ],
)
def test_malformed_files_end_with_2_and_say_what_is_wrong(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    assert tightship(["advise", "-f", str(path), "--itl", "15ms"]) == advise.EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--itl", "15"], "is not a duration"),
        (["--itl", "0"], "can't be met"),
        (["--statistic", "p42"], "invalid choice"),
        (["--efficiency-floor", "2"], "an efficiency floor is a number"),
        (["--minimum-gain", "0.5"], "a minimum gain is a number from 1"),
        (["--memory-reserve", "120%"], "neither a percentage below 100"),
        (["--memory-reserve", "some"], "is not a quantity"),
        (["--max-replicas-per-gpu", "0"], "a whole number from 1"),
    ],
)
def test_wrong_options_end_with_2_in_words(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tightship(["advise", "-f", "-", *args])
    assert ended.value.code == advise.EXIT_USAGE
    assert words in capsys.readouterr().err


def test_a_missing_or_binary_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tightship(["advise", "-f", str(tmp_path / "none.yaml")]) == advise.EXIT_USAGE
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert tightship(["advise", "-f", str(tmp_path / "binary")]) == advise.EXIT_USAGE


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tightship", "advise", "-f", write(tmp_path, make_profile()), "--itl", "2ms"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == advise.EXIT_INFEASIBLE
    assert "no batch meets the SLO" in done.stdout


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        "-m",
        "tightship",
        "advise",
        "-f",
        write(tmp_path, make_profile()),
        "--itl",
        "15ms",
    ]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# What the operator decides by.


def test_an_unresolved_statistic_is_not_used() -> None:
    points = make_points()
    points[2] |= {"interTokenLatency": {"mean": "13.89ms", "p99": "14ms"}, "unresolved": ["p99"]}
    point = decide.curve_from_profile(make_profile(points=points)).at(96)
    assert point is not None
    assert (point.inter_token_latency.mean, point.inter_token_latency.p99) == (0.01389, None)


def test_a_cpu_pack_is_bound_by_its_cores_and_its_own_memory() -> None:
    profile = make_profile(make_memory())
    accelerator = {"device": "cpu", "cores": 7, "coresPerReplica": 2, "memory": "100Gi"}
    profile["spec"] = {"key": {"accelerator": accelerator}}
    objectives = decide.objectives_from_api([ApiObjective(metric="InterTokenLatency", max="16ms")])

    answer = decide.decision_from_profile(profile, objectives)

    assert (answer.batch, answer.replicas) == (96, 3)
    small = {**profile, "spec": {"key": {"accelerator": accelerator | {"memory": "30Gi"}}}}
    assert decide.decision_from_profile(small, objectives).replicas == 2


@pytest.mark.parametrize("missing", ["nonKV", "kvBytesPerToken", "blockSize", "confirmedBatch"])
def test_a_ledger_is_completed_from_what_is_there(missing: str) -> None:
    ledger = decide.ledger_from_profile(make_profile(make_memory(**{missing: None})))
    assert ledger is not None
    assert (ledger.non_kv, ledger.kv_bytes_per_token, ledger.block_size) == (4 * GIB, 196_608, 16)


def test_context_lengths_come_from_the_workload_where_the_profile_has_none() -> None:
    profile = make_profile(make_memory(contextMean=None))
    assert decide.ledger_from_profile(profile) is None
    profile["spec"] = {"key": {"workload": {"inputTokens": 111, "outputTokens": 292}, "engine": {"maxModelLen": 2048}}}
    ledger = decide.ledger_from_profile(profile)
    assert ledger is not None
    assert (ledger.context.mean, ledger.context.assumed, ledger.max_model_len) == (411, True, 2048)
