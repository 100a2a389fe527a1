"""Which way a service's GPUs are shared, and the words for why. Pure over the store.

`packing.mode` is a wish. One replica per GPU shares nothing, so where that is the final word packs are `Exclusive`, whatever was asked;
else Auto takes DRA where the cluster offers GPUs of the product so, and Reservation where it doesn't, or where the service has topology
spread constraints, which only holders and replicas with a GPU each can follow. A pack keeps the mode it was made
in, and as long as that mode would still do a service's further packs get it too: what serves isn't moved because a driver was installed.
Only from Exclusive to a shared GPU there is no way but a move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.core.advisor import Recommendation
from tightship.kube.kinds import DRA_KINDS, KINDS
from tightship.kube.store import Store
from tightship.manifests.claims import CLAIMED_DEVICE, DEVICE_CLASS, SHARED_DEVICE
from tightship.reconcile import dra, nodes

RESERVATION, DRA, DEVICE_PLUGIN, EXCLUSIVE, CPU_SET = "Reservation", "DRA", "DevicePlugin", "Exclusive", "CPUSet"


@dataclass(frozen=True)
class Choice:
    """A pack's mode, who hands its GPU out, and as what (GPUPack's `mode`, `allocator` and `resource`)."""

    mode: str
    allocator: str = "DevicePlugin"
    resource: str = labels.GPU_RESOURCE

    @property
    def device(self) -> str:
        """What the planner counts such packs in."""
        if self.mode == DEVICE_PLUGIN:
            return SHARED_DEVICE
        return "cpu" if self.mode == CPU_SET else CLAIMED_DEVICE if self.allocator == DRA else "cuda"

    @property
    def key(self) -> str:
        """The same in one word: what begins the planner's mode."""
        return f"{self.mode}:{self.resource}" if self.mode == DEVICE_PLUGIN else self.mode


def of_pack(pack: GPUPack) -> Choice:
    """The mode a pack was made in."""
    return (
        Choice(pack.spec.mode, pack.spec.allocator, pack.spec.resource)
        if pack.spec.device == "cuda"
        else Choice(CPU_SET)
    )


def choose(service: LLMService, decision: Recommendation | None, packs: Iterable[GPUPack], store: Store) -> Choice:
    """The mode of the packs that a service gets from now on."""
    if service.spec.accelerator.device == "cpu":
        return Choice(CPU_SET)
    wanted = _acceptable(service, decision, store)
    mine = {
        of_pack(pack)
        for pack in packs
        if any(each.uid == service.metadata.uid and each.replicas for each in pack.spec.assignments)
    }
    return next((each for each in wanted if each in mine), wanted[0])


def _acceptable(service: LLMService, decision: Recommendation | None, store: Store) -> list[Choice]:
    """The modes that would do, the best one first."""
    asked, product = service.spec.packing.mode, service.spec.accelerator.product or ""
    claimed = dra.offered(store, product) > 0
    alone = [Choice(EXCLUSIVE), Choice(EXCLUSIVE, DRA)]
    if only_claims(store, product):
        alone.reverse()
    if asked == EXCLUSIVE:
        return alone
    if asked == DEVICE_PLUGIN:
        # Its nodes have no whole GPUs to give, so one replica has a share there as well.
        return [Choice(DEVICE_PLUGIN, resource=each.resource) for each in shared_nodes(store, product)] or [
            Choice(DEVICE_PLUGIN)
        ]
    claimed = claimed and not (spreads(service) and _plugged(store, product))
    shared = {
        RESERVATION: [Choice(RESERVATION)],
        DRA: [Choice(DRA, DRA)],
    }.get(asked) or ([Choice(DRA, DRA), Choice(RESERVATION)] if claimed else [Choice(RESERVATION), Choice(DRA, DRA)])
    if asked == DRA:
        alone = [Choice(EXCLUSIVE, DRA)]
    return [*alone, *shared] if is_alone(decision) else shared


def spreads(service: LLMService) -> bool:
    """Whether a service has topology spread constraints, which replicas that share a GPU by a claim, or by its device plugin, can't follow."""
    return bool(service.spec.template.spec.topology_spread_constraints)


def is_alone(decision: Recommendation | None) -> bool:
    """Whether one replica on each GPU is the final word: packing doesn't pay, or only one fits (not: it has yet to be tried)."""
    return (
        decision is not None
        and decision.applied is not None
        and decision.applied.replicas == 1
        and (decision.applied == decision.chosen)
    )


def only_claims(store: Store, product: str) -> bool:
    """Whether GPUs of a product are to be had by claims and not as whole ones of the device plugin."""
    return dra.offered(store, product) > 0 and not _plugged(store, product)


def _plugged(store: Store, product: str) -> int:
    """Whole GPUs of a product that the device plugin hands out."""
    return store.summarise("Node", nodes.whole_by_product).get(product, 0)


def unavailable(service: LLMService, store: Store, absent: frozenset[str]) -> str | None:
    """What is in the way of the mode that a manifest asks for by name; None where nothing is."""
    accelerator = service.spec.accelerator
    if accelerator.device == "cuda" and service.spec.packing.mode == DEVICE_PLUGIN:
        return _unshared(store, accelerator.product or "")
    if service.spec.packing.mode != DRA or accelerator.device == "cpu":
        return None
    lack = _lack(store, accelerator.product or "", absent)
    if lack is None:
        return None
    return f"packing.mode DRA can't be had: {lack}; install NVIDIA's DRA driver with GPU allocation and its MPSSupport gate, or set Auto"


def shared_nodes(store: Store, product: str) -> list[nodes.Shares]:
    """The nodes whose device plugin shares GPUs of a product by MPS."""
    return store.summarise("Node", nodes.shares_by_product).get(product, [])


def _unshared(store: Store, product: str) -> str | None:
    if shared_nodes(store, product):
        return None
    others = sorted(store.summarise("Node", nodes.shares_by_product))
    there = f"only GPUs of {', '.join(others)} are" if others else "no node's GPUs are"
    return (
        f"packing.mode DevicePlugin needs nodes whose device plugin shares {product} by MPS (label {labels.NODE_GPU_SHARING}=mps), and {there} "
        "shared so: set sharing.mps in the device plugin's configuration on a node, or packing.mode Reservation"
    )


def most_shares(store: Store, product: str) -> int:
    """Replicas that get a share of one GPU on any of those nodes; 0 where there is none."""
    return min((each.clients for each in shared_nodes(store, product)), default=0)


def too_small(service: LLMService, memory: int, store: Store) -> str | None:
    """Why a replica of so many bytes can't live with a share of a GPU; None where it can, or where it gets none."""
    if service.spec.accelerator.device == "cpu" or service.spec.packing.mode != DEVICE_PLUGIN:
        return None
    for each in shared_nodes(store, service.spec.accelerator.product or ""):
        if each.memory is not None and memory > each.memory // each.clients:
            need, limit, whole = (
                units.format_quantity(amount) for amount in (memory, each.memory // each.clients, each.memory)
            )
            return (
                f"a replica needs {need}, and the device plugin on node {each.node} lets each of {each.clients} clients have {limit} of {whole}: "
                f"at most {each.memory // memory} would do in its sharing.mps, or use packing.mode Reservation, which sets no such limit"
            )
    return None


def limits(pack: GPUPack, store: Store) -> str:
    """What the device plugin forces on the replicas of a pack, in words and numbers."""
    found = [each for each in shared_nodes(store, pack.spec.product or "") if pack.status.node in (None, each.node)]
    if not found:
        return "the device plugin limits each replica's memory and threads"
    each, memory = found[0], "that share of its memory"
    if each.memory is not None:
        memory = f"{units.format_quantity(each.memory // each.clients)} of {units.format_quantity(each.memory)}"
    return (
        f"each of {each.clients} clients of a GPU has at most {memory} and {100 / each.clients:.3g} % of its threads, as the device plugin "
        f"sets them, so throughput isn't what was measured; one daemon serves all GPUs of node {each.node}, and a fault of one blocks the "
        "others; that replicas get one GPU is luck, and checked"
    )


def _lack(store: Store, product: str, absent: frozenset[str]) -> str | None:
    """Why claims can't get GPUs of a product; None where they can."""
    missing = sorted(absent & set(DRA_KINDS))
    if missing:
        return f"this cluster doesn't serve {KINDS[missing[0]].api_version} ({', '.join(missing)}), which it needs Kubernetes 1.34 for"
    if store.get("DeviceClass", "", DEVICE_CLASS) is None:
        return f"there is no DeviceClass {DEVICE_CLASS}"
    if dra.offered(store, product):
        return None
    there = ", ".join(
        f"{gpus} of {name} on {count} nodes" for name, (count, gpus) in sorted(dra.products(store).items())
    )
    return f"no ResourceSlice of driver {labels.DRA_DRIVER} offers {product} (offered: {there or 'no GPU at all'})"


def explain(pack: GPUPack, opener: LLMService | None, store: Store, absent: frozenset[str]) -> str:
    """Which mode a pack has and why, and what is wrong with its node, in words for `SharingReady`."""
    mode, product = pack.spec.mode, pack.spec.product or ""
    if pack.spec.device == "cpu":
        return ""
    asked = opener.spec.packing.mode if opener is not None else mode
    why = {
        (EXCLUSIVE, EXCLUSIVE): "as packing.mode asks",
        (
            EXCLUSIVE,
            asked,
        ): "one replica on each GPU is the best there is, so nothing is shared (Recommended and Packed say why)",
        (RESERVATION, "Auto"): _lack(store, product, absent)
        or (
            "its topologySpreadConstraints can't be followed in mode DRA"
            if opener is not None and spreads(opener)
            else "it was made before DRA offered such GPUs, and packs don't change"
        ),
        (DRA, "Auto"): f"driver {labels.DRA_DRIVER} offers {dra.offered(store, product)} such GPUs",
        (mode, mode): "as packing.mode asks",
    }.get((mode, asked), f"packing.mode is {asked} by now, and packs don't change")
    by_auto = ", chosen by Auto" if asked == "Auto" else ""
    words = [f"mode {mode}{by_auto}: {why}", *_unspread(mode, opener), *twice_served(pack.status.node, store)]
    return "; ".join(words)


def _unspread(mode: str, opener: LLMService | None) -> list[str]:
    """The warning that a service's topology spread constraints count for nothing in a pack's mode."""
    if mode not in (DRA, DEVICE_PLUGIN) or opener is None or not spreads(opener):
        return []
    return [
        f"warning: template.spec.topologySpreadConstraints are not followed in mode {mode}, where replicas of a pack must be together and "
        "nothing else chooses their node: use packing.mode Reservation or Exclusive for them"
    ]


def twice_served(name: str | None, store: Store) -> list[str]:
    """The warning that a node's GPUs are handed out by DRA and by the device plugin, each without knowing of the other."""
    node = store.get("Node", "", name) if name else None
    claimed = dra.on_node(store, name) if name else 0
    plugged = nodes.plugged(node) if node is not None else 0
    if not claimed or not plugged:
        return []
    return [
        f"warning: node {name} offers its GPUs twice, {claimed} by DRA and {plugged} as {labels.GPU_RESOURCE}, so one may be given to two: "
        "turn one of them off there"
    ]
