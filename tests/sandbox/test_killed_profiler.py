"""A profiler that is killed (SIGKILL, as for want of memory or with its node) between two points: the next attempt goes on from what was saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import story
from tightship.sandbox.cluster import Sandbox

PROFILER = "app.kubernetes.io/component=profiler"


@pytest.fixture
def sandbox(tmp_path: Path, kubectl: Path) -> Iterator[Sandbox]:
    with Sandbox(
        plane="embedded",
        state=tmp_path,
        operator=True,
        nodes=1,
        timing={"backoff_first": 1.0},
        engine_environment={"TIGHTSHIP_SIM_START_SECONDS": "0.5"},
    ) as running:
        yield running


def test_what_was_measured_before_the_kill_stands_and_the_rest_follows(sandbox: Sandbox) -> None:
    # One replica a GPU: no packing is tried, so the budget is the sweep's and the confirmation's.
    lengths = {"inputTokens": 32, "outputTokens": 64}
    # The larger of the simulated models: its 11 ms between tokens leave a busy machine's load some time.
    model = {"source": "hf://meta-llama/Llama-2-7b-hf", "servedName": "llama"}
    service = story.make_service(
        model=model, profiling__budget="40s", packing__maxReplicasPerGPU=1, workload=lengths, replicas=1
    )
    story.apply(sandbox, service)

    def measured() -> dict[int, Any]:
        profiles = story.items(sandbox, "bprof")
        return {each["batch"]: each for one in profiles for each in one.get("status", {}).get("points", [])}

    story.wait_until(sandbox, "three points are in the status", lambda: len(measured()) >= 3, 60)
    (first,) = story.items(sandbox, "pods", "-l", PROFILER)
    sandbox.kill_container(first["metadata"]["name"], "engine", reason="Error")
    before = measured()

    def finished() -> bool:
        (profile,) = story.items(sandbox, "bprof")
        return bool(profile["status"].get("outcome"))

    story.wait_until(sandbox, "the profile is finished", finished, 90)
    (profile,) = story.items(sandbox, "bprof")
    status = profile["status"]
    assert status["outcome"]["state"] in ("Completed", "BudgetExceeded"), status["outcome"]
    after = measured()
    assert {batch: after[batch] for batch in before} == before, "nothing is measured twice"
    assert len(after) > len(before)
    assert status["memory"]["replica"], "the confirmation run followed"
    assert float(status["gpuSeconds"]) <= 40 + 3, "both attempts together keep the budget"
    attempts = story.items(sandbox, "pods", "-l", PROFILER)
    assert first["metadata"]["name"] in {each["metadata"]["name"] for each in attempts}
    assert len(attempts) == 2
