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


async def run(path: Path, environ: dict[str, str], **measurement: Any) -> api.BatchProfileStatus:
    """Profile into a file, and read what it holds."""
    subject = api.BatchProfile.model_validate(
        {
            "metadata": {"name": "opt", "namespace": "default"},
            "spec": {
                "key": {
                    "hash": "0" * 64,
                    "model": {"source": "hf://facebook/opt-1.3b"},
                    # a token budget this small keeps the ladder short: vLLM runs no more requests than it has tokens in a step
                    "engine": {"image": ENGINE, "args": ["--max-num-batched-tokens=32"], "maxModelLen": 2048},
                    "accelerator": {"device": "cuda", "product": "NVIDIA-H100-80GB-HBM3"},
                    "workload": {"inputTokens": 16, "outputTokens": 128},
                },
                "measurement": {"budget": "60s", "maxReplicasPerGPU": 2, **measurement},
            },
        }
    )
    sink = FileSink(path, subject)
    assert await profile(sink, environ, SystemClock()) == FINISHED
    return (await sink.read()).status


async def test_a_profile_tries_packings_under_a_daemon_of_its_own(one: Machine, tmp_path: Path) -> None:
    idle = one.gpu()["used"]
    status = await run(tmp_path / "profile.json", dict(os.environ))

    assert status.outcome is not None
    said = status.outcome.message or ""
    assert status.trials, f"{said}: {status.to_dict()}"
    trial = status.trials[0]
    assert trial.replicas == 2
    point = next(point for point in status.points if point.batch == trial.batch)
    assert trial.inter_token_latency is not None
    assert point.inter_token_latency is not None
    alone = parse_duration(point.inter_token_latency.mean or "0")
    together = parse_duration(trial.inter_token_latency.mean or "0")
    assert 0.9 * alone < together < 2.2 * alone
    assert float(trial.slowest or 0) > 0.8
    # two engines of OPT-1.3B, weights of 2.45 GiB each
    assert parse_quantity(trial.memory or "0") > 2 * 2.4 * 2**30
    assert f"{len(status.trials)} packing" in said
    assert status.cost is not None
    assert float(status.cost.trials) > 0

    wait_for("engines and daemon have given the GPU back", lambda: one.gpu()["used"] == idle)
    assert not list(one.directory.glob("mps-*"))
