"""`tightship predict`: what it reads, what it says, how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tightship.__main__ import main as tightship
from tightship.api.units import parse_duration
from tightship.commands import predict

# OPT-1.3B on one H100 64 GB (arXiv:2503.08311, published raw runs): batch, total tokens/s, mean ITL in ms, share of GPU time.
ROWS = [(1, 381.4, 3.623, 0.865), (32, 5734.1, 7.51, 0.643), (96, 9032.8, 13.89, 0.575), (256, 10809.8, 29.27, 0.548)]
MEMORY = {
    "confirmedBatch": 96,
    "deviceTotal": "64Gi",
    "blockSize": 16,
    "kvBytesPerToken": 196_608,
    "kvCacheTokens": 51_200,
    "kvCache": "9600Mi",
    "nonKV": "4Gi",
    "contextMean": "411",
    "contextStd": "312",
}


def make_profile(**status: Any) -> dict[str, Any]:
    points = [
        {
            "batch": batch,
            "totalTokensPerSecond": str(throughput),
            "interTokenLatency": {"mean": f"{itl}ms"},
            "gpuUtilization": str(utilization),
        }
        for batch, throughput, itl, utilization in ROWS
    ]
    return {"kind": "BatchProfile", "metadata": {"name": "opt"}, "status": {"points": points, **status}}


def write(folder: Path, profile: dict[str, Any]) -> str:
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(profile))
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], file: str, batch: int, replicas: int, *args: str) -> tuple[int, Any]:
    status = tightship(["predict", "-f", file, "--batch", str(batch), "--replicas", str(replicas), "-o", "json", *args])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("batch", "replicas", "itl", "total"),
    [(96, 2, 18.98, 12313.9), (96, 4, 31.52, 13172.4), (256, 2, 37.07, 14669.5)],
)
def test_published_packings_are_predicted(  # noqa: PLR0917
    batch: int, replicas: int, itl: float, total: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published runs are of 2,000 requests, whose draining lowers the throughput."""
    status, answer = ask(capsys, write(tmp_path, make_profile()), batch, replicas)

    assert status == 0
    drain = (1 + batch / 2000) / (1 + replicas * batch / 2000)
    assert answer["interTokenLatencySeconds"] == pytest.approx(itl / 1000, rel=0.05)
    assert parse_duration(answer["interTokenLatency"]) == pytest.approx(answer["interTokenLatencySeconds"], rel=1e-5)
    assert answer["totalTokensPerSecond"] * drain == pytest.approx(total, rel=0.10)
    assert (answer["memory"], answer["trial"], answer["corrected"]) == (None, None, None)


def test_it_is_a_command_and_reads_imported_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = make_profile()
    profile["spec"] = {"results": profile.pop("status")}
    assert tightship(["predict", "-f", write(tmp_path, profile), "--batch", "96", "--replicas", "4"]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out
    assert "2.31 x as long as alone" in out
    assert "whether the replicas fit is not known" in out


def test_the_help_tells_every_key_of_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = ask(capsys, write(tmp_path, make_profile()), 96, 4)
    with pytest.raises(SystemExit):
        tightship(["predict", "--help"])
    explained = capsys.readouterr().out.partition("-o json is")[2]
    told = {
        word for line in explained.splitlines() if line.startswith("  ") for word in line[:27].replace(",", " ").split()
    }
    assert set(answer) - told == {"batch", "replicas"}, "only the question itself needs no explanation"


def test_one_replica_is_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = ask(capsys, write(tmp_path, make_profile()), 96, 1)
    assert (answer["totalTokensPerSecond"], answer["interTokenLatency"], answer["slowdown"]) == (9032.8, "13.89ms", 1)


def test_between_two_points_it_says_interpolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = ask(capsys, write(tmp_path, make_profile()), 64, 2)
    assert answer["interpolated"] is True
    assert any("batch 64 was not measured" in note for note in answer["notes"])


def test_a_trial_of_the_pair_stands_beside_its_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = {
        "batch": 96,
        "replicas": 2,
        "totalTokensPerSecond": "12313.9",
        "interTokenLatency": {"mean": "18.98ms"},
    }
    file = write(tmp_path, make_profile(trials=[trial]))
    _, tried = ask(capsys, file, 96, 2)
    measured = {"interTokenLatency": "18.98ms", "interTokenLatencySeconds": 0.01898, "totalTokensPerSecond": 12313.9}
    assert tried["trial"] == measured
    assert tried["corrected"]["totalTokensPerSecond"] == pytest.approx(12313.9)

    _, other = ask(capsys, file, 256, 2)
    assert other["trial"] is None
    ratio = 12313.9 / tried["totalTokensPerSecond"]
    assert other["corrected"]["totalTokensPerSecond"] == pytest.approx(ratio * other["totalTokensPerSecond"])

    tightship(["predict", "-f", file, "--batch", "96", "--replicas", "2"])
    out = capsys.readouterr().out
    assert [line.split()[4:] for line in out.splitlines()[1:5]] == [
        ["alone"], ["predicted"], ["corrected", "by", "trials"], ["measured"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "replicas", "reserve", "fits", "effective"),
    [
        (96, 4, "5%", True, 96),
        (96, 4, "15Gi", False, 96),  # 49 GiB / 4 - 4 GiB are 45,056 tokens: enough on average, not with the margin
        (96, 4, "20Gi", False, 93.0),
        (256, 4, "5%", False, 148.8),
        (96, 8, "5%", False, 47.8),
    ],
)
def test_memory_tells_whether_replicas_fit_and_limits_the_batch(  # noqa: PLR0917
    batch: int,
    replicas: int,
    reserve: str,
    fits: bool,
    effective: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path, make_profile(memory=MEMORY))
    status, answer = ask(capsys, file, batch, replicas, "--memory-reserve", reserve)
    assert (status, answer["memory"]["fits"]) == (0, fits)
    assert answer["batchEffective"] == pytest.approx(effective, abs=0.1)
    assert any("with an equal share each has a KV cache" in note for note in answer["notes"]) is not fits


def test_replicas_that_cannot_run_end_with_3_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = ask(capsys, write(tmp_path, make_profile(memory=MEMORY)), 96, 16)
    assert (status, answer["totalTokensPerSecond"]) == (predict.EXIT_INSUFFICIENT_MEMORY, None)
    assert "16 replicas can't run" in answer["notes"][0]


def test_cores_of_their_own_do_not_contend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = make_profile() | {"spec": {"key": {"accelerator": {"device": "cpu"}}}}
    _, answer = ask(capsys, write(tmp_path, profile), 96, 4)
    assert answer["totalTokensPerSecond"] == pytest.approx(4 * 9032.8)
    assert any("cores of their own" in note for note in answer["notes"])


def without(name: str) -> dict[str, Any]:
    profile = make_profile()
    for point in profile["status"]["points"]:
        del point[name]
    return profile


@pytest.mark.parametrize(
    ("profile", "args", "words"),
    [
        (make_profile(), ["--batch", "257"], "batch 257 lies outside the curve"),
        (without("gpuUtilization"), [], "no point of the curve has gpuUtilization"),
        (make_profile(points=[]), [], "the profile holds no points"),
        ({"kind": "Pod"}, [], "holds Pod, no BatchProfile"),
        (make_profile(trials=[{"batch": 3}]), [], "status.trials[0] needs batch and replicas"),
    ],
)
def test_wrong_files_end_with_2_in_words(
    profile: dict[str, Any], args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        tightship(["predict", "-f", write(tmp_path, profile), "--batch", "96", "--replicas", "2", *args])
        == predict.EXIT_USAGE
    )
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--batch", "0"], ["--replicas", "many"], ["--memory-reserve", "120%"], ["-o", "xml"]]
)
def test_wrong_options_end_with_2_in_words(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tightship(["predict", "-f", "-", "--batch", "96", "--replicas", "2", *args])
    assert ended.value.code == predict.EXIT_USAGE
    assert args[1] in capsys.readouterr().err
