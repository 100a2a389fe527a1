"""What can happen to the world: a table of events with weights.

An event takes its target by a number drawn beforehand, so that the sequence of events depends on the seed alone, and only which
pod is hit on how far the cluster has come. It returns what it did in words, or None where it had no target.
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from chaos.client import Object
from chaos.world import IMAGES, INFEASIBLE, MISSING_IMAGE, NODE_GRACE, OBJECTIVES, World, annotation

T = TypeVar("T")
MOST_REPLICAS = 4


@dataclass(frozen=True)
class Draw:
    """The random numbers of one event, each in [0, 1)."""

    first: float
    second: float
    third: float


Act = Callable[[World, Draw], "str | None"]


class Harm(Enum):
    """What an event may cost the services that serve."""

    NONE = "none"  # a change that nobody may notice: not below what `rollout.maxUnavailable` leaves
    PACK = "pack"  # a fault of one GPU: who is on others too serves on
    MORE = "more"


@dataclass(frozen=True)
class Kind:
    """One kind of event; `hollow`: only hollow nodes can be asked for it."""

    weight: float
    act: Act
    hollow: bool
    harm: Harm


EVENTS: dict[str, Kind] = {}


def event(weight: float, hollow: bool = False, harm: Harm = Harm.MORE) -> Callable[[Act], Act]:
    """Register an event under its function's name."""

    def register(act: Act) -> Act:
        EVENTS[act.__name__.replace("_", "-")] = Kind(weight, act, hollow, harm)
        return act

    return register


def choose(options: Sequence[T], number: float) -> T | None:
    """One of the options by a number in [0, 1)."""
    return options[int(number * len(options))] if options else None


def _pods(world: World, component: str) -> list[Object]:
    found = world.client.list("Pod", label=f"app.kubernetes.io/component={component}")
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"] and pod["spec"].get("nodeName")]


def _place(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _service(world: World, draw: Draw) -> tuple[tuple[str, str], Object]:
    key = choose(sorted(world.services), draw.first)
    assert key is not None
    return key, world.services[key]


def _delete(world: World, draw: Draw, component: str) -> str | None:
    pod = choose(_pods(world, component), draw.first)
    if pod is not None:
        world.client.delete("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])
    return _place(pod) if pod else None


def _kill(world: World, draw: Draw, component: str, container: str, how: str) -> str | None:
    pod = choose(_pods(world, component), draw.first)
    if pod is None or not world.ask_node(f"pods/{_place(pod)}/{container}/{how}"):
        return None
    return _place(pod)


# -- replicas ---------------------------------------------------------------------------------------------------------


@event(8, harm=Harm.PACK)
def kill_replica(world: World, draw: Draw) -> str | None:
    """SIGKILL to the engine, as the kernel's memory killer."""
    return _kill(world, draw, "replica", "engine", "kill?reason=OOMKilled")


@event(3, hollow=True, harm=Harm.PACK)
def fail_replica(world: World, draw: Draw) -> str | None:
    """The engine ends by itself."""
    return _kill(world, draw, "replica", "engine", "fail")


@event(3, hollow=True, harm=Harm.PACK)
def hang_replica(world: World, draw: Draw) -> str | None:
    """The engine answers /health no more, until it is restarted."""
    return _kill(world, draw, "replica", "engine", "hang")


@event(4, harm=Harm.PACK)
def delete_replica(world: World, draw: Draw) -> str | None:
    """Somebody deletes the pod."""
    return _delete(world, draw, "replica")


@event(2, hollow=True, harm=Harm.PACK)
def evict_replica(world: World, draw: Draw) -> str | None:
    """The kubelet evicts it."""
    pod = choose(_pods(world, "replica"), draw.first)
    return _place(pod) if pod and world.ask_node(f"pods/{_place(pod)}/evict") else None


# -- holders ----------------------------------------------------------------------------------------------------------


@event(4, harm=Harm.PACK)
def kill_daemon(world: World, draw: Draw) -> str | None:
    """The MPS daemon's container is killed."""
    return _kill(world, draw, "holder", "mps", "kill")


@event(4, harm=Harm.NONE)
def kill_watcher(world: World, draw: Draw) -> str | None:
    """The watcher is killed; nothing else may stop."""
    return _kill(world, draw, "holder", "watch", "kill")


@event(4, harm=Harm.PACK)
def delete_holder(world: World, draw: Draw) -> str | None:
    """Somebody deletes the holder."""
    return _delete(world, draw, "holder")


@event(3, hollow=True, harm=Harm.PACK)
def evict_holder(world: World, draw: Draw) -> str | None:
    """The kubelet evicts the holder."""
    pod = choose(_pods(world, "holder"), draw.first)
    return _place(pod) if pod and world.ask_node(f"pods/{_place(pod)}/evict") else None


@event(3, hollow=True, harm=Harm.PACK)
def fault_mps(world: World, draw: Draw) -> str | None:
    """A fatal fault of one client: the GPU's MPS server is in FAULT."""
    pod = choose(_pods(world, "holder"), draw.first)
    gpu = annotation(pod, "gpu").get("uuid") if pod else None
    return str(gpu) if gpu and world.ask_node(f"gpus/{gpu}/fault") else None


# -- nodes ------------------------------------------------------------------------------------------------------------


@event(3, hollow=True)
def reboot_node(world: World, draw: Draw) -> str | None:
    """Everything on a node is gone, and the node back at once."""
    node = choose([n for n in world.nodes if n not in world.away | world.cut.keys()], draw.first)
    return node if node and world.ask_node(f"nodes/{node}/reboot") else None


@event(3, hollow=True)
def cut_node(world: World, draw: Draw) -> str | None:
    """The node's agent is dead, or the network is: its pods run on unseen, for up to twice as long as the plane puts up with."""
    node = choose([n for n in world.nodes if n not in world.away | world.cut.keys()], draw.first)
    if node is None or "agent" in world.down or not world.ask_node(f"nodes/{node}/cut"):
        return None
    world.cut[node] = time.monotonic() + draw.second * 2 * NODE_GRACE
    return node


@event(3)
def drain_node(world: World, draw: Draw) -> str | None:
    """Cordon, and evict what runs there; the node stays cordoned until it is uncordoned."""
    node = choose([n for n in world.nodes if n not in world.away], draw.first)
    if node is None or world.cordoned:
        return None
    world.client.merge("Node", "", node, {"spec": {"unschedulable": True}})
    world.cordoned.add(node)
    for pod in world.client.list("Pod"):
        if pod["spec"].get("nodeName") == node:
            world.client.evict(pod["metadata"]["namespace"], pod["metadata"]["name"])
    return node


@event(4, harm=Harm.NONE)
def uncordon_node(world: World, draw: Draw) -> str | None:
    """The cordoned node takes pods again."""
    node = choose(sorted(world.cordoned), draw.first)
    if node is None:
        return None
    world.client.merge("Node", "", node, {"spec": {"unschedulable": None}})
    world.cordoned.discard(node)
    return node


@event(2, hollow=True)
def lose_node(world: World, draw: Draw) -> str | None:
    """The machine is gone, and its Node deleted, until it comes back."""
    node = choose([n for n in world.nodes if n not in world.away | world.cordoned | world.cut.keys()], draw.first)
    if node is None or world.away or "agent" in world.down or not world.ask_node(f"nodes/{node}/down"):
        return None
    world.client.delete("Node", "", node)
    world.away.add(node)
    return node


@event(4, hollow=True, harm=Harm.NONE)
def return_node(world: World, draw: Draw) -> str | None:
    """The machine is back."""
    node = choose(sorted(world.away), draw.first)
    if node is None or not world.ask_node(f"nodes/{node}/up"):
        return None
    world.away.discard(node)
    return node


# -- processes --------------------------------------------------------------------------------------------------------


def _take_down(world: World, name: str) -> str | None:
    if name in world.down:
        return None
    world.sandbox.kill_process(name)
    world.down.add(name)
    return name


@event(5, harm=Harm.NONE)
def kill_operator(world: World, draw: Draw) -> str | None:
    """SIGKILL to the operator; it is started again at the end of the burst."""
    return _take_down(world, "operator")


@event(2)
def kill_agent(world: World, draw: Draw) -> str | None:
    """The process that is all nodes is killed: all pods' processes are gone at once."""
    if world.cut or world.away:
        return None  # it would bring these nodes back
    return _take_down(world, "agent")


@event(2, harm=Harm.NONE)
def restart_api(world: World, draw: Draw) -> str | None:
    """The API server is killed and started again (the embedded one, whose data would die with it, only stands still for a while)."""
    name = world.api_process
    if world.real:
        world.sandbox.kill_process(name)
        world.sandbox.start_process(name)
        return name
    world.pause(name, signal.SIGSTOP)
    try:
        time.sleep(0.5 + 2 * draw.first)
    finally:
        world.pause(name, signal.SIGCONT)
    return name


# -- users ------------------------------------------------------------------------------------------------------------


@event(12, harm=Harm.NONE)
def scale(world: World, draw: Draw) -> str | None:
    """Another number of replicas, zero included."""
    key, service = _service(world, draw)
    service["spec"]["replicas"] = int(draw.second * (MOST_REPLICAS + 1))
    world.client.merge("LLMService", *key, {"spec": {"replicas": service["spec"]["replicas"]}})
    return f"{key[1]} to {service['spec']['replicas']}"


@event(5, harm=Harm.NONE)
def change_objective(world: World, draw: Draw) -> str | None:
    """Another latency objective, one that can't be met included."""
    key, service = _service(world, draw)
    limit = INFEASIBLE if draw.third < 0.15 else choose(OBJECTIVES, draw.second)
    service["spec"]["slo"]["objectives"][0]["max"] = limit
    world.client.merge("LLMService", *key, {"spec": {"slo": service["spec"]["slo"]}})
    return f"{key[1]} to {limit}"


@event(5, harm=Harm.NONE)
def change_image(world: World, draw: Draw) -> str | None:
    """Another engine image, one that can't be pulled included."""
    key, service = _service(world, draw)
    image = MISSING_IMAGE if draw.third < 0.15 else choose(IMAGES, draw.second)
    service["spec"]["engine"]["image"] = image
    world.client.merge("LLMService", *key, {"spec": {"engine": {"image": image}}})
    return f"{key[1]} to {image}"


@event(4)
def recreate_service(world: World, draw: Draw) -> str | None:
    """Delete a service and create it again under its name."""
    key, service = _service(world, draw)
    world.client.delete("LLMService", *key)
    world.client.create("LLMService", copy.deepcopy(service))
    return key[1]


@event(2, harm=Harm.PACK)
def delete_pack(world: World, draw: Draw) -> str | None:
    """Somebody deletes a GPUPack by hand."""
    pack = choose(world.client.list("GPUPack"), draw.first)
    if pack is not None:
        world.client.delete("GPUPack", "", pack["metadata"]["name"])
    return pack["metadata"]["name"] if pack else None


@event(2, harm=Harm.PACK)
def delete_statefulset(world: World, draw: Draw) -> str | None:
    """Somebody deletes a StatefulSet by hand."""
    found = choose(world.client.list("StatefulSet", label="app.kubernetes.io/part-of=tightship"), draw.first)
    if found is not None:
        world.client.delete("StatefulSet", found["metadata"]["namespace"], found["metadata"]["name"])
    return _place(found) if found else None
