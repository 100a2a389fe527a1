"""The operator's decisions about manifests, without a cluster: what it would place where, and what it would say of each service.

Everything is decided by the operator's own functions over a store that holds nothing but the manifests and the nodes: profiles get the
status that their reconciler would give them, services theirs, then one placement pass is planned and its packs are put there too. Only
what needs a cluster is left out: nothing is measured, no GPU is held, no pod runs. Pure but for reading what it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.validation import InvalidSpecError, parse_service
from tightship.core import placement
from tightship.core.conditions import Condition
from tightship.core.placement import Plan, ServiceRef, Snapshot
from tightship.kube.store import Object, Store
from tightship.manifests import packs as manifests
from tightship.reconcile import batchprofile, llmservice, servicestatus, snapshot
from tightship.reconcile.batchprofile import Observed
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.servicestatus import View
from tightship.reconcile.verdict import Verdict

IMAGINED = "any-"
"""Beginning of the names of nodes that nobody has."""


@dataclass(frozen=True)
class Told:
    """What the operator would say of one service: the first gate that fails, None where nothing does short of its pods."""

    service: ServiceRef
    verdict: Verdict
    failing: Condition | None


@dataclass(frozen=True)
class Rehearsal:
    """The plan, and the cluster as it would be then."""

    plan: Plan
    after: Snapshot
    told: tuple[Told, ...]


def rehearse(objects: Iterable[Object], now: datetime) -> Rehearsal:
    """Decide on services, profiles, ConfigMaps and nodes as the operator would.

    Each has a name, and a namespace where its kind has one; what else a cluster would add may be missing.
    """
    store = Store(indexers=INDEXERS)
    for obj in objects:
        store.observe(_as_stored(obj))
    for profile in store.list("BatchProfile"):
        _finish_profile(store, profile, now)
    services = store.list("LLMService")
    for service in services:
        status = servicestatus.status(llmservice.gather(store, service), now)
        store.observe({**service, "status": status})
    plan = placement.plan(snapshot.take(store, now))
    for pack in plan.create:
        owner = parse_service(store.get("LLMService", pack.owner.namespace, pack.owner.name) or {})
        store.observe(_as_stored(manifests.gpu_pack(pack, owner)))
    return Rehearsal(
        plan, snapshot.take(store, now), tuple(_told(store, service, plan) for service in store.list("LLMService"))
    )


def _as_stored(obj: Object) -> dict[str, Any]:
    """An object with a UID, and without a version that would make a later one of ours look old."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    own = "/".join((obj["kind"], metadata.get("namespace", ""), metadata["name"]))
    return {**obj, "metadata": {"uid": own, "generation": 1, **metadata}}


def _finish_profile(store: Store, obj: Object, now: datetime) -> None:
    """Give an imported profile its status; one that was measured has brought its own, as far as it got."""
    profile, problems = batchprofile.read(obj)
    if not problems and (profile is None or profile.spec.results is None):
        return
    seen = Observed(obj=obj, profile=profile, problems=problems, now=now)
    store.observe({**obj, "status": batchprofile.status(seen, batchprofile.decide(seen))})


def _told(store: Store, obj: Object, plan: Plan) -> Told:
    ref = ServiceRef(obj["metadata"]["namespace"], obj["metadata"]["name"])
    view = llmservice.gather(store, obj, shortfall=plan.shortfall_of(ref))
    return Told(ref, view.verdict, _failing(view))


def _failing(view: View) -> Condition | None:
    chains = (servicestatus.ACCEPTED, servicestatus.PROFILED, servicestatus.RECOMMENDED, servicestatus.PACKED)
    for gate in (servicestatus.first(view, chain) for chain in chains):
        if gate.type == names.PROFILED and gate.status != "True":
            return _unprofiled(view, gate)
        # That packs wait for their first look is all that may be said of them here.
        if gate.status == "False" or (gate.status == "Unknown" and gate.type != names.PACKED):
            return gate
    return None


def _unprofiled(view: View, gate: Condition) -> Condition:
    verdict = view.verdict
    if (
        verdict.profile is not None
        or verdict.key is None
        or verdict.service is None
        or verdict.service.spec.profile_ref
    ):
        return gate
    text = (
        f"no BatchProfile of its key {verdict.key.hash[:10]} is among the manifests (it would be called {verdict.profile_name}): "
        f"measure it with `tightship profile -f SERVICE.yaml -o profile.yaml`, or take it from a cluster that has it with "
        f"`tightship profile export {verdict.profile_name} -n {view.obj['metadata']['namespace']} -o profile.yaml`, and give that file too"
    )
    return Condition(gate.type, "False", Reason.WAITING, text)


def imagine_nodes(objects: Iterable[Object]) -> list[dict[str, Any]]:
    """Nodes on which every replica of the services could have a device of its own: one for each product and set of node labels asked for."""
    amounts: dict[tuple[str, tuple[tuple[str, str], ...]], Counter[str]] = {}
    for obj in objects:
        if obj["kind"] != "LLMService":
            continue
        try:
            service = parse_service(obj)
        except InvalidSpecError:
            continue
        accelerator, replicas = service.spec.accelerator, max(1, service.spec.replicas)
        selector = tuple(sorted(service.spec.template.spec.node_selector.items()))
        amount = amounts.setdefault((accelerator.product or "", selector), Counter())
        amount["gpus"] += replicas if accelerator.device == "cuda" else 0
        amount["cores"] += replicas * (accelerator.cores or 0)
        amount["memory"] += replicas * units.parse_quantity(accelerator.memory or "0")
    return [
        _node(f"{IMAGINED}{number}", product, dict(selector), amount)
        for number, ((product, selector), amount) in enumerate(sorted(amounts.items()))
    ]


def _node(name: str, product: str, carried: Mapping[str, str], amount: Mapping[str, int]) -> dict[str, Any]:
    there = {"cpu": str(amount["cores"]), "memory": str(amount["memory"])}
    if product:
        there[labels.GPU_RESOURCE] = str(amount["gpus"])
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {**carried, **({labels.NODE_GPU_PRODUCT: product} if product else {})}},
        "status": {"allocatable": there},
    }
