"""Every reason of an LLMService's and a BatchProfile's conditions, reached through the API, and no reason forgotten.

Most reasons have stories of their own beside this file; here each is reached once, by the shortest way there is, so that the list is
whole. `SLOMet` and `ProfileStale` are not written yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pack_world import World, curve, end_jobs, measured, name_of, profile
from story import make_profile, make_service
from tightship.api.v1alpha1.conditions import Reason

NS = "default"
Scene = Callable[[], Awaitable[World]]
MINE, ITS = "LLMService", "BatchProfile"

OF_PACKS = {
    Reason.GPU_HELD, Reason.MPS_ACTIVE, Reason.CPU_SET, Reason.MPS_FAULT, Reason.MPS_NOT_ATTACHED, Reason.GPU_MISMATCH,
    Reason.GPU_NOT_VISIBLE, Reason.HOLDER_LOST, Reason.WAITING_FOR_START_SLOT, Reason.REPLICAS_READY, Reason.REPLICAS_STARTING,
    Reason.OOM_KILLED, Reason.CRASH_LOOP, Reason.IMAGE_PULL_FAILED, Reason.NOT_ASSIGNED,
    Reason.EXCLUSIVE, Reason.ENGINE_HUNG, Reason.DEVICE_LIMITS_FORCED,
}  # fmt: skip
"""Reasons of a GPUPack's conditions: test_pack_reasons.py."""

OF_CHANGES = {Reason.ROLLOUT_STOPPED}
"""What takes a roll-out that fails: test_changes_story.py."""


async def start(*objects: dict[str, Any], gpus: tuple[int, ...] = (2, 2), **changes: Any) -> World:
    """A world with a service (`changes` as in `make_service`), looked at."""
    world = World(gpus=gpus, profiling=True)
    for each in objects:
        world.put(each)
    world.put(make_service(**changes))
    await world.settle()
    return world


async def end(world: World, outcome: dict[str, Any], **found: Any) -> World:
    """The measurement ends."""
    world.report(name_of(world), measured(profile(world), **found) | {"outcome": outcome})
    end_jobs(world)
    await world.run(rounds=20)
    return world


async def fail(reason: str) -> World:
    world = await start()
    world.report(name_of(world), {"outcome": {"state": "Failed", "reason": reason, "message": "in words"}})
    end_jobs(world)
    await world.run()
    return world


async def serve(*, gpus: tuple[int, ...] = (2, 2), found: dict[str, Any] | None = None, **changes: Any) -> World:
    """A service that is measured and, where nothing is in the way, serves."""
    return await end(await start(gpus=gpus, **changes), {"state": "Completed"}, **(found or {}))


async def queued() -> World:
    """Another key is being measured, and there is one slot."""
    world = await start(workload={"inputTokens": 5, "outputTokens": 5})
    world.put(make_service("second"))
    await world.settle()
    return world


async def unschedulable() -> World:
    world = await start()
    (job,) = world.all("Job")
    owner = {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
    labels = {"name": "p", "namespace": NS, "labels": job["metadata"]["labels"], "ownerReferences": [owner]}
    text = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
    world.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": labels,
            "spec": {"containers": []},
            "status": {"phase": "Pending", "conditions": [scheduled]},
        }
    )
    await world.settle()
    return world


async def job_failed() -> World:
    world = await start()
    end_jobs(world)
    await world.settle()
    return world


async def over_budget() -> World:
    return await end(await start(), {"state": "BudgetExceeded", "message": "4 of 9 points"})


async def imported() -> World:
    world = await start(make_profile(make_service()))
    await world.run(rounds=20)
    return world


async def cached() -> World:
    world = await serve(replicas=1)
    world.put(make_service("second", replicas=1))
    await world.run()
    return world


async def taken() -> World:
    foreign = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "opt", "namespace": NS}, "spec": {}}
    return await start(foreign)


async def forbidden() -> World:
    """Admission refuses replicas."""
    world = await start()
    world.api.refuses = lambda pod: None if "holder" in pod["metadata"]["name"] else "hostPath volumes are not allowed"
    return await end(world, {"state": "Completed"})


async def without_a_replica() -> World:
    world = await serve(replicas=1)
    (pod,) = [
        each for each in world.all("Pod") if each["metadata"]["labels"]["app.kubernetes.io/component"] == "replica"
    ]
    world.change("Pod", NS, pod["metadata"]["name"], lambda obj: obj["status"].update(conditions=[]))
    await world.settle()
    return world


async def below_the_floor() -> World:
    """Only batch 32 has the percentile that the objective is of, and it is not efficient enough."""
    points = curve()
    points[1]["interTokenLatency"]["p99"] = "20ms"
    objective = {"metric": "InterTokenLatency", "statistic": "p99", "max": "100ms"}
    floor = {"efficiencyFloor": "0.9"}
    return await serve(slo__objectives=[objective], advisor=floor, found={"points": points, "trials": ()})


async def without_gain() -> World:
    """Two replicas were tried, and are slower than one."""
    return await serve(found={"trials": [SLOWER]})


SLOWER = {
    "batch": 96,
    "replicas": 2,
    "totalTokensPerSecond": "9000",
    "interTokenLatency": {"mean": "28ms"},
    "requests": 2000,
    "preemptions": 0,
}

TABLE: list[tuple[str, str, str, str, str, Scene]] = [
    (MINE, "opt", "Accepted", "True", Reason.VALID, start),
    (MINE, "opt", "Accepted", "False", Reason.INVALID_SPEC, lambda: start(engine__args=["--port=1"])),
    (MINE, "opt", "Stalled", "True", Reason.INVALID_SPEC, lambda: start(engine__args=["--port=1"])),
    (MINE, "opt", "Accepted", "False", Reason.UNSUPPORTED_ACCELERATOR, lambda: start(accelerator__product="H900")),
    (MINE, "opt", "Accepted", "False", Reason.NAME_CONFLICT, taken),
    (MINE, "opt", "Profiled", "True", Reason.COMPLETED, serve),
    (MINE, "second", "Profiled", "True", Reason.CACHE_HIT, cached),
    (MINE, "opt", "Profiled", "True", Reason.IMPORTED, imported),
    (MINE, "opt", "Profiled", "True", Reason.BUDGET_EXCEEDED, over_budget),
    (MINE, "second", "Profiled", "False", Reason.WAITING, queued),
    (MINE, "opt", "Profiled", "False", Reason.MEASURING, start),
    (MINE, "opt", "Profiled", "False", Reason.UNSCHEDULABLE, unschedulable),
    (MINE, "opt", "Profiled", "False", Reason.ENGINE_FAILED, lambda: fail("EngineFailed")),
    (MINE, "opt", "Profiled", "False", Reason.NO_POINT_IN_BUDGET, lambda: fail("NoPointInBudget")),
    (MINE, "opt", "Profiled", "False", Reason.JOB_FAILED, job_failed),
    (MINE, "opt", "Recommended", "True", Reason.MEASURED, serve),
    (MINE, "opt", "Recommended", "True", Reason.ESTIMATED, lambda: serve(found={"trials": ()})),
    (
        MINE,
        "opt",
        "Recommended",
        "False",
        Reason.SLO_INFEASIBLE,
        lambda: serve(slo__objectives=[{"metric": "InterTokenLatency", "max": "1ms"}]),
    ),
    (
        MINE,
        "opt",
        "Recommended",
        "False",
        Reason.EFFICIENCY_FLOOR_NOT_MET,
        below_the_floor,
    ),
    (MINE, "opt", "Recommended", "False", Reason.INSUFFICIENT_MEMORY, lambda: serve(found={"replica": "90Gi"})),
    (MINE, "opt", "Packed", "True", Reason.PLACED, serve),
    (MINE, "opt", "Packed", "True", Reason.EXCLUSIVE_NO_GAIN, without_gain),
    (MINE, "opt", "Packed", "False", Reason.AWAITING_APPROVAL, lambda: serve(autoApply=False)),
    (MINE, "opt", "Packed", "False", Reason.INSUFFICIENT_GPUS, lambda: serve(gpus=(1,))),
    (MINE, "opt", "Packed", "False", Reason.SHARING_UNAVAILABLE, forbidden),
    (MINE, "opt", "Packed", "Unknown", Reason.NOT_YET_KNOWN, start),
    (MINE, "opt", "Available", "True", Reason.MINIMUM_REPLICAS_READY, serve),
    (MINE, "opt", "Available", "False", Reason.TOO_FEW_REPLICAS, without_a_replica),
    (MINE, "opt", "Reconciling", "True", Reason.PROGRESSING, start),
    (MINE, "opt", "Ready", "True", Reason.FULLY_REALISED, serve),
    (MINE, "opt", "Ready", "False", Reason.TOO_FEW_REPLICAS, without_a_replica),
    (ITS, "", "Progressing", "True", Reason.MEASURING, start),
    (ITS, "", "Progressing", "True", Reason.UNSCHEDULABLE, unschedulable),
    (ITS, "", "Complete", "True", Reason.COMPLETED, serve),
    (ITS, "", "Ready", "True", Reason.COMPLETED, serve),
    (ITS, "", "Complete", "True", Reason.IMPORTED, imported),
    (ITS, "", "Complete", "True", Reason.BUDGET_EXCEEDED, over_budget),
    (ITS, "", "Failed", "True", Reason.ENGINE_FAILED, lambda: fail("EngineFailed")),
    (ITS, "", "Failed", "True", Reason.NO_POINT_IN_BUDGET, lambda: fail("NoPointInBudget")),
    (ITS, "", "Failed", "True", Reason.INSUFFICIENT_MEMORY, lambda: fail("InsufficientMemory")),
    (ITS, "", "Failed", "True", Reason.JOB_FAILED, job_failed),
    (ITS, "", "Ready", "False", Reason.JOB_FAILED, job_failed),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=" ".join((row[0], *row[2:5]))) for row in TABLE])
async def test_a_reason_is_reached(row: tuple[str, str, str, str, str, Scene]) -> None:
    kind, name, which, status, reason, scene = row
    world = await scene()
    said = world.condition(kind, NS, name or name_of(world), which)
    assert said[:2] == (status, reason), said
    assert said[2], "a condition says something to people too"


def test_no_reason_is_forgotten() -> None:
    """A new reason gets a row above, or a story of packs or changes."""
    there = {value for name, value in vars(Reason).items() if not name.startswith("_")}
    assert there == {row[4] for row in TABLE} | OF_PACKS | OF_CHANGES
