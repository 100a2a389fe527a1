"""When a status is written: progress is gathered, what matters is told at once, and nothing is done later for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fault_world import make_packed
from pack_world import World, complete
from story import make_service
from tightship.core.conditions import timestamp

NS, PACK = "default", "default-opt-0"


def status(ready: str, reason: str = "ReplicasStarting", message: str = "") -> dict[str, Any]:
    return {"conditions": [{"type": "Ready", "status": ready, "reason": reason, "message": message}]}


async def make_reported(first: dict[str, Any]) -> tuple[World, dict[str, Any]]:
    """A world in which the operator wrote a pack's status just now, and what it shows."""
    world = World()
    object.__setattr__(world.ctx.settings, "status_interval", 5.0)
    pack = world.put(
        {
            "apiVersion": "tightship.dev/v1alpha1",
            "kind": "GPUPack",
            "metadata": {"name": "p", "creationTimestamp": timestamp(world.clock.now())},
            "spec": {},
        }
    )
    if first:
        await world.ctx.report(pack, first)
    return world, world.get("GPUPack", "", "p")


@pytest.mark.parametrize(
    ("before", "after", "waits"),
    [
        pytest.param(status("False"), status("False", message="1 of 2"), True, id="progress"),
        pytest.param(status("False"), status("True", "FullyRealised"), False, id="ready"),
        pytest.param(status("True", "FullyRealised"), status("False"), False, id="ready no more"),
        pytest.param(
            status("True", "FullyRealised"), status("Unknown", "NotYetKnown"), True, id="not known for a moment"
        ),
        pytest.param({}, status("Unknown", "NotYetKnown"), True, id="a first word that knows nothing"),
        pytest.param({}, status("False", "Unschedulable"), False, id="a first word that is bad news"),
    ],
)
async def test_what_may_wait(before: dict[str, Any], after: dict[str, Any], waits: bool) -> None:
    world, pack = await make_reported(before)
    later = world.ctx.report_later(pack, after)
    assert (0 < later <= 5) is waits
    assert world.ctx.report_later(pack, after, times=3) >= 3 * later - 1
    await world.clock.advance(5)
    assert world.ctx.report_later(pack, after) == 0


async def test_bad_news_of_any_gate_is_told_at_once() -> None:
    world, pack = await make_reported(status("False"))
    bad = copy.deepcopy(status("False"))
    bad["conditions"].append({"type": "Held", "status": "False", "reason": "GPUMismatch", "message": "another GPU"})
    assert world.ctx.report_later(pack, bad) == 0


async def test_after_a_restart_the_first_word_is_not_held_back() -> None:
    world, pack = await make_reported(status("False"))
    world.cluster._applied.clear()
    assert world.ctx.report_later(pack, status("False", message="1 of 2")) == 0


async def test_replicas_are_made_while_a_status_waits_and_it_is_written_in_the_end() -> None:
    world = World()
    object.__setattr__(world.ctx.settings, "status_interval", 60.0)
    world.put(make_service())
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run(rounds=20)
    assert len([pod for pod in world.all("Pod") if not pod["metadata"]["name"].startswith("holder")]) == 4
    assert world.condition("GPUPack", "", PACK, "Ready")[:2] == ("True", "FullyRealised")
    await world.clock.advance(200)
    await world.run(rounds=20)
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")
    assert world.get("LLMService", NS, "opt")["status"]["readyReplicas"] == 4


async def test_a_holder_that_starts_has_lost_nothing() -> None:
    """Its GPU is published by the container before the node says that the container runs."""
    world = World(gpus=(1,))
    seen: list[str] = []
    world.put(make_service(replicas=1))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.settle()
    world.nodes_act()
    (holder,) = [pod for pod in world.all("Pod") if pod["metadata"]["name"].startswith("holder")]
    world.change("Pod", holder["metadata"]["namespace"], holder["metadata"]["name"], lambda pod: pod.update(status={}))
    await world.settle()
    seen.append(world.condition("GPUPack", "", PACK, "Held")[1])
    await world.run(rounds=20)
    seen.append(world.condition("GPUPack", "", PACK, "Held")[1])
    assert seen == ["NotYetKnown", "GPUHeld"]


async def test_a_repair_is_written_down_at_once() -> None:
    """The next look goes by it, so that a repair is begun once, and its back-off counts from then."""
    world = await make_packed()
    object.__setattr__(world.ctx.settings, "status_interval", 600.0)
    world.mps_states[PACK] = "FAULT"
    world.nodes_act()
    await world.settle()
    assert world.get("GPUPack", "", PACK)["status"]["repair"]["reason"] == "MPSFault"
    world.mps_states.clear()
    await world.run()
    assert world.get("GPUPack", "", PACK)["status"]["repair"]["ended"]
    assert len([pod for pod in world.all("Pod") if not pod["metadata"]["name"].startswith("holder")]) == 2
