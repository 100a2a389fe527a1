"""GPUs that dynamic resource allocation hands out, as the API server shows them. Pure over the store.

NVIDIA's driver publishes each GPU as a device in a ResourceSlice (attributes `uuid`, `productName`; capacity `memory`), the scheduler
allocates one to a ResourceClaim when its first pod is scheduled, and writes into the claim's status which. Nothing of that is ever
written here. What must always hold: a GPU counts as free only when no claim has it; a slice of an older generation of its pool counts
for nothing; an allocation counts as a pack's only when the claim is the pack's own object, not merely of its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.gpupack import GPUPack, PackGPU
from tightship.kube.store import Object, Store, labels_of
from tightship.manifests.claims import DEVICE_CLASS, claim_name, product_of


@dataclass(frozen=True)
class Gpu:
    """A whole GPU in a ResourceSlice; `memory` in bytes. `pool` and `device` are how an allocation names it."""

    pool: str
    device: str
    node: str
    uuid: str | None
    product: str
    memory: int | None
    driver: str | None

    def as_pack_gpu(self) -> PackGPU:
        """The same as a pack's status has it."""
        memory = units.format_quantity(self.memory) if self.memory is not None else None
        return PackGPU(uuid=self.uuid, product=self.product, memory=memory, driver=self.driver)


def gpus(store: Store) -> tuple[Gpu, ...]:
    """The whole GPUs that NVIDIA's driver offers, each once; `product` as on a node's label."""
    return store.summarise("ResourceSlice", _gpus)


def _gpus(listed: list[Object]) -> tuple[Gpu, ...]:
    slices = [each for each in listed if each["spec"].get("driver") == labels.DRA_DRIVER]
    newest: dict[str, int] = {}
    for each in slices:
        pool = each["spec"]["pool"]
        newest[pool["name"]] = max(int(pool.get("generation", 0)), newest.get(pool["name"], 0))
    found = []
    for each in slices:
        spec, pool = each["spec"], each["spec"]["pool"]
        node = spec.get("nodeName")
        if node and int(pool.get("generation", 0)) == newest[pool["name"]]:
            found += [_gpu(pool["name"], node, device) for device in spec.get("devices") or () if _is_whole(device)]
    return tuple(sorted(found, key=lambda gpu: (gpu.node, gpu.pool, gpu.device)))


def _is_whole(device: Mapping[str, Any]) -> bool:
    return _attribute(device, "type") in (None, "gpu")


def _gpu(pool: str, node: str, device: Mapping[str, Any]) -> Gpu:
    memory = (_qualified(device.get("capacity"), "memory") or {}).get("value")
    return Gpu(
        pool,
        str(device["name"]),
        str(node),
        _attribute(device, "uuid"),
        product_of(_attribute(device, "productName") or ""),
        units.parse_quantity(str(memory)) if memory is not None else None,
        _attribute(device, "driverVersion"),
    )


def _attribute(device: Mapping[str, Any], name: str) -> str | None:
    """An attribute as text: its value is under the name of its type."""
    value = _qualified(device.get("attributes"), name) or {}
    return str(next(iter(value.values()))) if value else None


def _qualified(values: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """An entry by its name, with the driver's domain before it or without."""
    found = (values or {}).get(name, (values or {}).get(f"{labels.DRA_DRIVER}/{name}"))
    return found if isinstance(found, Mapping) else None


def allocated(claim: Object) -> list[tuple[str, str]]:
    """Pool and device of each of NVIDIA's that a claim has."""
    devices = ((claim.get("status") or {}).get("allocation") or {}).get("devices") or {}
    return [
        (str(each["pool"]), str(each["device"]))
        for each in devices.get("results") or ()
        if each.get("driver") == labels.DRA_DRIVER
    ]


def free(store: Store) -> list[Gpu]:
    """The GPUs that no claim but those of packs has: what placement shares out, its packs included."""
    taken = store.summarise("ResourceClaim", _taken)
    return [gpu for gpu in gpus(store) if (gpu.pool, gpu.device) not in taken]


def _taken(claims: list[Object]) -> frozenset[tuple[str, str]]:
    return frozenset(device for claim in claims if labels.PACK not in labels_of(claim) for device in allocated(claim))


def claim_of(store: Store, pack: GPUPack) -> Object | None:
    """The pack's ResourceClaim."""
    claim = store.get("ResourceClaim", pack.spec.namespace, claim_name(pack))
    owners = (claim or {"metadata": {}})["metadata"].get("ownerReferences") or ()
    return claim if any(each.get("uid") == pack.metadata.uid for each in owners) else None


def gpu_of(store: Store, pack: GPUPack) -> Gpu | None:
    """The GPU that is allocated to the pack's claim now; None while none is, or the driver doesn't show it."""
    claim = claim_of(store, pack)
    if claim is None:
        return None
    there = store.summarise("ResourceSlice", _by_name)
    return next((there[device] for device in sorted(allocated(claim)) if device in there), None)


def _by_name(slices: list[Object]) -> dict[tuple[str, str], Gpu]:
    return {(gpu.pool, gpu.device): gpu for gpu in _gpus(slices)}


def offered(store: Store, product: str) -> int:
    """How many GPUs of a product claims could get, taken or not; 0 also where the class for them is missing."""
    if store.get("DeviceClass", "", DEVICE_CLASS) is None:
        return 0
    return products(store).get(product, (0, 0))[1]


def products(store: Store) -> dict[str, tuple[int, int]]:
    """Nodes and GPUs by product."""
    return store.summarise("ResourceSlice", _products)


def _products(slices: list[Object]) -> dict[str, tuple[int, int]]:
    found = _gpus(slices)
    nodes = Counter(product for product, _ in {(gpu.product, gpu.node) for gpu in found})
    return {product: (nodes[product], count) for product, count in Counter(gpu.product for gpu in found).items()}


def on_node(store: Store, name: str) -> int:
    """How many GPUs of a node claims could get."""
    return store.summarise("ResourceSlice", _on_nodes).get(name, 0)


def _on_nodes(slices: list[Object]) -> dict[str, int]:
    return dict(Counter(gpu.node for gpu in _gpus(slices)))


def by_node(found: Iterable[Gpu]) -> dict[tuple[str, str], int]:
    """GPUs by node and product."""
    return dict(Counter((gpu.node, gpu.product) for gpu in found))
