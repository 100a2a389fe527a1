"""The profiler as it is, over HTTP, against the simulated vLLM on a simulated GPU: the same process, command line, metrics and NVML
calls as on a real one. What it measures is checked loosely here, since this machine's cores are shared; exactly, in virtual
time, by the unit tests."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import tightship.sandbox
from tightship.api.units import parse_duration, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.__main__ import FINISHED, profile
from tightship.profiler.clock import SystemClock
from tightship.profiler.report import FileSink
from tightship.sandbox.simulation.client import Device

IMAGE = Path(tightship.sandbox.__file__).parent / "simulation" / "images" / "simulated"
SOURCE = Path(tightship.sandbox.__file__).parents[2]
GPU = "GPU-00000000-0000-0000-0000-000000000001"
TIME_SCALE = 4
"""Real seconds a simulated one, so that two busy cores keep up."""


@pytest_asyncio.fixture
async def simulated(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, str]]:
    """The environment of a container of the engine image on a node with one simulated GPU, of 80Gi or what the test asks."""
    memory = getattr(request, "param", "80Gi")
    path = tmp_path / "gpu.sock"
    device = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tightship.sandbox.simulation.device", "--socket", str(path), "--time-scale", str(TIME_SCALE)),
        *("--gpu", f"node=n,uuid={GPU},product=NVIDIA-H100-80GB-HBM3,memory={memory}"),
    )
    container = {
        "PYTHONPATH": f"{IMAGE}{os.pathsep}{SOURCE}",
        "TIGHTSHIP_SIM_SOCKET": str(path),
        "TIGHTSHIP_SIM_NODE": "n",
        "NVIDIA_VISIBLE_DEVICES": GPU,
    }
    for name, value in container.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(IMAGE))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    async with asyncio.timeout(20):
        while not path.exists():  # noqa: ASYNC110 (a socket of another process)
            await asyncio.sleep(0.05)
    try:
        yield {**os.environ, **container, "TIGHTSHIP_DEVICE": "cuda"}
    finally:
        device.terminate()
        await device.wait()
        sys.modules.pop("pynvml", None)


async def run(
    environ: dict[str, str], path: Path, *, model: str = "facebook/opt-1.3b", args: Any = (), budget: str = "25s"
) -> api.BatchProfileStatus:
    """Profile into a file, and read what it holds."""
    subject = api.BatchProfile.model_validate(
        {
            "metadata": {"name": "opt", "namespace": "default"},
            "spec": {
                "key": {
                    "hash": "0" * 64,
                    "model": {"source": f"hf://{model}"},
                    "engine": {"image": "vllm/vllm-openai:v0.33.0", "args": list(args), "maxModelLen": 2048},
                    "accelerator": {"device": "cuda", "product": "NVIDIA-H100-80GB-HBM3"},
                    "workload": {"inputTokens": 32, "outputTokens": 64},
                },
                "measurement": {"budget": budget},
            },
        }
    )
    sink = FileSink(path, subject)
    assert await profile(sink, {**environ, "TIGHTSHIP_MODEL_PATH": model}, SystemClock()) == FINISHED
    return (await sink.read()).status


async def test_a_profile_of_opt(simulated: dict[str, str], tmp_path: Path) -> None:
    status = await run(simulated, tmp_path / "profile.json")

    assert status.outcome is not None
    assert status.outcome.state in ("Completed", "BudgetExceeded"), status.outcome.message
    curve = {point.batch: float(point.total_tokens_per_second or 0) for point in status.points}
    assert sorted(curve)[:3] == [1, 2, 4]
    assert curve[4] > 1.5 * curve[1]
    first = next(point for point in status.points if point.batch == 1)
    assert first.inter_token_latency is not None
    # 3 ms on the simulated GPU, stretched by the time scale; above it by what this machine adds
    assert 3e-3 * TIME_SCALE * 0.8 < parse_duration(first.inter_token_latency.mean or "0") < 0.1
    assert (first.kv_cache_tokens_peak or 0) >= 64
    assert 0 < float(first.gpu_utilization or 0) <= 1

    assert status.gpu is not None
    assert (status.gpu.uuid, status.gpu.product) == (GPU, "NVIDIA-H100-80GB-HBM3")
    assert status.engine is not None
    assert (status.engine.max_num_seqs, status.engine.max_num_batched_tokens) == (1024, 8192)
    assert 512 in status.engine.capture_sizes

    memory = status.memory
    assert memory is not None
    # OPT-1.3B: 24 layers of 2048 in 16 bits, keys and values; weights of 2.45 GiB
    assert memory.kv_bytes_per_token == pytest.approx(2 * 2 * 24 * 2048, rel=0.001)
    assert parse_quantity(memory.non_kv or "0") > 2.4 * 2**30
    assert parse_quantity(memory.replica or "0") < 12 * 2**30
    assert status.confirmation is not None


@pytest.mark.parametrize(
    ("simulated", "how", "reason", "words"),
    [
        ("80Gi", {"args": ["--no-such-flag"]}, "EngineFailed", "unrecognized arguments: --no-such-flag"),
        ("80Gi", {"model": "facebook/nothing"}, "EngineFailed", "facebook/nothing is not a local folder"),
        ("3Gi", {}, "InsufficientMemory", "memory"),
    ],
    indirect=["simulated"],
    ids=["refused argument", "no such model", "GPU too small"],
)
async def test_an_engine_that_cannot_run_fails_with_its_last_words(
    simulated: dict[str, str], tmp_path: Path, how: dict[str, Any], reason: str, words: str
) -> None:
    status = await run(simulated, tmp_path / "profile.json", **how)
    assert status.outcome is not None
    assert (status.outcome.state, status.outcome.reason) == ("Failed", reason)
    assert words in (status.outcome.message or "")


def engines() -> list[int]:
    """The engines that this process has started and that still run, by PID."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, fields = status.read_text().rpartition(")")
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue  # ended meanwhile
        if int(fields.split()[1]) == os.getpid() and "vllm.entrypoints" in command and fields.split()[0] != "Z":
            found.append(int(status.parent.name))
    return found


def lose(gpu: Path) -> None:
    """Take the GPU away for good: the engine's API server answers 500 and 503 until it ends."""
    with Device(str(gpu)) as device:
        device.request("control", verb="lose", uuid=GPU)


def written(path: Path) -> api.BatchProfileStatus:
    """What a profile that is under way has in its file; nothing before there is one."""
    return api.BatchProfile.model_validate_json(path.read_text()).status if path.exists() else api.BatchProfileStatus()


async def harm(path: Path, how: Callable[[int], None], times: int) -> list[dict[int, api.Point]]:
    """Do that to an engine while it is measured, so often, each time with another point at least; returns the points there were."""
    seen: list[dict[int, api.Point]] = []
    harmed: set[int] = set()
    while len(seen) < times:
        await asyncio.sleep(0.05)
        status = written(path)
        measuring = status.progress is not None and status.progress.message.startswith("measuring")
        if not measuring or len(status.points) <= (len(seen[-1]) if seen else 0):
            continue
        fresh = [pid for pid in engines() if pid not in harmed]
        if fresh:
            how(fresh[0])
            harmed.update(fresh)
            seen.append({point.batch: point for point in status.points})
    return seen


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


async def test_an_engine_that_is_killed_once_is_started_again_and_nothing_is_measured_twice(
    simulated: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    harming = asyncio.create_task(harm(path, kill, times=1))
    status = await run(simulated, path, budget="40s")
    (before,) = await asyncio.wait_for(harming, 5)
    assert status.outcome is not None
    assert status.outcome.state in ("Completed", "BudgetExceeded"), status.outcome.message
    assert "the engine was restarted once: the engine died: killed by signal 9" in (status.outcome.message or "")
    after = {point.batch: point for point in status.points}
    assert {batch: after[batch] for batch in before} == before
    assert len(after) > len(before) + 1
    assert float(status.gpu_seconds or 0) <= 40 + 3


@pytest.mark.parametrize(
    ("how", "times", "words"),
    [
        ("kill", 2, ["the engine died: killed by signal 9"]),
        ("freeze", 2, ["the engine does not answer /metrics: ReadTimeout; its last words: "]),
        (
            "lose",
            1,
            [f"NVML can no longer read {GPU}", "its last words: torch.AcceleratorError: CUDA error: GPU is lost"],
        ),
    ],
    ids=["killed", "frozen", "GPU lost"],
)
async def test_an_engine_that_fails_for_good_fails_the_profile_with_its_last_words_and_keeps_the_points(
    simulated: dict[str, str], tmp_path: Path, how: str, times: int, words: list[str]
) -> None:
    path = tmp_path / "profile.json"
    does = {"kill": kill, "freeze": freeze, "lose": lambda _: lose(tmp_path / "gpu.sock")}[how]
    harming = asyncio.create_task(harm(path, does, times))
    status = await run(simulated, path, budget="2m")
    seen = await asyncio.wait_for(harming, 5)
    first, last = seen[0], seen[-1]
    assert len(last) < 4, "too few for a curve, or it would be completed with what there is"
    assert status.outcome is not None
    assert status.outcome.state == "Failed", status.outcome.message
    assert all(each in (status.outcome.message or "") for each in words), status.outcome.message
    assert {point.batch: point for point in status.points} == last
    assert {batch: last[batch] for batch in first} == first
    assert float(status.gpu_seconds or 0) <= 120
    assert not engines()
