"""`tightship profile` up to the first engine, and what it writes: keys, refusals, files, the bar. Whole runs: tests/sandbox."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import stat
import sys
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tightship.__main__ import main as tightship
from tightship.__main__ import parser
from tightship.api import crds
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.validation import lengths_digest, parse_service, profile_key
from tightship.commands import profile
from tightship.commands.manifest import InputError
from tightship.commands.progress import ProgressBar, render
from tightship.profiler import __main__ as profiler
from tightship.profiler.clock import SystemClock
from tightship.profiler.errors import ReportError
from tightship.profiler.gpu import CpuDevice
from tightship.profiler.job import make_job

SAMPLES = Path(__file__).resolve().parents[3] / "docs" / "samples"
GPU = "NVIDIA H100 80GB HBM3"
SCHEMA = crds.definitions()["batchprofiles"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


class FakeNvml(types.ModuleType):
    """The driver's library, on a machine that has no GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, products: list[str], used: int = 0) -> None:
        super().__init__("pynvml")
        self.products = products
        self.used = used

    def nvmlInit(self) -> None:
        if not self.products:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.products)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.products):
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(total=80 << 30, used=self.used)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.products[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own, and no GPU unless the test brings one."""
    monkeypatch.chdir(tmp_path)
    gpus(monkeypatch)
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def gpus(monkeypatch: pytest.MonkeyPatch, *products: str, used: int = 0) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(list(products), used))


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter with a vLLM, as far as the question for its version goes."""
    return interpreter(tmp_path, "echo INFO something; echo version=0.33.0+cpu")


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python-with-vllm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def options(*words: str) -> argparse.Namespace:
    return parser("profile").parse_args(["profile", *words])


def plan(*words: str) -> profile.Plan:
    return profile.make_plan(options(*words), dict(os.environ))


# --- what is measured ---


def test_a_manifest_gives_the_key_that_its_service_has(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, GPU)
    file = str(SAMPLES / "llmservice-opt.yaml")
    made = plan("-f", file, "--python", python, "--budget", "3m")
    service = parse_service(yaml.safe_load(Path(file).read_text()))
    key = profile_key(service.spec)
    assert made.profile.spec.key == key
    assert made.profile.metadata.name == f"opt-1-3b-{key.hash[:10]}"
    assert made.profile.metadata.labels == {labels.PROFILE_KEY: labels.key_value(key.hash)}
    how = made.profile.spec.measurement
    assert (how.budget, how.objectives[0].max, how.max_replicas_per_gpu) == ("3m", "30ms", 2)
    assert made.environ["TIGHTSHIP_MODEL_PATH"] == "facebook/opt-1.3b"
    assert made.environ["TIGHTSHIP_DEVICE"] == "cuda"
    assert made.notes == []


def test_a_model_on_a_volume_lies_somewhere_here(python: str, tmp_path: Path) -> None:
    document = yaml.safe_load((SAMPLES / "llmservice-cpu.yaml").read_text())
    document["spec"]["accelerator"] |= {"cores": 1, "coresPerReplica": 1}
    file = tmp_path / "llm.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(
        InputError, match=r"pvc://models/small-llama, a volume of the cluster: say where it is here with --model"
    ):
        plan("-f", str(file), "--python", python)
    made = plan("-f", str(file), "--model", str(tmp_path), "--python", python)
    assert made.profile.spec.key == profile_key(parse_service(document).spec)
    assert made.environ["TIGHTSHIP_MODEL_PATH"] == str(tmp_path)
    assert made.environ["TIGHTSHIP_DEVICE_MEMORY"] == str(8 << 30)
    assert made.cores == frozenset({min(os.sched_getaffinity(0))})
    (note,) = made.notes
    assert "vllm-cpu:0.32.0" in note
    assert "0.33.0" in note


def test_options_and_this_machine_give_a_key(python: str, tmp_path: Path) -> None:
    (tmp_path / "Tiny.Llama").mkdir()
    made = plan(
        *("--model", "Tiny.Llama", "--engine-arg=--dtype=bfloat16", "--engine-arg=--enforce-eager", "--engine-env", "A=b=c"),
        *("--max-model-len", "512", "--input-tokens", "64", "--output-tokens", "32", "--itl", "0.1s", "--python", python),
        *("--memory", "8Gi", "--name", "tiny", "-n", "models", "--minimum-gain", "1.2"),
    )  # fmt: skip
    key, how = made.profile.spec.key, made.profile.spec.measurement
    assert key.model.source == f"file://{tmp_path}/Tiny.Llama"
    assert key.engine.image == "vllm/vllm-openai-cpu:v0.33.0"
    assert key.engine.args == ["--dtype=bfloat16", "--enforce-eager"]
    assert [each.to_dict() for each in key.engine.env] == [{"name": "A", "value": "b=c"}]
    assert (made.environ["A"], key.engine.max_model_len) == ("b=c", 512)
    cores = len(os.sched_getaffinity(0))
    assert key.accelerator.to_dict() == {"device": "cpu", "cores": cores, "coresPerReplica": cores, "memory": "8Gi"}
    assert key.workload.to_dict() == {"inputTokens": 64, "outputTokens": 32}
    assert [each.to_dict() for each in how.objectives] == [
        {"metric": "InterTokenLatency", "statistic": "mean", "max": "100ms"}
    ]
    assert (how.budget, how.minimum_gain) == ("20m", "1.2")
    assert (made.profile.metadata.name, made.profile.metadata.namespace) == ("tiny", "models")


def test_lengths_are_in_the_key_by_what_is_in_them(python: str, tmp_path: Path) -> None:
    text = "10,20\n30,40\n"
    (tmp_path / "chat.csv").write_text(text)
    made = plan("--model", "a/b", "--lengths", "chat.csv", "--python", python)
    assert made.profile.spec.key.workload.to_dict() == {"lengthsDigest": lengths_digest(text)}
    assert made.environ["TIGHTSHIP_LENGTHS_FILE"] == str(tmp_path / "chat.csv")
    source = made.profile.spec.measurement.lengths_from
    assert source is not None
    assert (source.config_map.name, source.config_map.key) == ("b-lengths", "chat.csv")


@pytest.mark.parametrize(
    ("asked", "visible", "number"),
    [
        ((), None, None),
        (("--gpu", "1"), None, "1"),
        (("--gpu", "1"), "0", "1"),
        ((), "1,0", "1"),
        ((), "GPU-1", "1"),  # vLLM reads numbers alone
    ],
)
def test_nvml_and_cuda_mean_the_same_gpu(
    python: str, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], visible: str | None, number: str | None
) -> None:
    gpus(monkeypatch, "NVIDIA A", GPU)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = plan("--model", "a/b", "--input-tokens", "9", "--output-tokens", "9", "--python", python, *asked)
    assert made.profile.spec.key.accelerator.product == ("NVIDIA-A" if number is None else "NVIDIA-H100-80GB-HBM3")
    assert made.environ.get("CUDA_VISIBLE_DEVICES") == number
    assert made.environ.get("NVIDIA_VISIBLE_DEVICES") == (None if number is None else "GPU-1")


@pytest.mark.parametrize(
    ("asked", "visible", "said"),
    [
        (("--gpu", "2"), None, "--gpu 2: there are 2 GPUs here, counted from 0"),
        (("--gpu", "-1"), None, "--gpu -1: there are 2 GPUs here"),
        ((), "7,1", "CUDA_VISIBLE_DEVICES=7,1: there are 2 GPUs here"),
        ((), "GPU-9", "CUDA_VISIBLE_DEVICES=GPU-9: there are 2 GPUs here"),
    ],
)
def test_a_gpu_that_is_not_there(
    python: str, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], visible: str | None, said: str
) -> None:
    gpus(monkeypatch, GPU, GPU)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InputError, match=said):
        plan("--model", "a/b", *MEANS, "--python", python, *asked)


def test_without_lengths_the_published_workload_is_measured_and_that_is_said(
    python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan("--model", "a/b", "--engine-arg=--dtype=float16", "--budget", "10m", "--python", python)
    workload = made.profile.spec.key.workload
    assert (workload.input_tokens, workload.output_tokens) == (111, 292)
    assert [
        note for note in made.notes if note.startswith("no lengths were given: requests have 111 tokens in and 292 out")
    ]
    assert not plan("--model", "a/b", *MEANS, "--python", python).notes

    with pytest.raises(SystemExit):
        tightship(["profile", "--help"])
    assert "requests have 111 tokens in and 292 out" in capsys.readouterr().out


def test_a_gpu_that_others_use_is_mentioned(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, GPU, used=5 << 30)
    made = plan("--model", "a/b", "--input-tokens", "9", "--output-tokens", "9", "--python", python)
    assert made.notes == ["others use 5Gi of this GPU: what is measured beside them means little (nvidia-smi)"]


MEANS = ("--input-tokens", "9", "--output-tokens", "9")
OPT = str(SAMPLES / "llmservice-opt.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (MEANS, "--model must be given, or -f with an LLMService manifest"),
        (("--model", "a/" * 3000, *MEANS), r"--model (a/)+a?\.\.\.: neither a directory here nor ORGANISATION/NAME"),
        (("-f", OPT, "--model", "a" * 5000), "--device cpu measures vLLM's CPU back end"),
        (("--model", "a/b", *MEANS, "-o", "a" * 300), r"a\.\.\.: File name too long"),
        (("--model", "a/b/c", *MEANS), "--model a/b/c: neither a directory here nor ORGANISATION/NAME"),
        (("--model", "a/b", "--input-tokens", "9"), "--input-tokens, --output-tokens or --lengths: give both"),
        (("--model", "a/b", "--output-tokens", "9"), "--input-tokens, --output-tokens or --lengths: give both"),
        (("--model", "a/b", *MEANS, "--lengths", "x.csv"), "--lengths x.csv: No such file"),
        (("--model", "a/b", *MEANS, "--lengths", __file__), "leave --input-tokens and --output-tokens out"),
        (("--model", "a/b", "--lengths", __file__), "--lengths .*test_profile.py: "),
        (("--model", "a/b", *MEANS, "--engine-arg=--max-num-seqs=8"), "--engine-arg: '--max-num-seqs=8': refused engine argument"),
        (("--model", "a/b", *MEANS, "--engine-arg=-tp=2"), "--engine-arg: '-tp=2': an engine of this version runs on one GPU"),
        (("--model", "a/b", *MEANS, "--engine-env", "PYTHONPATH=x"), "--engine-env: PYTHONPATH is set by Tightship itself"),
        (("--model", "a/b", *MEANS, "--cores", "1", "--cores-per-replica", "2"), "--cores-per-replica: 2 cores for a replica exceed"),
        (("--model", "a/b", *MEANS, "--cores", "999"), "a replica has 999 cores, and this process may use"),
        (("--model", "a/b", *MEANS, "--memory", "much"), "not a quantity"),
        (("--model", "a/b", *MEANS, "--device", "cuda"), "--device cuda: NVML can't read the GPU"),
        (("--model", "pvc://claim/x", *MEANS), "a volume of the cluster: say where it is here with --model DIRECTORY"),
        (("-f", OPT, "--engine-arg=--dtype=auto", "--image", "i"), "--image, --engine-arg: .*llmservice-opt.yaml says that already"),
        (("-f", OPT), "--device cpu measures vLLM's CPU back end"),
        (("-f", OPT, "--engine-env", "A=1"), "--engine-env A: the manifest says what the engine's environment is"),
        (("-f", OPT, "--lengths", __file__), "--lengths: the manifest's workload has mean lengths"),
        (("-f", "nothing.yaml"), "nothing.yaml: No such file"),
        (("-f", str(SAMPLES / "batchprofile-imported.yaml")), "holds BatchProfile, no LLMService"),
        (("--model", "a/b", *MEANS, "-o", "no/such/p.yaml"), "there is no directory"),
        (("--model", "a/b", *MEANS, "-o", "-"), "needs a file to go on from"),
        (("--resume",), "--resume: there is no profile.yaml to go on with"),
        (("--model", "a/b", *MEANS, "--statistic", "p95"), "--statistic p95 is of no bound"),
        (("--model", "a/b", *MEANS, "--statistic", "p95", "--itl", "p50:9ms"), "--statistic p95 is of no bound"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(
    python: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert tightship(["profile", *words, "--python", python]) == profile.USAGE
    error = capsys.readouterr().err
    assert error.startswith("tightship profile: ")
    assert len(error.strip().splitlines()) == 1
    with pytest.raises(InputError, match=said):
        plan(*words, "--python", python)


def test_another_gpu_than_the_manifests_is_refused_unless_confirmed(
    python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, "NVIDIA A100-SXM4-80GB")
    with pytest.raises(InputError, match="is for NVIDIA-H100-80GB-HBM3, but this machine has a NVIDIA-A100-SXM4-80GB"):
        plan("-f", OPT, "--python", python)
    made = plan("-f", OPT, "--python", python, "--product", "NVIDIA-H100-80GB-HBM3")
    assert made.profile.spec.key.accelerator.product == "NVIDIA-H100-80GB-HBM3"


def test_variables_from_the_cluster_are_given_here(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, GPU)
    document = yaml.safe_load(Path(OPT).read_text())
    secret = {"name": "HF_TOKEN_X", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    document["spec"]["template"] = {"spec": {"engine": {"env": [secret, {"name": "A", "value": "1"}]}}}
    file = tmp_path / "llm.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="HF_TOKEN_X: the manifest takes it from the cluster; give it here"):
        plan("-f", str(file), "--python", python)
    with pytest.raises(InputError, match="--engine-env A: the manifest says"):
        plan("-f", str(file), "--python", python, "--engine-env", "A=2", "--engine-env", "HF_TOKEN_X=t")
    made = plan("-f", str(file), "--python", python, "--engine-env", "HF_TOKEN_X=t")
    assert (made.environ["HF_TOKEN_X"], made.environ["A"]) == ("t", "1")
    assert made.profile.spec.key == profile_key(parse_service(document).spec)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo \"ModuleNotFoundError: No module named 'vllm'\" >&2; exit 1",
            "can't import vLLM .ModuleNotFoundError.*--python",
        ),
        ("exit 0", "can't import vLLM .it said nothing."),
        (None, "--python .*: No such file or directory; install it there"),
    ],
)
def test_an_interpreter_without_vllm(tmp_path: Path, script: str | None, said: str) -> None:
    python = str(tmp_path / "none") if script is None else interpreter(tmp_path, script)
    with pytest.raises(InputError, match=said):
        plan("--model", "a/b", *MEANS, "--python", python)


# --- the file ---


def status(**more: Any) -> dict[str, Any]:
    """A status as the profiler reports it."""
    points = [
        {
            "batch": batch,
            "totalTokensPerSecond": f"{100 * batch**0.8:.1f}",
            "interTokenLatency": {"mean": f"{10 + batch}ms"},
            "unresolved": [],
        }
        for batch in (4, 1, 2)
    ]
    progress = {"stage": "Sweeping", "batch": 8, "points": 3, "elapsed": "20s", "message": "measuring batch 8"}
    return {
        "gpu": {"product": "cpu", "memory": "8Gi"},
        "points": points,
        "progress": progress,
        "gpuSeconds": "20",
    } | more


def outcome(state: str, message: str = "so it went", **more: Any) -> dict[str, Any]:
    return {"state": state, "reason": state, "message": message, **more}


def write(python: str, **more: Any) -> profile.Plan:
    """The file as it stands after a report, and the plan that was followed."""
    made = plan("--model", "a/b", *MEANS, "--itl", "100ms", "--budget", "1m", "--python", python)
    sink = profile.ManifestSink(made.profile, made.output, lambda progress: None)
    asyncio.run(sink.write(status(**more)))
    return made


def test_the_file_is_a_valid_manifest_with_results_and_without_status(python: str) -> None:
    write(python, outcome=outcome("Completed"))
    text = Path("profile.yaml").read_text()
    document = yaml.safe_load(text)
    jsonschema.validate(document, SCHEMA)
    assert "status" not in document
    assert [point["batch"] for point in document["spec"]["results"]["points"]] == [1, 2, 4]
    assert set(document["spec"]["results"]) == {"gpu", "points", "gpuSeconds"}
    read = api.BatchProfile.model_validate(document)
    key = read.spec.key
    parts = {name: getattr(key, name) for name in ("model", "engine", "accelerator", "workload", "resources")}
    assert key.hash == api.ProfileKey.of(**parts).hash
    assert text.startswith("# Measured by `tightship profile`, ")
    assert "Completed: so it went" in text.splitlines()[0]
    assert not list(Path().glob(".*.part"))


def test_nothing_is_written_before_the_first_point(python: str) -> None:
    made = plan("--model", "a/b", *MEANS, "--python", python)
    shown: list[api.Progress] = []
    sink = profile.ManifestSink(made.profile, made.output, shown.append)
    asyncio.run(sink.write(status(points=[])))
    assert [each.stage for each in shown] == ["Sweeping"]
    assert not Path(made.output).exists()


def test_a_file_that_cannot_be_written_ends_the_measurement(python: str) -> None:
    made = plan("--model", "a/b", *MEANS, "--python", python)
    sink = profile.ManifestSink(made.profile, "gone/profile.yaml", lambda progress: None)
    with pytest.raises(ReportError, match=r"gone/profile\.yaml can't be written: No such file"):
        asyncio.run(sink.write(status()))


def test_what_cannot_be_shown_is_kept_all_the_same(python: str) -> None:
    made = plan("--model", "a/b", *MEANS, "--python", python)
    bar = ProgressBar(Closed(), 100)
    sink = profile.ManifestSink(made.profile, made.output, bar.show)
    asyncio.run(sink.write(status()))
    asyncio.run(sink.write(status(outcome=outcome("Completed"))))
    assert "Completed: so it went" in Path(made.output).read_text()


def test_an_existing_file_is_not_overwritten_unasked(python: str) -> None:
    Path("profile.yaml").write_text("precious")
    with pytest.raises(InputError, match=r"profile.yaml exists: go on with it .--resume., overwrite it .--force."):
        plan("--model", "a/b", *MEANS, "--python", python)
    assert plan("--model", "a/b", *MEANS, "--python", python, "--force").profile.status.points == []


# --- going on ---


def test_resume_takes_key_and_points_from_the_file(python: str) -> None:
    before = write(python)
    made = plan("--resume", "--python", python)
    assert made.profile.spec.key == before.profile.spec.key
    assert made.profile.spec.measurement == before.profile.spec.measurement
    assert sorted(point.batch for point in made.profile.status.points) == [1, 2, 4]
    assert (made.profile.status.gpu_seconds, made.profile.status.outcome) == ("20", None)
    assert made.profile.status.progress is not None
    assert made.environ["TIGHTSHIP_MODEL_PATH"] == "a/b"


def test_resume_with_the_same_options_is_the_same_measurement(python: str) -> None:
    write(python)
    made = plan("--model", "a/b", *MEANS, "--resume", "--itl", "50ms", "--budget", "9m", "--python", python)
    assert len(made.profile.status.points) == 3
    assert made.profile.spec.measurement.budget == "9m"
    with pytest.raises(
        InputError, match=r"measured for another key .*inputTokens': 9.* there, .*inputTokens': 10.* here"
    ):
        plan("--model", "a/b", "--input-tokens", "10", "--output-tokens", "9", "--resume", "--python", python)


@pytest.mark.parametrize(
    ("ended", "unfinished", "budget", "again"),
    [
        ("Completed", [], "9m", False),
        ("Completed", ["Confirmation"], "9m", True),
        ("Completed", ["Sweep"], "10s", False),
        ("BudgetExceeded", [], "10s", False),
        ("BudgetExceeded", [], "9m", True),
        ("Failed", [], "10s", True),
    ],
)
def test_what_ended_goes_on_where_there_is_something_to_do(
    python: str, ended: str, unfinished: list[str], budget: str, again: bool
) -> None:
    write(python, outcome=outcome(ended, unfinished=unfinished))
    made = plan("--resume", "--budget", budget, "--python", python)
    assert (made.profile.status.outcome is None) == again


def test_a_finished_profile_is_advised_from_again(python: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(python, outcome=outcome("Completed"))
    assert tightship(["profile", "--resume", "--python", python]) == profile.MEASURED
    said = capsys.readouterr()
    assert "finished already: Completed: so it went" in said.err
    assert "batch 4: 303 tokens/s, mean InterTokenLatency 14ms (SLO 100ms)" in said.out
    assert "tightship advise -f profile.yaml --itl 100ms --explain" in said.err
    assert "kubectl apply -f profile.yaml" in said.err


def test_the_follow_up_asks_what_was_decided(python: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load(Path(OPT).read_text())
    bounds = [("InterTokenLatency", "mean", "100ms"), ("TimeToFirstToken", "p95", "2s")]
    document["spec"]["slo"] = {
        "objectives": [dict(zip(("metric", "statistic", "max"), each, strict=True)) for each in bounds]
    }
    document["spec"]["accelerator"] = {"device": "cpu", "cores": 1, "coresPerReplica": 1, "memory": "8Gi"}
    Path("llm.yaml").write_text(yaml.safe_dump(document))
    made = plan("-f", "llm.yaml", "--python", python, "--minimum-gain", "1.2")
    points = status()["points"]
    for point in points:
        point["timeToFirstToken"] = {"p95": f"{point['batch']}s"}
    sink = profile.ManifestSink(made.profile, made.output, lambda progress: None)
    asyncio.run(sink.write(status(points=points, outcome=outcome("Completed"))))
    assert tightship(["profile", "--resume", "--python", python]) == profile.MEASURED
    told = capsys.readouterr()
    assert "batch 2: " in told.out
    (line,) = [line.split() for line in told.err.splitlines() if line.startswith("  tightship advise")]
    assert line[1:] == ["advise", "-f", "profile.yaml", "--itl", "100ms", "--ttft", "p95:2s", "--explain"]
    # The command that is printed decides the same, and so does none of its options.
    for words in (line[1:-1], line[1:4]):
        assert tightship(words) == 0
        assert capsys.readouterr().out == told.out

    # What is asked of a finished profile is not in its file: then it is in the command.
    changed = ("--itl", "p50:9ms", "--minimum-gain", "1.05", "--memory-reserve", "1Gi", "--efficiency-floor", "0")
    tightship(["profile", "--resume", "--python", python, *changed])
    follow = "--itl p50:9ms --efficiency-floor 0 --minimum-gain 1.05 --memory-reserve 1Gi --explain"
    assert f"tightship advise -f profile.yaml {follow}" in capsys.readouterr().err
    tightship(["profile", "--resume", "--python", python, "--itl", "none"])
    assert "tightship advise -f profile.yaml --itl none --explain" in capsys.readouterr().err


def test_resume_takes_the_seed_that_was_measured_with(python: str) -> None:
    asked = plan("--model", "a/b", *MEANS, "--python", python, "--seed", "7")
    assert asked.environ["TIGHTSHIP_SEED"] == "7"
    load = {"basis": "Means", "seed": 7}
    asyncio.run(profile.ManifestSink(asked.profile, asked.output, lambda progress: None).write(status(load=load)))
    for words in ((), ("--seed", "7"), ("--model", "a/b", *MEANS)):
        made = plan("--resume", "--python", python, *words)
        assert make_job(made.profile, "a/b", CpuDevice(1 << 30, 1, SystemClock()), made.environ).seed == 7
        assert profile._resume(made).endswith("--resume -o profile.yaml --python " + python + " --seed 7")
    with pytest.raises(InputError, match=r"--seed 8: what profile.yaml holds was measured with seed 7"):
        plan("--resume", "--python", python, "--seed", "8")


def test_resume_takes_the_gpu_that_was_measured_on(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, GPU, GPU, GPU)
    asked = plan("--model", "a/b", *MEANS, "--python", python, "--gpu", "2")
    assert profile._resume(asked).endswith(" --gpu 2")
    gpu = {"product": GPU, "memory": "80Gi", "uuid": "GPU-2"}
    asyncio.run(profile.ManifestSink(asked.profile, asked.output, lambda progress: None).write(status(gpu=gpu)))
    for words in ((), ("--gpu", "2"), ("--model", "a/b", *MEANS)):
        made = plan("--resume", "--python", python, *words)
        assert (made.environ["NVIDIA_VISIBLE_DEVICES"], made.environ["CUDA_VISIBLE_DEVICES"]) == ("GPU-2", "2")
    with pytest.raises(
        InputError, match=r"--gpu 1: what is there was measured on GPU 2 .GPU-2.*go on there with --gpu 2"
    ):
        plan("--resume", "--python", python, "--gpu", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert plan("--resume", "--python", python).environ["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InputError, match=r"CUDA_VISIBLE_DEVICES=0,1: what is there was measured on GPU 2"):
        plan("--resume", "--python", python)
    gpus(monkeypatch, GPU)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(InputError, match="measured on GPU GPU-2, which this machine doesn't have"):
        plan("--resume", "--python", python)


def packable(python: str) -> profile.Plan:
    """A finished profile whose best packing was never tried: until now one replica was all that was allowed."""
    made = plan("--model", "a/b", *MEANS, "--max-replicas-per-gpu", "1", "--gpu", "0", "--python", python)
    memory = {
        "deviceTotal": "80Gi", "replica": "8Gi", "kvCache": "2Gi", "kvCacheTokens": 10_000, "contextMean": "9", "contextStd": "9",
    }  # fmt: skip
    points = [{**point, "gpuUtilization": "0.5"} for point in status()["points"]]
    gpu = {"product": GPU, "memory": "80Gi", "uuid": "GPU-0"}
    sink = profile.ManifestSink(made.profile, made.output, lambda progress: None)
    asyncio.run(sink.write(status(gpu=gpu, points=points, memory=memory, outcome=outcome("Completed"))))
    return made


def test_a_finished_profile_is_extended_by_what_is_only_estimated(
    python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(monkeypatch, GPU)
    packable(python)
    with pytest.raises(InputError, match=r"--extend: nothing to try in profile.yaml: batch 4: 303 tokens/s"):
        plan("--extend", "--python", python)
    assert tightship(["profile", "--resume", "--python", python, "--max-replicas-per-gpu", "3"]) == profile.MEASURED
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "--extend" in line]
    assert said == f"  tightship profile --extend -o profile.yaml --python {python} --max-replicas-per-gpu 3"

    made = plan("--extend", "--python", python, "--max-replicas-per-gpu", "3", "--budget", "5m")
    asked = made.profile.spec.measurement.extend
    assert asked is not None
    assert [(each.batch, each.replicas) for each in asked.pairs] == [(4, 3)]
    assert asked.budget == "5m"
    assert profiler.kept(made.profile) is not None, "the profiler has something to do"
    assert profile._resume(made).startswith("tightship profile --extend ")
    # The file stays finished, and asks nothing of a cluster.
    sink = profile.ManifestSink(made.profile, made.output, lambda progress: None)
    asyncio.run(sink.write(made.profile.status.to_dict()))
    document = yaml.safe_load(Path("profile.yaml").read_text())
    assert "extend" not in document["spec"]["measurement"]
    assert profile.read_kept("profile.yaml").status.outcome is not None


def test_only_what_is_finished_is_extended(python: str) -> None:
    with pytest.raises(InputError, match=r"--extend: there is no profile.yaml to go on with"):
        plan("--extend", "--python", python)
    write(python)
    with pytest.raises(
        InputError, match=r"--extend: what profile.yaml holds isn't finished: go on with it with --resume"
    ):
        plan("--extend", "--python", python)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "not YAML"),
        ("kind: BatchProfile\nmetadata: x\nspec: {}", "that can be gone on with: metadata: "),
        ("kind: BatchProfile\nspec: {}", "can't|that can be gone on with: spec.key: Field required"),
        ("kind: LLMService", "holds LLMService, no BatchProfile"),
    ],
)
def test_resume_of_something_else(python: str, content: str, said: str) -> None:
    Path("profile.yaml").write_text(content)
    with pytest.raises(InputError, match=f"--resume: profile.yaml.*({said})"):
        plan("--resume", "--python", python)


def test_resume_needs_the_same_lengths(python: str, tmp_path: Path) -> None:
    Path("a.csv").write_text("1,2\n")
    Path("b.csv").write_text("3,4\n")
    made = plan("--model", "a/b", "--lengths", "a.csv", "--python", python)
    asyncio.run(profile.ManifestSink(made.profile, made.output, lambda progress: None).write(status()))
    for words, said in (
        ((), "give the file again with --lengths"),
        (("--lengths", "b.csv"), "not the lengths this profile is for"),
    ):
        with pytest.raises(InputError, match=said):
            plan("--resume", "--python", python, *words)
    assert plan("--resume", "--python", python, "--lengths", "a.csv").environ["TIGHTSHIP_LENGTHS_FILE"]


# --- the bar ---


@pytest.mark.parametrize(
    ("progress", "elapsed", "columns", "line"),
    [
        ({"stage": "Starting"}, 0, None, "[------------------------] 0s of 10m  starting, 0 points"),
        ({"stage": "Sweeping", "batch": 64, "points": 7, "message": "and so on"}, 150, None,
         "[######------------------] 2m30s of 10m  sweep batch 64, 7 points: and so on"),
        ({"stage": "Trying", "batch": 96, "replicas": 2, "points": 1}, 300, None,
         "[############------------] 5m of 10m  trials batch 96 x 2 replicas, 1 point"),
        ({"stage": "Done", "points": 9, "message": "said elsewhere"}, 700, None, "[########################] 11m40s of 10m  done, 9 points"),
        ({"stage": "Starting"}, 0, 40, "[------------------------] 0s of 10m..."),
    ],
)  # fmt: skip
def test_the_line(progress: dict[str, Any], elapsed: float, columns: int | None, line: str) -> None:
    assert render(api.Progress.model_validate(progress), elapsed, 600, columns) == line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    """A stream whose reader has left."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.tried = 0
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.tried += 1
        raise BrokenPipeError


def bar_story(stream: io.StringIO) -> str:
    time = [0.0]
    bar = ProgressBar(stream, 100, now=lambda: time[0], columns=lambda: 200)
    bar.show(api.Progress(stage="Sweeping", batch=1, points=0, elapsed="10s"))
    time[0] = 3.0
    bar.redraw()
    bar.show(api.Progress(stage="Sweeping", batch=1, points=0, elapsed="14s"))
    bar.note("note: look")
    bar.show(api.Progress(stage="Done", points=1, elapsed="20s"))
    bar.close()
    return stream.getvalue()


def test_a_terminal_gets_one_line_that_moves() -> None:
    frames = bar_story(Terminal()).split("\r\x1b[K")
    assert [frame.split("  ")[0].split("] ")[-1] for frame in frames if "of" in frame] == [
        "10s of 1m40s", "13s of 1m40s", "14s of 1m40s", "14s of 1m40s", "20s of 1m40s", "20s of 1m40s"
    ]  # fmt: skip
    assert "note: look\n" in frames
    assert frames[-1].endswith("\n")


def test_a_file_gets_a_line_for_every_change() -> None:
    lines = bar_story(io.StringIO()).splitlines()
    assert [line.partition("] ")[2] or line for line in lines] == [
        "10s of 1m40s  sweep batch 1, 0 points", "note: look", "20s of 1m40s  done, 1 point"
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reader_that_left_is_not_written_to_again(terminal: bool) -> None:
    stream = Closed(terminal)
    assert bar_story(stream) == ""
    assert stream.tried == 1


def test_annotations_say_how_far_it_is(python: str) -> None:
    write(python)
    document = yaml.safe_load(Path("profile.yaml").read_text())
    noted = json.loads(document["metadata"]["annotations"][labels.ANNOTATION_MEASUREMENT])
    assert noted == {"progress": {"stage": "Sweeping", "batch": 8, "points": 3, "elapsed": "20s"}}
