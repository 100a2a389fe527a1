"""What a node tells of its GPUs: which the device plugin gives whole, and how they are divided where it doesn't. Pure.

Tightship shares whole GPUs itself. A node whose GPUs are cut into MIG slices, or handed to several pods by the device plugin, has none
to give: it is left alone, and said so with its numbers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.kube.store import Object, labels_of

_MARKS = re.compile(r"(-MIG-[0-9a-z.+]+)?(-SHARED)?$")


def product(node: Object) -> str:
    """The product of a node's GPUs, whole; "" for none."""
    return whole(labels_of(node).get(labels.NODE_GPU_PRODUCT, ""))


def whole(name: str) -> str:
    """A product without what GPU feature discovery puts behind it for slices and shares."""
    return _MARKS.sub("", name, count=1)


def plugged(node: Object) -> int:
    """GPUs that the device plugin gives of a node, whole or not."""
    there = (node.get("status") or {}).get("allocatable") or {}
    return units.parse_quantity(there.get(labels.GPU_RESOURCE, "0"))


def whole_gpus(nodes: Iterable[Object]) -> list[tuple[str, str, int]]:
    """Name, product and number of GPUs of each node whose device plugin gives whole ones."""
    return [
        (str(node["metadata"]["name"]), product(node), plugged(node))
        for node in nodes
        if product(node)
        and labels.GPU_RESOURCE in ((node.get("status") or {}).get("allocatable") or {})
        and not divided(node)
    ]


def whole_by_product(nodes: Iterable[Object]) -> dict[str, int]:
    """The number of such GPUs by product."""
    found: Counter[str] = Counter()
    for _, name, count in whole_gpus(nodes):
        found[name] += count
    return dict(found)


def divided(node: Object) -> str | None:
    """How a node's GPUs are divided among pods already, in words; None where a pod gets a whole one."""
    carried, there = labels_of(node), (node.get("status") or {}).get("allocatable") or {}
    strategy, name = carried.get(labels.NODE_MIG_STRATEGY, "none"), carried.get(labels.NODE_GPU_PRODUCT, "")
    slices = {
        key: units.parse_quantity(amount) for key, amount in there.items() if key.startswith(labels.MIG_RESOURCES)
    }
    count = f"{carried[labels.NODE_GPU_COUNT]} GPUs " if carried.get(labels.NODE_GPU_COUNT) else ""
    # Strategy `mixed` gives slices resources of their own, `single` gives them the whole GPU's name and a product of their own.
    if strategy != "none" and "-MIG-" in name:
        return f"{count}cut into {plugged(node)} MIG slices {name.partition('-MIG-')[2].removesuffix('-SHARED')} (strategy {strategy})"
    if strategy != "none" and any(slices.values()):
        told = ", ".join(f"{amount} {key}" for key, amount in sorted(slices.items()) if amount)
        return f"{count}cut into MIG slices: {told} (strategy {strategy})"
    sharing, replicas = carried.get(labels.NODE_GPU_SHARING, "none"), carried.get(labels.NODE_GPU_REPLICAS, "1")
    if sharing != "none" or name.endswith("-SHARED") or (replicas.isdigit() and int(replicas) > 1):
        how = sharing if sharing != "none" else "strategy not told"
        return f"{count}handed to {replicas} pods each by the device plugin ({how})"
    return None


@dataclass(frozen=True)
class Shares:
    """What the device plugin gives of a node that it shares by MPS: `gpus` GPUs to `clients` pods each, as `resource`; `memory` bytes each GPU."""

    node: str
    product: str
    gpus: int
    clients: int
    resource: str
    memory: int | None


def shares(nodes: Iterable[Object]) -> list[Shares]:
    """The nodes whose device plugin shares GPUs by MPS."""
    found = []
    for node in nodes:
        carried, there = labels_of(node), (node.get("status") or {}).get("allocatable") or {}
        replicas = carried.get(labels.NODE_GPU_REPLICAS, "")
        if (
            carried.get(labels.NODE_GPU_SHARING) != "mps"
            or not replicas.isdigit()
            or int(replicas) < 1
            or not product(node)
        ):
            continue
        resource = labels.SHARED_GPU_RESOURCE if labels.SHARED_GPU_RESOURCE in there else labels.GPU_RESOURCE
        gpus = units.parse_quantity(there.get(resource, "0")) // int(replicas)
        memory = carried.get(labels.NODE_GPU_MEMORY, "")
        size = int(memory) << 20 if memory.isdigit() else None
        found.append(Shares(str(node["metadata"]["name"]), product(node), gpus, int(replicas), resource, size))
    return found


def shares_by_product(nodes: Iterable[Object]) -> dict[str, list[Shares]]:
    """The same by the GPUs' product."""
    found = defaultdict(list)
    for each in shares(nodes):
        found[each.product].append(each)
    return dict(found)
