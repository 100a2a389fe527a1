"""Packing trials as they are: engines over HTTP on one simulated GPU, under the Job's own simulated MPS daemon, in real time.

What is measured is checked loosely here, since this machine's cores are shared; exactly, in virtual time, by the unit tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tightship.sandbox
from simulation_helpers import ENGINE, Machine, machine, wait_for
from tightship.api.units import parse_duration, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.__main__ import FINISHED, profile
from tightship.profiler.clock import SystemClock
from tightship.profiler.report import FileSink

IMAGE = Path(tightship.sandbox.__file__).parent / "simulation" / "images" / "simulated"
TIME_SCALE = 8
"""Real seconds a simulated one, so that two busy cores keep up with two engines and their load."""


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with machine(tmp_path, time_scale=TIME_SCALE) as started:
        for name, value in container(started).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
        monkeypatch.syspath_prepend(str(IMAGE))
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)
        try:
            yield started
        finally:
            sys.modules.pop("pynvml", None)


def container(one: Machine) -> dict[str, str]:
    """The environment of a container of the engine image, with engines that start fast."""
    return {
        **one.environment(ENGINE),
        "TMPDIR": str(one.directory),
        "TIGHTSHIP_SIM_START_SECONDS": "0.5",
        "TIGHTSHIP_DEVICE": "cuda",
        "TIGHTSHIP_MODEL_PATH": "facebook/opt-1.3b",
    }


def point(batch: int, rate: float, itl: str, kv_tokens: int) -> dict[str, Any]:
    """What the sweep measures on this GPU at this time scale."""
    return {
        "batch": batch,
        "totalTokensPerSecond": str(rate),
        "interTokenLatency": {"mean": itl},
        "kvCacheTokensPeak": kv_tokens,
        "requests": 20,
        "preemptions": 0,
        "gpuUtilization": "0.55",
        "halfWidth": "0.02",
    }


ALONE = {8: 240.0, 16: 412.0}
FINISHED_PROFILE = {
    "engine": {
        "blockSize": 16,
        "kvCacheTokens": 385360,
        "maxNumSeqs": 1024,
        "maxModelLen": 2048,
        "maxNumBatchedTokens": 8192,
        "captureSizes": [1, 2, 4, 8, 16],
    },
    "points": [point(1, 39, "28.5ms", 128), point(8, ALONE[8], "37.3ms", 848), point(16, ALONE[16], "43.3ms", 1648)],
    "memory": {
        "confirmedBatch": 16,
        "deviceTotal": "80Gi",
        "blockSize": 16,
        "kvBytesPerToken": 196618,
        "kvCacheTokens": 4496,
        "kvCache": "883994528",
        "replica": "5Gi",
        "nonKV": "4400Mi",
        "contextMean": "152",
        "contextStd": "129",
        "basis": "Assumed",
    },
    "gpuSeconds": "60",
    "outcome": {"state": "Completed", "reason": "Completed", "message": "batch 16 is the engine's largest"},
}


async def extend(path: Path, pairs: list[tuple[int, int]], budget: str) -> api.BatchProfileStatus:
    """Have a finished profile in a file extended by the profiler, and read what it holds."""
    subject = api.BatchProfile.model_validate(
        {
            "metadata": {"name": "opt", "namespace": "default"},
            "spec": {
                "key": {
                    "hash": "0" * 64,
                    "model": {"source": "hf://facebook/opt-1.3b"},
                    "engine": {"image": ENGINE, "maxModelLen": 2048},
                    "accelerator": {"device": "cuda", "product": "NVIDIA-H100-80GB-HBM3"},
                    "workload": {"inputTokens": 16, "outputTokens": 128},
                },
                "measurement": {
                    "extend": {
                        "request": "packed",
                        "budget": budget,
                        "pairs": [{"batch": batch, "replicas": replicas} for batch, replicas in pairs],
                    }
                },
            },
            "status": FINISHED_PROFILE,
        }
    )
    sink = FileSink(path, subject)
    assert await profile(sink, dict(os.environ), SystemClock()) == FINISHED
    return (await sink.read()).status


async def test_packings_are_tried_under_a_daemon_of_our_own(one: Machine, tmp_path: Path) -> None:
    idle = one.gpu()["used"]
    status = await extend(tmp_path / "profile.json", [(16, 2), (8, 2)], "60s")

    assert status.outcome is not None
    said = status.outcome.message or ""
    assert status.outcome.extend == "packed"
    trials = {(trial.batch, trial.replicas): trial for trial in status.trials}
    assert sorted(trials) == [(8, 2), (16, 2)], said
    assert "2 packings were tried, the fastest 2 x 16" in said
    for (batch, _), trial in trials.items():
        # the host's part of a step is filled by the neighbour: 1.5 by the closed queue, loosely on busy cores
        assert 1.1 < float(trial.total_tokens_per_second or 0) / ALONE[batch] < 2.0
        assert trial.inter_token_latency is not None
        assert float(trial.slowest or 0) > 0.8
        # two engines of OPT-1.3B, weights of 2.45 GiB each, and 0.82 GiB of KV cache
        assert parse_quantity(trial.memory or "0") > 2 * 3.2 * 2**30
        assert parse_quantity(trial.kv_cache or "0") == 4496 * 196618
    assert parse_duration((trials[16, 2].inter_token_latency or api.Latency()).mean or "0") > 0.0433
    assert len(status.points) == 3

    wait_for("engines and daemon have given the GPU back", lambda: one.gpu()["used"] == idle)
    assert not leftovers(one)


async def test_without_mps_in_the_container_no_packing_is_reported(
    one: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    status = await extend(tmp_path / "profile.json", [(16, 2)], "60s")
    assert status.outcome is not None
    assert status.outcome.state == "Completed"
    assert "no packing was tried: no nvidia-cuda-mps-control in this container" in (status.outcome.message or "")
    assert status.trials == []


def leftovers(one: Machine) -> list[Path]:
    """Directories of daemons that were not taken down."""
    return list(one.directory.glob("mps-*"))
