"""Packing as a user meets it: measured in the profiling Job, decided by what was measured, and found again by a client of one's own.

Three services on simulated GPUs whose time runs slower than real time, so that two busy cores keep up: one for which packing pays, one for
which it doesn't, one whose objective holds alone and would break when packed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import story
from tightship.api.units import parse_duration
from tightship.sandbox.cluster import Sandbox

CLIENT = Path(__file__).parents[1] / "service_client.py"
TIME_SCALE = 5
IN, OUT = 64, 128


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, kubectl: Path) -> Iterator[Sandbox]:
    with Sandbox(
        plane="embedded",
        state=tmp_path_factory.mktemp("sandbox"),
        operator=True,
        nodes=1,
        device_arguments=["--time-scale", str(TIME_SCALE)],
    ) as running:
        yield running


def make_service(name: str, model: str, itl: float, **changes: Any) -> dict[str, Any]:
    """A service of two replicas whose batch ends at 64: enough to see packing, and measured quickly. `itl` in simulated ms."""
    return story.make_service(
        name,
        **{
            "model__source": f"hf://{model}",
            "model__servedName": name,
            "engine__args": ["--dtype=float16", "--max-num-batched-tokens=64"],
            "workload": {"inputTokens": IN, "outputTokens": OUT},
            "slo__objectives": [
                {"metric": "InterTokenLatency", "statistic": "mean", "max": f"{itl * TIME_SCALE:.0f}ms"}
            ],
            "profiling__budget": "6m",
            "replicas": 2,
            **changes,
        },
    )


def settled(sandbox: Sandbox, service: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Apply and wait; the service when it is Ready, and its profile."""
    name = service["metadata"]["name"]
    story.apply(sandbox, service)
    story.wait_condition(sandbox, f"llm/{name}", "Profiled", seconds=420)
    ready = story.wait_ready(sandbox, name, service["spec"]["replicas"])
    return ready, story.get(sandbox, f"bprof/{ready['status']['profile']['name']}")


def gone(sandbox: Sandbox, name: str) -> None:
    sandbox.kubectl("delete", f"llm/{name}")
    story.wait_until(sandbox, "its packs are gone", lambda: not story.packs(sandbox), 90)


def measured_by_a_client(sandbox: Sandbox, name: str, streams: int) -> dict[str, float]:
    """What a separate client gets through the Service, with that many streams in all."""
    address = story.get(sandbox, f"svc/{name}")["spec"]["clusterIP"]
    command = [sys.executable, str(CLIENT), address, "80", name, "--streams", str(streams)]
    command += ["--input", str(IN), "--output", str(OUT), "--warmup", "15", "--seconds", "30"]
    done = sandbox.exec_in_namespace(command, capture_output=True, text=True, timeout=120)
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def trial_of(profile: dict[str, Any], batch: int, replicas: int) -> dict[str, Any]:
    found = [each for each in profile["status"]["trials"] if (each["batch"], each["replicas"]) == (batch, replicas)]
    assert found, f"no trial of {batch} x {replicas}: {profile['status']['trials']}"
    return dict(found[0])


def test_packing_that_pays_is_kept_and_found_again_by_a_client(sandbox: Sandbox) -> None:
    ready, profile = settled(sandbox, make_service("opt", "facebook/opt-1.3b", 30))
    advice = ready["status"]["recommendation"]
    assert (advice["basis"], advice["replicasPerGPU"]) == ("Measured", 2), advice
    assert float(advice["expectedGain"]) > 1.05
    assert advice["defaultEngine"]["batch"] > 0
    assert advice["defaultEngine"]["totalTokensPerSecond"]
    assert story.condition(ready, "Packed")["reason"] == "Placed"
    trial = trial_of(profile, advice["batch"], 2)

    found = measured_by_a_client(sandbox, "opt", 2 * advice["batch"])
    assert found["totalTokensPerSecond"] == pytest.approx(float(trial["totalTokensPerSecond"]), rel=0.10)
    assert found["interTokenLatency"] == pytest.approx(parse_duration(trial["interTokenLatency"]["mean"]), rel=0.10)
    gone(sandbox, "opt")


def test_packing_that_does_not_pay_is_dropped_with_the_figures(sandbox: Sandbox) -> None:
    service = make_service("llama", "meta-llama/Llama-2-7b-hf", 60, packing__minimumGain="1.25")
    ready, profile = settled(sandbox, service)
    advice = ready["status"]["recommendation"]
    assert (advice["basis"], advice["replicasPerGPU"]) == ("Measured", 1), advice
    assert profile["status"]["trials"], "it was tried"
    packed = story.condition(ready, "Packed")
    assert packed["reason"] == "ExclusiveNoGain"
    assert sorted(story.packs(sandbox).values()) == [1, 1]
    gone(sandbox, "llama")


def test_an_objective_that_packing_would_break_is_kept(sandbox: Sandbox) -> None:
    """The same model and workload as the first, so the same profile; an objective just above what batch 64 takes alone."""
    alone, profile = 0.0, {}
    for item in story.items(sandbox, "bprof"):
        points = {point["batch"]: point for point in item["status"]["points"]}
        if item["spec"]["key"]["model"]["source"].endswith("opt-1.3b"):
            alone, profile = parse_duration(points[64]["interTokenLatency"]["mean"]), item
    assert profile, "the first story's profile is there"
    limit = 1.08 * alone
    packed = trial_of(profile, 64, 2)
    assert parse_duration(packed["interTokenLatency"]["mean"]) > limit, "packed it would be missed"
    ready, again = settled(sandbox, make_service("tight", "facebook/opt-1.3b", 1000 * limit / TIME_SCALE))
    advice = ready["status"]["recommendation"]
    applied = advice.get("applied", advice)
    assert (applied["batch"], applied["replicasPerGPU"]) != (64, 2)
    assert again["metadata"]["name"] == profile["metadata"]["name"], "decided again from the same measurements"
    found = measured_by_a_client(sandbox, "tight", 2 * applied["batch"])
    assert found["interTokenLatency"] <= 1.03 * limit
    gone(sandbox, "tight")
