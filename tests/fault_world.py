"""What goes wrong on a pack, as the API shows it: verbs for stories on `pack_world`, each one thing that a node, a kubelet or a person does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pack_world import GIB, PRODUCT, World, complete
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.core.conditions import timestamp
from tightship.kube.cluster import Cluster
from tightship.kube.events import Events
from tightship.kube.store import Store
from tightship.reconcile.context import Context, Settings
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.queue import Queue
from tightship.telemetry.metrics import Metrics

NS, SYSTEM = "default", "tightship-system"
PACK, OTHER = "default-opt-0", "default-opt-1"
CPU = {"device": "cpu", "cores": 2, "coresPerReplica": 1, "memory": "60Gi"}


async def make_packed(gpus: tuple[int, ...] = (2, 2), replicas: int = 2, **changes: Any) -> World:
    """A service of `replicas` replicas, two on each GPU, all serving."""
    world = await make_placed(gpus, replicas, **changes)
    await world.run()
    return world


async def make_placed(
    gpus: tuple[int, ...] = (2, 2),
    replicas: int = 2,
    started: Callable[[dict[str, Any]], bool] = lambda pod: True,
    **changes: Any,
) -> World:
    """The same, when the placement pass has just made its packs; `started` decides which pods will become ready."""
    world = World(gpus=gpus)
    world.started = started
    world.put(make_service(replicas=replicas, **changes))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.settle()
    return world


async def time_passes(world: World, seconds: float) -> None:
    """Nothing happens but that time passes: the operator looks at what it meant to look at again by then."""
    await world.clock.advance(seconds)
    world.queue._promote()
    await world.settle()


def restart_operator(world: World) -> None:
    """Another operator process on the same cluster: it knows nothing but what the API shows."""
    world.queue, world.store = Queue(world.clock), Store(world._changed, INDEXERS)
    world.cluster = Cluster(world.api, world.store, clock=world.clock)
    events = Events(world.cluster, world.clock)
    world.ctx = Context(
        world.cluster, world.store, world.queue, world.clock, Settings(status_interval=0), Metrics(), events
    )


def condition(world: World, which: str, pack: str = PACK) -> tuple[str, str]:
    return world.condition("GPUPack", "", pack, which)[:2]


def message(world: World, which: str, pack: str = PACK) -> str:
    return world.condition("GPUPack", "", pack, which)[2]


def status(world: World, pack: str = PACK) -> dict[str, Any]:
    return dict(world.get("GPUPack", "", pack)["status"])


def replicas(world: World, pack: str = PACK) -> list[dict[str, Any]]:
    """The pack's replica pods, by name."""
    found = [pod for pod in world.all("Pod") if pod["metadata"]["labels"].get(labels.PACK) == pack]
    return [pod for pod in found if pod["metadata"]["labels"][labels.COMPONENT] == labels.COMPONENT_REPLICA]


def uids(world: World, pack: str = PACK) -> set[str]:
    return {pod["metadata"]["uid"] for pod in replicas(world, pack)}


def holder(pack: str = PACK) -> str:
    return f"holder-{pack}"


def change_holder(world: World, how: Callable[[dict[str, Any]], None], pack: str = PACK) -> None:
    world.change("Pod", SYSTEM, holder(pack), how)


def container_ends(
    world: World, pod: dict[str, Any], name: str, *, restarts: int = 1, exit_code: int = 1, words: str = "", **more: Any
) -> None:
    """The kubelet reports that one container of a pod ended and waits to be started anew; the pod is not ready."""
    ended = {"exitCode": exit_code, "message": words, **more}

    def change(found: dict[str, Any]) -> None:
        names = [each["name"] for each in found["spec"]["containers"]]
        found["status"] = {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": timestamp(world.clock.now())}],
            "containerStatuses": [
                {
                    "name": each,
                    "restartCount": restarts,
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": ended},
                }
                if each == name
                else {"name": each, "restartCount": 0, "state": {"running": {}}}
                for each in names
            ],
        }

    world.change("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"], change)


def runs_again(world: World, pod: dict[str, Any], restarts: int = 1) -> None:
    """All containers of a pod run, and it is ready, since now."""
    now = timestamp(world.clock.now())

    def change(found: dict[str, Any]) -> None:
        found["status"] = {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
            "containerStatuses": [
                {"name": each["name"], "restartCount": restarts, "state": {"running": {"startedAt": now}}}
                for each in found["spec"]["containers"]
            ],
        }

    world.change("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"], change)


def node_falls_silent(world: World, name: str = "n0") -> None:
    since = timestamp(world.clock.now())
    silent = [{"type": "Ready", "status": "Unknown", "lastTransitionTime": since}]
    world.change("Node", "", name, lambda node: node["status"].update(conditions=silent))


def gpu_is_lost(world: World, pack: str = PACK, restarts: int = 2) -> None:
    """nvidia-smi finds no GPU any more: the holder's container says so and ends, and its watcher takes the identity back."""
    found = world.get("Pod", SYSTEM, holder(pack))
    words = "GPUNotVisible: nvidia-smi ended with 15: Unable to determine the device handle: GPU is lost"
    container_ends(world, found, "mps", restarts=restarts, words=words)
    change_holder(world, lambda pod: pod["metadata"]["annotations"].pop(labels.ANNOTATION_GPU), pack)


def gpu_is_taken(world: World, pack: str = PACK) -> None:
    """The holder is deleted, and a pod of somebody else is on the GPU before the next holder is made."""
    found = world.get("Pod", SYSTEM, holder(pack))
    stranger = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "stranger", "namespace": NS, "labels": {}},
        "spec": {"nodeName": found["spec"]["nodeName"], "containers": found["spec"]["containers"]},
        "status": {"phase": "Running"},
    }
    world.put(stranger)
    world.remove("Pod", SYSTEM, holder(pack))


def saw(pod: dict[str, Any], free: int, uuid: str = f"GPU-{PACK}") -> dict[str, dict[str, Any]]:
    """A replica's preflight as the watcher publishes it; `free` in GiB."""
    return {pod["metadata"]["uid"]: {"uuid": uuid, "total": 80 * GIB, "free": free * GIB}}


__all__ = ["CPU", "GIB", "NS", "OTHER", "PACK", "PRODUCT", "SYSTEM", "make_service"]
