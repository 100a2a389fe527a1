"""Clusters that offer GPUs in the ways other than a holder's, and a service that is packed there, for tests of the sharing modes."""

from __future__ import annotations

from typing import Any

from pack_world import PRODUCT, World, complete, make_class, make_slice
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.kube.kinds import DRA_KINDS

NS = "default"


def make_world(*, dra: tuple[int, ...] = (), gpus: tuple[int, ...] = (2, 2)) -> World:
    """A cluster whose nodes have GPUs by the device plugin (`gpus`), and those of them named in `dra` by NVIDIA's DRA driver."""
    world = World(gpus=gpus)
    if dra:
        world.put(make_class())
        for index, count in enumerate(dra):
            if count:
                world.put(make_slice(f"n{index}", count))
    else:
        world.ctx.absent = frozenset(DRA_KINDS)
    return world


async def pack(world: World, replicas: int = 2, trials: Any = None, **changes: Any) -> World:
    world.put(make_service(replicas=replicas, **changes))
    await world.settle()
    (profile,) = world.all("BatchProfile")
    more = {} if trials is None else {"trials": trials}
    world.change("BatchProfile", NS, profile["metadata"]["name"], lambda obj: complete(obj, **more))
    await world.run(rounds=12)
    return world


def make_shared_world(clients: int, gpus: int = 1) -> World:
    """A node whose device plugin shares its GPUs of 80 GiB among that many pods each."""
    world = make_world(gpus=(0,))

    def share(node: dict[str, Any]) -> None:
        node["metadata"]["labels"] = {
            labels.NODE_GPU_PRODUCT: PRODUCT,
            labels.NODE_GPU_SHARING: "mps",
            labels.NODE_GPU_REPLICAS: str(clients),
            labels.NODE_GPU_COUNT: str(gpus),
            labels.NODE_GPU_MEMORY: str(80 << 10),
        }
        node["status"]["allocatable"] |= {labels.GPU_RESOURCE: "0", labels.SHARED_GPU_RESOURCE: str(gpus * clients)}

    world.change("Node", "", "n0", share)
    world.reports = lambda pod: world.seen_by(pod) | {"uuid": "GPU-n0-0", "total": 40 << 30, "mps": True}
    return world


SHARED = {"packing": {"mode": "DevicePlugin", "maxReplicasPerGPU": 2}}
