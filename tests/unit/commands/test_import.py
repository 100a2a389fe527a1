"""`tightship import vllm-bench`: which files are read, how runs become points, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tightship.__main__ import main as tightship
from tightship.api import crds
from tightship.api.units import parse_duration
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.validation import lengths_digest, parse_service, profile_key
from tightship.commands import subject, vllm_bench
from tightship.commands.manifest import InputError
from tightship.core.curve import Metric, Objective, Statistic
from tightship.decide import decision_from_profile

SAMPLES = Path(__file__).resolve().parents[3] / "docs" / "samples"
SCHEMA = crds.definitions()["batchprofiles"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
KEY = ("--image", "vllm/vllm-openai:v0.33.0", "--product", "NVIDIA-H100-80GB-HBM3")


def result(batch: int | None, **changes: Any) -> dict[str, Any]:
    """What `vllm bench serve --save-result` of vLLM 0.33 writes, for a run of `30 batch` requests of 100 tokens in and 200 out."""
    requests = 30 * (batch or 1)
    seconds = requests / (2.0 * (batch or 1) ** 0.7)
    return {
        "date": "20261120-101500", "endpoint_type": "openai", "backend": "openai", "label": None,
        "model_id": "facebook/opt-1.3b", "tokenizer_id": "facebook/opt-1.3b", "num_prompts": requests,
        "request_rate": "inf", "burstiness": 1.0, "max_concurrency": batch,
        "duration": seconds, "completed": requests, "failed": 0,
        "total_input_tokens": 100 * requests, "total_output_tokens": 200 * requests,
        "request_throughput": requests / seconds, "request_goodput": None, "output_throughput": 200 * requests / seconds,
        "total_token_throughput": 300 * requests / seconds, "max_output_tokens_per_s": 1.0, "max_concurrent_requests": batch,
        "rtfx": 0.0, "mean_ttft_ms": 40.0, "median_ttft_ms": 35.0, "std_ttft_ms": 3.0, "p99_ttft_ms": 90.0,
        "mean_tpot_ms": 9.0, "median_tpot_ms": 9.0, "std_tpot_ms": 1.0, "p99_tpot_ms": 12.0,
        "mean_itl_ms": 10.0 + (batch or 0), "median_itl_ms": 9.0 + (batch or 0), "std_itl_ms": 1.0, "p99_itl_ms": 30.0,
    } | changes  # fmt: skip


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def imported(folder: Path, *words: str) -> dict[str, Any]:
    """The manifest that comes of it, checked against the CRD."""
    output = folder.parent / "profile.yaml"
    assert tightship(["import", "vllm-bench", str(folder), "-o", str(output), "--force", *words]) == 0
    document: dict[str, Any] = yaml.safe_load(output.read_text())
    jsonschema.validate(document, SCHEMA)
    return document


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three runs, as single benchmarks leave them."""
    folder = tmp_path / "results"
    for batch in (1, 8, 64):
        write(folder / f"openai-infqps-concurrency{batch}-opt-1.3b-20261120.json", result(batch))
    return folder


def test_single_benchmarks(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = imported(results, *KEY, "--itl", "30ms")
    points = document["spec"]["results"]["points"]
    assert points[1] == {
        "batch": 8,
        "requestsPerSecond": "8.574",
        "outputTokensPerSecond": "1714.8",
        "totalTokensPerSecond": "2572.3",
        "interTokenLatency": {"mean": "18ms", "p50": "17ms", "p99": "30ms"},
        "timeToFirstToken": {"mean": "40ms", "p50": "35ms", "p99": "90ms"},
        "requests": 240,
        "window": "27.991s",
    }
    assert [point["batch"] for point in points] == [1, 8, 64]
    key = document["spec"]["key"]
    assert (key["model"], key["workload"]) == (
        {"source": "hf://facebook/opt-1.3b"},
        {"inputTokens": 100, "outputTokens": 200},
    )
    said = capsys.readouterr()
    assert "batch 8: 2572 tokens/s, mean InterTokenLatency 18ms (SLO 30ms); SLO binds" in said.out
    notes = document["metadata"]["annotations"][labels.ANNOTATION_NOTES].splitlines()
    assert notes == [
        "finite runs: T is low by about 1/(1 + B/N) since a run ends with fewer and fewer in flight; most at batch 1 with 30 requests: 3 %",
        "memory and preemptions are unknown: one replica is advised until `tightship profile` has measured it",
    ]
    assert all(f"note: {note}" in said.err for note in notes)


def test_a_sweep_that_varied_the_server(tmp_path: Path) -> None:
    """`vllm bench sweep serve --serve-params`: its parameters are in every run's file, its summaries repeat the runs."""
    folder = tmp_path / "results" / "20261120_101500"
    for rows in (1, 16):
        runs = [result(64, **{"max-num-seqs": rows}, run_number=number, duration=10.0 + number) for number in range(3)]
        base = folder / f"SERVE--max_num_seqs={rows}"
        for number, one in enumerate(runs):
            write(base / f"run={number}.json", one)
        write(base / "summary.json", runs)
        write(base / "warmup.json", result(64, **{"max-num-seqs": rows}, duration=1.0))
        write(base / "run=3.failure.json", {"run_number": 3, "error_type": "RuntimeError", "error": "boom"})
    document = imported(tmp_path / "results", *KEY)
    points = document["spec"]["results"]["points"]
    assert [(point["batch"], point["requests"], point["window"]) for point in points] == [
        (1, 5760, "33s"),
        (16, 5760, "33s"),
    ]
    assert points[0]["totalTokensPerSecond"] == f"{300 * 5760 / 33:.1f}"
    assert not any("timeToFirstToken" in point for point in points)
    notes = document["metadata"]["annotations"][labels.ANNOTATION_NOTES]
    assert (
        "batch 1, 16: more requests were sent than ran, so time to first token holds queueing and is left out" in notes
    )
    assert "batch 1, 16: 3 runs pooled; percentiles are means of theirs" in notes


def test_runs_of_one_batch_are_pooled_by_time_and_requests(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write(
        folder / "a.json",
        result(8, completed=100, num_prompts=100, duration=10.0, total_output_tokens=1000, mean_itl_ms=10.0),
    )
    write(
        folder / "b.json",
        result(8, completed=300, num_prompts=310, duration=50.0, total_output_tokens=5000, mean_itl_ms=20.0),
    )
    (point,) = imported(folder, *KEY)["spec"]["results"]["points"]
    assert point["outputTokensPerSecond"] == "100"
    assert point["interTokenLatency"]["mean"] == "17.5ms"
    assert (point["requests"], point["requestsPerSecond"]) == (400, "6.667")


def test_results_appended_to_one_file(tmp_path: Path) -> None:
    file = write(tmp_path / "all.json", result(1), result(4))
    points = imported(file, *KEY)["spec"]["results"]["points"]
    assert [point["batch"] for point in points] == [1, 4]


def test_what_finite_runs_cost_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write(folder / "a.json", result(64, num_prompts=200, completed=190))
    write(folder / "b.json", result(256, num_prompts=300, completed=300))
    notes = imported(folder, *KEY)["metadata"]["annotations"][labels.ANNOTATION_NOTES].splitlines()
    assert "most at batch 256 with 300 requests: 46 %" in notes[0]
    assert notes[1] == "batch 64, 256: fewer than 30 requests for each in flight; --num-prompts 7680 would do"
    assert notes[2].startswith("batch 256: with so few requests that many were hardly ever in flight")
    assert notes[3] == f"requests that failed: {folder / 'a.json'} 10 of 200"
    assert notes[4] == "batch 1 is missing: without T(1) the efficiency floor isn't evaluated"


def test_the_key_of_a_manifest(results: Path) -> None:
    file = SAMPLES / "llmservice-opt.yaml"
    document = imported(results, "-f", str(file))
    assert document["spec"]["key"]["hash"] == profile_key(parse_service(yaml.safe_load(file.read_text())).spec).hash
    assert document["spec"]["measurement"]["objectives"] == [
        {"metric": "InterTokenLatency", "statistic": "mean", "max": "30ms"}
    ]


@pytest.mark.parametrize(
    ("records", "words", "said"),
    [
        ({"a.json": result(None)}, KEY, "a.json: says neither max_concurrency nor max_num_seqs, so the batch is unknown"),
        ({"a.json": result(8), "b.json": result(8, model_id="x/y")}, KEY, "runs of 2 models are no one curve: facebook/opt-1.3b in "),
        ({"a.json": result(8, request_rate=4.0)}, KEY, "a.json: requests arrived at a rate of 4.0/s"),
        ({"a.json": result(8, spec_decode_acceptance_rate=0.7)}, KEY, "a.json: ran with speculative decoding"),
        ({"a.json": result(8, completed=0)}, KEY, "a.json: no request was completed"),
        ({"a.json": result(8, duration=None)}, KEY, "a.json: duration is None, not a number"),
        ({"a.json": result(8, duration=10**400)}, KEY, "a.json: duration is 1000"),
        ({"a.json": result(8, duration=float("nan"))}, KEY, "a.json: duration is nan, not a number from 0 to 1e+12"),
        ({"a.json": result(8, mean_itl_ms=1e300)}, KEY, "a.json: mean_itl_ms is 1e+300, not a number"),
        ({"a.json": result(8, num_prompts="many")}, KEY, "a.json: num_prompts is 'many', not a number"),
        ({"a.json": result(8, max_concurrency=2_000_000)}, KEY, "a.json: max_concurrency is 2000000, not a whole number"),
        ({"a.json": result(8, max_concurrency=1.5)}, KEY, "a.json: max_concurrency is 1.5, not a whole number"),
        ({"a.json": {"something": "else"}, "b.json": [1, 2]}, KEY, "none of 2 JSON files is a result of"),
        ({}, KEY, "none of 0 JSON files"),
        ({"a.json": result(8)}, ("--product", "H"), "--image must be given, or -f"),
        ({"a.json": result(8)}, ("--image", "i"), "--product: device cuda needs the node label"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], records: dict[str, Any], words: tuple[str, ...], said: str
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, record in records.items():
        write(folder / name, record)
    assert tightship(["import", "vllm-bench", str(folder), *words]) == vllm_bench.EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"a": ', "a.json: not JSON (cut short?)"), ("[" * 100_000, "a.json: not JSON"), ("\xff", "a.json: not JSON")],
)
def test_a_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert tightship(["import", "vllm-bench", str(tmp_path), *KEY]) == vllm_bench.EXIT_USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2\n3,x\n", "is no number of tokens"),
        ("[[1, 2], [3]]", "is no request"),
        ("{\n", "is no JSON"),
        ("", "there is no request in it"),
    ],
)
def test_lengths_that_could_not_be_measured_with_are_refused_in_the_same_words(
    results: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = results.parent / "lengths"
    file.write_text(text)
    words = ["--lengths", str(file), *KEY]
    assert tightship(["import", "vllm-bench", str(results), *words]) == vllm_bench.EXIT_USAGE
    error = capsys.readouterr().err
    with pytest.raises(InputError) as refused:
        subject.check_lengths(file)
    assert error == f"tightship import vllm-bench: {refused.value}\n"
    assert f"--lengths {file}: " in error
    assert said in error


def test_lengths_of_the_runs_are_in_the_key_by_what_is_in_them(results: Path) -> None:
    file = results.parent / "lengths"
    file.write_text("100,200\n")
    document = imported(results, "--lengths", str(file), *KEY)
    assert document["spec"]["key"]["workload"] == {"lengthsDigest": lengths_digest("100,200\n")}


def test_a_directory_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert tightship(["import", "vllm-bench", "/nowhere/results", *KEY]) == vllm_bench.EXIT_USAGE
    assert "/nowhere/results: no such directory" in capsys.readouterr().err


def test_an_existing_profile_is_not_overwritten_unasked(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = results.parent / "profile.yaml"
    output.write_text("precious")
    assert tightship(["import", "vllm-bench", str(results), *KEY, "-o", str(output)]) == vllm_bench.EXIT_USAGE
    assert "profile.yaml exists: overwrite it with --force" in capsys.readouterr().err
    assert output.read_text() == "precious"


def test_the_papers_runs_give_the_papers_batch(tmp_path: Path, paper_data: Path) -> None:
    """What the paper published is what vLLM's benchmark wrote, one run for each max_num_seqs."""
    sweep = json.loads((paper_data / "sweep" / "opt-1.3b_sharegpt.json").read_text())
    folder = tmp_path / "results"
    for one in sweep["points"]:
        write(
            folder / f"SERVE--max_num_seqs={one['max_num_seqs']}" / "run=0.json",
            {**one, "model_id": "facebook/opt-1.3b"},
        )
    document = imported(folder, "--image", "vllm/vllm-openai:v0.6.0", "--product", "NVIDIA-H100-64GB")
    points = {point["batch"]: point for point in document["spec"]["results"]["points"]}
    assert (points[96]["totalTokensPerSecond"], points[96]["requests"]) == ("9032.8", 2000)
    assert document["spec"]["key"]["workload"] == {"inputTokens": 111, "outputTokens": 292}
    assert "timeToFirstToken" not in points[96]
    strict = 2 * parse_duration(points[32]["interTokenLatency"]["mean"])
    answer = decision_from_profile(document, [Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, strict)])
    assert (answer.batch, answer.floor_evaluated) == (96, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--name", "My Profile"), "'My Profile' is no name that Kubernetes takes"),
        (("--name", "a..b"), "'a..b' is no name that Kubernetes takes"),
        (("--namespace", "team.models"), "'team.models' is no namespace"),
    ],
)
def test_a_name_that_no_cluster_takes_is_refused_at_once(
    results: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        tightship(["import", "vllm-bench", str(results), *KEY, *words])
    assert exit_status.value.code == vllm_bench.EXIT_USAGE
    assert said in capsys.readouterr().err


def test_a_model_too_long_for_a_path_is_refused_in_words(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        tightship(["import", "vllm-bench", str(results), *KEY, "--model", f"a/{'x' * 5000}"]) == vllm_bench.EXIT_USAGE
    )
    assert "--model: String should have at most 512 characters" in capsys.readouterr().err
