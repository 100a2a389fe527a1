"""The status of an LLMService: its gates in order, each an ordered chain of named checks, the first hit wins. Pure.

    Accepted -> Profiled -> Recommended -> Packed -> Available -> Ready

A gate that cannot be judged yet is Unknown and says what it waits for. `Ready` copies the first gate that is not True, also while the
replicas of an earlier manifest still serve; those keep `Available` True. `Stalled` appears when that gate waits for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.llmservice import (
    Applied,
    AvoidedNode,
    DefaultEngine,
    GPUCount,
    LastApplied,
    LatencyFigure,
    LLMServiceStatus,
    PackStatus,
    ProfileStatus,
    Recommendation,
)
from tightship.core import advisor, conditions, rollout
from tightship.core.backoff import Avoided
from tightship.core.conditions import Condition, find, timestamp
from tightship.core.placement import Shortfall, Spared
from tightship.kube.kinds import DRA_KINDS, KINDS, OPTIONAL
from tightship.kube.store import Object, labels_of
from tightship.manifests import service as service_manifests
from tightship.manifests.claims import CLAIMED_DEVICE
from tightship.manifests.replicas import set_name
from tightship.reconcile import extension, fleet, nodes, podstate
from tightship.reconcile.packview import current_revision, refused, revision_of
from tightship.reconcile.reading import failure_of, is_imported
from tightship.reconcile.snapshot import shape_of
from tightship.reconcile.verdict import WAITING_REASONS, Verdict

_STALLING = frozenset(
    {
        Reason.INVALID_SPEC,
        Reason.UNSUPPORTED_ACCELERATOR,
        Reason.NAME_CONFLICT,
        Reason.ENGINE_FAILED,
        Reason.NO_POINT_IN_BUDGET,
        Reason.JOB_FAILED,
        Reason.SLO_INFEASIBLE,
        Reason.EFFICIENCY_FLOOR_NOT_MET,
        Reason.INSUFFICIENT_MEMORY,
        Reason.AWAITING_APPROVAL,
        Reason.ROLLOUT_STOPPED,
    }
)

_PHASES = {
    names.ACCEPTED: "Rejected",
    names.PROFILED: "Profiling",
    names.RECOMMENDED: "Infeasible",
    names.PACKED: "Packing",
    names.AVAILABLE: "Starting",
    names.READY: "Starting",
}


@dataclass(frozen=True)
class Refusal:
    """Why an object of a service could not be written; `passing` when the next look may settle it, `spared` when it serves without."""

    reason: str
    message: str
    passing: bool = False
    spared: bool = False


@dataclass(frozen=True)
class View:
    """One service and everything its status speaks of.

    `refusals` are what only the apply step could find out (a Service that isn't ours); `packs` are those
    with replicas of it; `sets` and `pods` its StatefulSets and replica pods; `shortfall` what the planner found no place for;
    `approved` whether the decision may be applied; `absent` the optional kinds that the cluster lacks; `avoided` the nodes that its
    replicas are kept off, since they found no room there.
    """

    obj: Object
    verdict: Verdict
    products: tuple[tuple[str, int, int], ...]  # product, nodes, GPUs
    largest_cores: int
    refusals: tuple[Refusal, ...]
    sets: tuple[Object, ...]
    packs: tuple[GPUPack, ...]
    pods: tuple[Object, ...]
    shortfall: Shortfall | None
    approved: bool
    divided: tuple[tuple[str, str, str], ...] = ()  # product, node, how its GPUs are divided
    absent: frozenset[str] = frozenset()
    mode_problem: str | None = None  # why the mode that was asked for by name can't be had
    share_problem: str | None = None  # why a share of a GPU is too little for a replica
    avoided: tuple[Avoided, ...] = ()

    @property
    def generation(self) -> int:
        """The generation this view was taken of."""
        return int(self.obj["metadata"].get("generation") or 0)

    @property
    def uid(self) -> str:
        """The service's UID."""
        return str(self.obj["metadata"]["uid"])

    @property
    def wanted(self) -> int:
        """Replicas asked for; what an unreadable manifest asked for counts as nothing."""
        return self.verdict.service.spec.replicas if self.verdict.service else 0

    @property
    def assigned(self) -> int:
        """Replicas that packs hold for it."""
        return sum(assigned_to(pack, self.uid) for pack in self.packs)

    @property
    def ready(self) -> int:
        """Replicas that serve."""
        return sum(podstate.is_ready(pod) for pod in self.pods)

    @property
    def existing(self) -> int:
        """Replica pods, without those that are going."""
        return sum(not podstate.is_going(pod) for pod in self.pods)


Check = Callable[[View], "Condition | None"]


def assigned_to(pack: GPUPack, uid: str) -> int:
    """Replicas of one service on a pack."""
    return sum(each.replicas for each in pack.spec.assignments if each.uid == uid)


def neighbours(pack: GPUPack, uid: str) -> str:
    """What other services have on a pack, in words; "" where it is this service's alone."""
    others = sorted((each.service, each.replicas) for each in pack.spec.assignments if each.uid != uid)
    return ", ".join(f"{name} ({count} replica{'s' if count > 1 else ''})" for name, count in others)


def status(view: View, now: Any) -> dict[str, Any]:
    """The whole status to write."""
    gates = [first(view, checks) for checks in GATES]
    realised = _realised(view)
    summary = conditions.ready([*gates, realised], reason=Reason.FULLY_REALISED, message=realised.message)
    extra, absent = _kstatus(summary)
    existing = (view.obj.get("status") or {}).get("conditions") or []
    merged = conditions.merge(existing, [*gates, summary, *extra], generation=view.generation, now=now, absent=absent)
    return _fields(view, gates, summary) | {"conditions": merged}


def first(view: View, checks: Sequence[Check]) -> Condition:
    """The answer of the first check that has one; the last check of a chain always has."""
    for check in checks:
        found = check(view)
        if found is not None:
            return found
    raise AssertionError("a chain of checks ends with one that always answers")


# Accepted


def _unreadable(view: View) -> Condition | None:
    problems = view.verdict.problems
    if not problems:
        return None
    return Condition(names.ACCEPTED, "False", Reason.INVALID_SPEC, "; ".join(problems))


def _unavailable(view: View) -> Condition | None:
    if view.mode_problem is None:
        return None
    return Condition(names.ACCEPTED, "False", Reason.UNSUPPORTED_ACCELERATOR, view.mode_problem)


def _unsupported(view: View) -> Condition | None:
    service = view.verdict.service
    if service is None:
        return None
    accelerator, reason = service.spec.accelerator, Reason.UNSUPPORTED_ACCELERATOR
    if accelerator.device == "cpu":
        if (accelerator.cores or 1) <= view.largest_cores:
            return None
        text = (
            f"no node has {accelerator.cores} cores; the largest has {view.largest_cores}: lower spec.accelerator.cores"
        )
        return Condition(names.ACCEPTED, "False", reason, text)
    if service.spec.packing.mode == "DevicePlugin":
        return None  # what it needs of nodes is said above
    if any(product == accelerator.product for product, _, _ in view.products):
        return None
    shared = _divided(view)
    if shared:
        text = f"no node gives whole GPUs of product {accelerator.product}: {shared}. Tightship shares GPUs itself: "
        text += "turn that off on a node, or change spec.accelerator.product"
        return Condition(names.ACCEPTED, "False", reason, text)
    there = ", ".join(f"{name} ({gpus} GPUs on {count} nodes)" for name, count, gpus in view.products)
    have = f"this cluster has {there}" if there else "no node of this cluster carries the label nvidia.com/gpu.product"
    text = f"no node has GPU product {accelerator.product}; {have}: change spec.accelerator.product or add a node"
    return Condition(names.ACCEPTED, "False", reason, text)


def _divided(view: View) -> str:
    """The nodes that have GPUs of the service's product and don't give whole ones, in words."""
    service = view.verdict.service
    product = nodes.whole(service.spec.accelerator.product or "") if service is not None else None
    found = [f"node {node} has {how}" for each, node, how in view.divided if each == product]
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return "; ".join(found[:5]) + more


def _refused(view: View) -> Condition | None:
    refusal = next((each for each in view.refusals if not each.spared), None)
    if refusal is None:
        return None
    return Condition(names.ACCEPTED, "Unknown" if refusal.passing else "False", refusal.reason, refusal.message)


def _valid(view: View) -> Condition:
    text = "the manifest is valid, and a GPU or CPU of its kind is in the cluster"
    return Condition(names.ACCEPTED, "True", Reason.VALID, "; ".join([text, *_lacking(view), *_spared(view)]))


def _lacking(view: View) -> list[str]:
    """What of the manifest this cluster has no kind for."""
    service = view.verdict.service
    pooled = service is not None and service.spec.routing.mode == "InferencePool"
    return [
        f"this cluster doesn't serve {KINDS[kind].api_version} ({kind}): {OPTIONAL[kind]}"
        for kind in sorted(view.absent)
        if kind not in DRA_KINDS and (pooled or kind != "InferencePool")
    ]


def _spared(view: View) -> list[str]:
    """What the service does without, since somebody else has it under its name."""
    return [each.message for each in view.refusals if each.spared]


# Profiled


def _waits_for(kind: str, earlier: str) -> Condition:
    return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, f"waits for {earlier}")


def _not_accepted(kind: str) -> Check:
    def check(view: View) -> Condition | None:
        return _waits_for(kind, names.ACCEPTED) if first(view, ACCEPTED).status != "True" else None

    return check


def _no_profile(view: View) -> Condition | None:
    if view.verdict.profile is not None:
        return None
    service, name = view.verdict.service, view.verdict.profile_name
    if service is not None and service.spec.profile_ref is not None:
        text = f"BatchProfile {name} of spec.profileRef does not exist: create it, or leave profileRef out"
    else:
        text = f"BatchProfile {name} is being created"
    return Condition(names.PROFILED, "False", Reason.WAITING, text)


def _measured(view: View) -> Condition | None:
    profile = view.verdict.profile
    if profile is None or not view.verdict.complete:
        return None
    complete = find(_conditions(profile), names.COMPLETE) or {}
    reason = complete.get("reason", Reason.COMPLETED)
    if reason == Reason.COMPLETED and not _waited(view):
        reason = Reason.CACHE_HIT
    text = f"BatchProfile {view.verdict.profile_name}: {complete.get('message', '')}"
    return Condition(names.PROFILED, "True", reason, "; ".join([text, *_beside(view, profile)]))


def _beside(view: View, profile: Object) -> list[str]:
    """What is asked of a complete profile, and what comes of it."""
    progressing = find(_conditions(profile), names.PROGRESSING) or {}
    if progressing.get("status") == "True":
        return [f"meanwhile {progressing.get('message', '')}"]
    service = view.verdict.service
    if service is not None and service.spec.profiling.rerun is not None and is_imported(profile):
        return [
            "profiling.rerun measures nothing here, since this profile was imported (spec.results): delete it to have its key measured"
        ]
    return []


def _waited(view: View) -> bool:
    """Whether this service saw its profile unfinished before, and so caused or awaited the measurement."""
    was = view.obj.get("status") or {}
    same = (was.get("profile") or {}).get("name") == view.verdict.profile_name
    before = find(was.get("conditions") or (), names.PROFILED)
    return same and before is not None and before.get("reason") != Reason.CACHE_HIT


def _failed(view: View) -> Condition | None:
    failure = failure_of(view.verdict.profile) if view.verdict.profile is not None else None
    if failure is None:
        return None
    text = f"BatchProfile {view.verdict.profile_name}: {failure.get('message', '')}"
    return Condition(names.PROFILED, "False", failure.get("reason", Reason.JOB_FAILED), text)


def _measuring(view: View) -> Condition:
    profile = view.verdict.profile
    progressing = (find(_conditions(profile), names.PROGRESSING) if profile is not None else None) or {}
    reason = progressing.get("reason") if progressing.get("reason") in WAITING_REASONS else Reason.MEASURING
    text = progressing.get("message") or "waits for its first look"
    return Condition(names.PROFILED, "False", str(reason), f"BatchProfile {view.verdict.profile_name}: {text}")


# Recommended


def _not_profiled(view: View) -> Condition | None:
    if view.verdict.complete:
        return None
    failure = failure_of(view.verdict.profile) if view.verdict.profile is not None else None
    if failure is not None and failure.get("reason") == Reason.INSUFFICIENT_MEMORY:
        # The engine did not even start: what is too large is known without a curve.
        return Condition(names.RECOMMENDED, "False", Reason.INSUFFICIENT_MEMORY, str(failure.get("message", "")))
    return _waits_for(names.RECOMMENDED, names.PROFILED)


def _undecidable(view: View) -> Condition | None:
    text = view.verdict.unreadable
    return Condition(names.RECOMMENDED, "False", Reason.INVALID_SPEC, text) if text else None


def _infeasible(view: View) -> Condition | None:
    decision = view.verdict.decision
    if decision is None or decision.failure is None:
        return None
    return Condition(names.RECOMMENDED, "False", decision.failure.value, decision.message)


def _recommended(view: View) -> Condition:
    decision = view.verdict.decision
    if decision is None:
        return _waits_for(names.RECOMMENDED, names.PROFILED)
    trial = extension.words(view.verdict)
    text = "; ".join((decision.message, *decision.notes, *([trial] if trial else [])))
    return Condition(names.RECOMMENDED, "True", decision.basis.value, text)


# Packed


def _nothing_to_pack(view: View) -> Condition | None:
    return None if first(view, RECOMMENDED).status == "True" else _waits_for(names.PACKED, names.RECOMMENDED)


def _unknown_memory(view: View) -> Condition | None:
    decision = view.verdict.decision
    if view.verdict.shape is not None or decision is None:
        return None
    if decision.applied is None:
        text = f"{decision.message}: nothing that was measured may run meanwhile; profiling.extend has it tried"
        return Condition(names.PACKED, "False", Reason.SHARING_UNAVAILABLE, text)
    text = (
        f"BatchProfile {view.verdict.profile_name} holds no memory ledger, so nobody can tell how many replicas share a GPU: "
        "measure it again with time for the confirmation run (raise spec.profiling.budget, give spec.profiling.rerun a new text), "
        "or import a profile with `memory`"
    )
    return Condition(names.PACKED, "False", Reason.SHARING_UNAVAILABLE, text)


def _unapproved(view: View) -> Condition | None:
    if view.approved:
        return None
    decision = view.verdict.decision
    batch = decision.applied_batch if decision else None
    text = f"batch {batch} with {view.verdict.per_device} per GPU is what would run; set spec.autoApply to true to apply it"
    return Condition(names.PACKED, "False", Reason.AWAITING_APPROVAL, text)


def _lacks(view: View, short: Shortfall, device: str) -> str:
    return (
        f"{short.wanted - short.placed} of {short.wanted} replicas have no place: they need {short.packs_needed * short.units_per_pack} more "
        f"{device} ({short.per_pack} to a pack of {short.units_per_pack}{_spread(view, short.per_pack)})"
    )


def _spares(spared: Spared, device: str) -> str:
    """Why a new shape waits for the sake of another service."""
    return (
        f"with what each replica needs now, {spared.left} of {spared.service.name} would have a place, which shares what they run on, and "
        f"{spared.least} of those have to serve: it takes more {device}"
    )


def _share_too_small(view: View) -> Condition | None:
    if view.share_problem is None:
        return None
    return Condition(names.PACKED, "False", Reason.SHARING_UNAVAILABLE, view.share_problem)


def _too_few_gpus(view: View) -> Condition | None:
    short = view.shortfall
    if short is None:
        return None
    device = "cores" if short.device == "cpu" else f"{short.product} GPUs"
    text = _lacks(view, short, device) if short.spared is None else _spares(short.spared, device)
    text += f"; of {short.total} that this service may use {short.free} are free"
    if short.memory_per_pack:
        need, most = units.format_quantity(short.memory_per_pack), units.format_quantity(short.memory_free)
        text += f" on nodes with the {need} that a pack takes (at most {most} is free on one)"
    if view.avoided:
        cause = "want of room, or of their claim's GPU" if short.device == CLAIMED_DEVICE else "want of room"
        text += f"; kept off for {cause}: {', '.join(f'{each.node} until {timestamp(each.until)}' for each in view.avoided)}"
    if short.kept:
        text += f"; {short.kept} replicas stay where they are until then"
    if divided := _divided(view) if short.device in ("cuda", "dra") else "":
        text += f". Not counted, since they give no whole GPUs: {divided}"
    text += ". Add a node, free a GPU, or lower spec.replicas"
    return Condition(names.PACKED, "False", Reason.INSUFFICIENT_GPUS, text)


def _spread(view: View, per_pack: int) -> str:
    """Why fewer replicas go on one pack than may share one."""
    return f", where {view.verdict.per_device} fit, for packing.spread" if per_pack < view.verdict.per_device else ""


def _unplaced(view: View) -> Condition | None:
    shape = view.verdict.shape
    current = sum(
        each.replicas
        for pack in view.packs
        for each in pack.spec.assignments
        if each.uid == view.uid and shape_of(each) == shape
    )
    if current == view.wanted == view.assigned:
        return None
    text = f"{current} of {view.wanted} replicas are placed with this recommendation; the placement pass goes on"
    return Condition(names.PACKED, "Unknown", Reason.NOT_YET_KNOWN, text)


def _not_held(view: View) -> Condition | None:
    for pack in view.packs:
        held = _pack_condition(pack, names.HELD)
        if held is None or held.status == "Unknown":
            text = f"pack {pack.metadata.name}: {held.message if held else 'waits for its first look'}"
            return Condition(names.PACKED, "Unknown", Reason.NOT_YET_KNOWN, text)
        if held.status == "False":
            reason = Reason.INSUFFICIENT_GPUS if held.reason == Reason.UNSCHEDULABLE else Reason.SHARING_UNAVAILABLE
            return Condition(names.PACKED, "False", reason, f"pack {pack.metadata.name}: {held.message}")
    return None


def _not_shared(view: View) -> Condition | None:
    for pack in view.packs:
        shared = _pack_condition(pack, names.SHARING_READY)
        if shared is not None and shared.status == "False":
            text = f"pack {pack.metadata.name}: {shared.reason}: {shared.message}"
            return Condition(names.PACKED, "False", Reason.SHARING_UNAVAILABLE, text)
    return None


def _refused_pods(view: View) -> Condition | None:
    for pack in view.packs:
        running = _pack_condition(pack, names.REPLICAS_READY)
        if running is None or running.status != "False" or running.reason != Reason.SHARING_UNAVAILABLE:
            continue
        # Of a pack that is shared, what admission has against the others is theirs to tell.
        if not neighbours(pack, view.uid) or refused(view.obj["metadata"]["name"]) in running.message:
            return Condition(
                names.PACKED, "False", Reason.SHARING_UNAVAILABLE, f"pack {pack.metadata.name}: {running.message}"
            )
    return None


def _packed(view: View) -> Condition:
    packs = len(view.packs)
    text = f"{view.assigned} replicas on {packs} packs"
    if view.packs:
        text += " (" + ", ".join(f"{pack.metadata.name}: {assigned_to(pack, view.uid)}" for pack in view.packs) + ")"
    decision, most = view.verdict.decision, view.verdict.per_device
    beside = [f"{words} on {pack.metadata.name}" for pack in view.packs if (words := neighbours(pack, view.uid))]
    if beside:
        text += f"; shared with {', '.join(beside)}: that mix was not measured, latencies are of this service's replicas alone"
    spread = view.verdict.service is not None and view.verdict.service.spec.packing.spread
    needed = -(-view.assigned // most) if most else packs
    if packs > needed and not beside and not spread:
        text += f"; {most} fit on each, so {needed} would do: replicas that serve are not moved, `kubectl scale` to {needed} and back packs them"
    if decision is None or most != 1:
        return Condition(names.PACKED, "True", Reason.PLACED, text)
    if decision.applied != decision.chosen:
        more = f"one replica on each until batch {decision.batch} with {decision.replicas} per GPU has been tried (profiling.extend)"
        return Condition(names.PACKED, "True", Reason.PLACED, f"{text}; {more}")
    lost = _without_gain(decision)
    if not lost:
        return Condition(
            names.PACKED, "True", Reason.PLACED, f"{text}; one replica on each, as many as may share a GPU here"
        )
    return Condition(names.PACKED, "True", Reason.EXCLUSIVE_NO_GAIN, f"{text}; one replica on each is the best: {lost}")


def _without_gain(decision: advisor.Recommendation) -> str:
    """The packings that fell because they don't pay, in words: those that were tried, else the best predicted; "" where none did."""
    fallen = [each for each in decision.candidates if each.replicas > 1 and not each.limits and each.rejections]
    tried = [each for each in fallen if each.basis is advisor.Basis.MEASURED]
    told = tried or sorted(fallen, key=lambda each: (-each.throughput, each.batch, each.replicas))[:1]
    return ", ".join(
        f"batch {each.batch} with {each.replicas} {'tried' if tried else 'predicted'} at {each.throughput:.0f} tokens/s "
        f"({'; '.join(rejection.text for rejection in each.rejections)})"
        for each in told[:3]
    )


# Available


def _enough_serve(view: View) -> Condition | None:
    if view.ready < _least(view):
        return None
    text = f"{view.ready} of {view.wanted or view.assigned} replicas serve"
    return Condition(names.AVAILABLE, "True", Reason.MINIMUM_REPLICAS_READY, text)


def _least(view: View) -> int:
    """How many replicas have to serve; of a manifest that can't be read all but one that packs still hold."""
    service = view.verdict.service
    if service is None:
        return max(1, view.assigned - 1)
    return service.spec.rollout.least_serving(view.wanted)


def _too_few_serve(view: View) -> Condition:
    text = f"{view.ready} of {view.wanted} replicas serve, {_least(view)} have to (spec.rollout.maxUnavailable)"
    causes = [
        f"pack {pack.metadata.name}: {found.reason}: {found.message}"
        for pack in view.packs
        if (found := _pack_condition(pack, names.REPLICAS_READY)) and found.status == "False"
    ]
    return Condition(names.AVAILABLE, "False", Reason.TOO_FEW_REPLICAS, "; ".join([text, *causes[:3]]))


ACCEPTED: tuple[Check, ...] = (_unreadable, _refused, _unavailable, _unsupported, _valid)
PROFILED: tuple[Check, ...] = (_not_accepted(names.PROFILED), _no_profile, _measured, _failed, _measuring)
RECOMMENDED: tuple[Check, ...] = (
    _not_accepted(names.RECOMMENDED),
    _not_profiled,
    _undecidable,
    _infeasible,
    _recommended,
)
PACKED: tuple[Check, ...] = (
    _nothing_to_pack,
    _unknown_memory,
    _unapproved,
    _share_too_small,
    _too_few_gpus,
    _unplaced,
    _not_held,
    _not_shared,
    _refused_pods,
    _packed,
)
AVAILABLE: tuple[Check, ...] = (_enough_serve, _too_few_serve)
GATES = (ACCEPTED, PROFILED, RECOMMENDED, PACKED, AVAILABLE)


def _realised(view: View) -> Condition:
    """The last gate of Ready: this generation, all replicas, nothing left over."""
    complete = view.ready == view.existing == len(view.pods) == view.wanted
    if (
        complete
        and all(_settled(view, pack) for pack in view.packs)
        and all(_taken_up(view, found) for found in view.sets)
    ):
        return Condition(names.READY, "True", Reason.FULLY_REALISED, f"{view.ready} replicas serve this manifest")
    if (stopped := _stopped(view)) is not None:
        return stopped
    causes = [
        f"pack {pack.metadata.name}: {found.message}"
        for pack in view.packs
        if (found := _pack_condition(pack, names.READY)) and found.status != "True"
    ]
    text = "; ".join([f"{view.ready} of {view.wanted} replicas serve, {len(view.pods)} exist", *causes[:3]])
    return Condition(names.READY, "False", Reason.PROGRESSING, text)


def _stopped(view: View) -> Condition | None:
    """A roll-out that goes no further, because what it replaced doesn't come up."""
    groups = fleet.grouped(view.sets, view.pods, view.generation)
    found = rollout.stopped_by(groups)
    if found is None:
        return None
    name = f"{set_name(view.obj['metadata']['name'], found[0])}-{found[1]}"
    pod = next((each for each in view.pods if each["metadata"]["name"] == name), None)
    trouble = podstate.trouble(pod) if pod is not None else None
    old = [each for group in groups for each in group.pods if each.outdated and not each.going]
    text = f"the roll-out has stopped: {name} on pack {found[0]} is of the new revision and doesn't become ready"
    text += f" ({trouble.reason}: {trouble.message})" if trouble else ""
    text += (
        f"; {len(old)} of {view.wanted} replicas still run the earlier one, {sum(each.ready for each in old)} of them serve. "
        "Mend the manifest or put the earlier one back: either goes on by itself"
    )
    return Condition(names.READY, "False", Reason.ROLLOUT_STOPPED, text)


def _settled(view: View, pack: GPUPack) -> bool:
    # Of a pack's gates the sharing counts too: replicas that answer without MPS are not what was measured.
    if pack.status.observed_generation != pack.metadata.generation:
        return False
    if not neighbours(pack, view.uid):
        return _is(pack, names.READY, "True")
    # What keeps another service's replicas from being ready, or from being seen under MPS, is not this one's to tell.
    mine = [each for each in pack.status.replicas if each.service == view.obj["metadata"]["name"]]
    attached = all(each.attached is not False for each in mine)
    return attached and _is(pack, names.HELD, "True") and not _is(pack, names.SHARING_READY, "False")


def _is(pack: GPUPack, kind: str, status: str) -> bool:
    found = _pack_condition(pack, kind)
    return found is not None and found.status == status


def _taken_up(view: View, found: Object) -> bool:
    """Whether a StatefulSet was made from this generation, and all its pods from it."""
    made_from = (found["metadata"].get("annotations") or {}).get(labels.ANNOTATION_GENERATION)
    revision, pack = current_revision(found), labels_of(found).get(labels.PACK)
    return (
        made_from == str(view.generation)
        and revision is not None
        and all(revision_of(pod) == revision for pod in view.pods if labels_of(pod).get(labels.PACK) == pack)
    )


def _kstatus(summary: Condition) -> tuple[list[Condition], list[str]]:
    """Reconciling and Stalled, each present only while True; and those that are to be absent."""
    if summary.status == "True":
        return [], [names.RECONCILING, names.STALLED]
    if summary.status == "False" and summary.reason in _STALLING:
        return [Condition(names.STALLED, "True", summary.reason, summary.message)], [names.RECONCILING]
    return [Condition(names.RECONCILING, "True", Reason.PROGRESSING, summary.message)], [names.STALLED]


def _fields(view: View, gates: Sequence[Condition], summary: Condition) -> dict[str, Any]:
    service, verdict = view.verdict.service, view.verdict
    accepted = gates[0].status == "True"
    was = view.obj.get("status") or {}
    made = LLMServiceStatus(
        observed_generation=view.generation,
        phase=_phase(view, gates, summary),
        replicas=view.existing,
        ready_replicas=view.ready,
        selector=service_manifests.selector_text(service) if service else was.get("selector"),
        profile=ProfileStatus(name=verdict.profile_name, key=verdict.key.hash)
        if verdict.profile_name and verdict.key
        else None,
        last_applied=_last_applied(view),
        packs=[_pack(pack, view.uid) for pack in view.packs],
        avoided_nodes=[
            AvoidedNode(node=each.node, since=timestamp(each.since), until=timestamp(each.until), times=each.times)
            for each in view.avoided
        ],
        url=service_manifests.url(service) if service and accepted else was.get("url"),
        gpus=_gpus(view),
    ).to_dict()
    recommendation = _recommendation(view)
    return made | ({"recommendation": recommendation} if recommendation else {})


def _last_applied(view: View) -> LastApplied | None:
    """The decision, once it may be applied and some pack has it; until then what was remembered."""
    mine = [each for pack in view.packs for each in pack.spec.assignments if each.uid == view.uid]
    found = next((each for each in mine if view.approved and shape_of(each) == view.verdict.shape), None)
    if found is not None:
        return LastApplied(
            profile=found.profile,
            batch=found.batch,
            kv_cache=found.kv_cache,
            memory_per_replica=found.memory_per_replica,
        )
    was = (view.obj.get("status") or {}).get("lastApplied")
    return LastApplied.model_validate(was) if was else None


def _recommendation(view: View) -> dict[str, Any] | None:
    """What the advisor decided; while a new profile is measured, what the replicas still run with."""
    decision, name = view.verdict.decision, view.verdict.profile_name
    if decision is None:
        kept = (view.obj.get("status") or {}).get("recommendation")
        return dict(kept) if kept and view.assigned else None
    if not decision.feasible or decision.batch is None or name is None:
        return None
    return Recommendation(
        batch=decision.batch,
        kv_cache=_bytes(decision.kv_cache),
        memory_per_replica=_bytes(decision.memory_per_replica),
        replicas_per_gpu=decision.replicas or 1,
        expected_gain=_ratio(decision.expected_gain),
        basis=decision.basis.value,
        tokens_per_second=f"{decision.chosen.throughput:.1f}" if decision.chosen else None,
        latencies=_latencies(decision, decision.chosen.latencies) if decision.chosen else [],
        default_engine=_default_engine(decision),
        applied=_applied(decision),
        binding_limit=decision.binding_limit.value,
        profile=name,
    ).to_dict()


def _applied(decision: advisor.Recommendation) -> Applied | None:
    """What runs instead of a packing that is only estimated."""
    applied = decision.applied
    if applied is None or applied == decision.chosen:
        return None
    return Applied(
        batch=applied.batch,
        replicas_per_gpu=applied.replicas,
        kv_cache=_bytes(decision.applied_kv_cache),
        memory_per_replica=_bytes(decision.applied_memory),
        expected_gain=_ratio(decision.applied_gain),
    )


def _default_engine(decision: advisor.Recommendation) -> DefaultEngine | None:
    baseline = decision.baseline
    if baseline is None:
        return None
    return DefaultEngine(
        batch=baseline.point.batch,
        total_tokens_per_second=f"{baseline.point.throughput:.1f}",
        latencies=_latencies(decision, baseline.latencies),
        meets_objectives=baseline.meets_objectives,
    )


def _latencies(decision: advisor.Recommendation, values: Sequence[float | None]) -> list[LatencyFigure]:
    """Latencies in seconds, one for each objective, beside it."""
    return [
        LatencyFigure(
            metric=objective.metric.value,
            statistic=objective.statistic.value,
            value=None if value is None else _duration(value),
            max=units.format_duration(objective.maximum),
        )
        for objective, value in zip(decision.objectives, values, strict=True)
    ]


def _duration(seconds: float) -> str:
    """To four digits: more would turn the status at every rounding, and nobody measures so finely."""
    return units.format_duration(float(f"{seconds:.4g}"))


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _bytes(amount: int | None) -> str | None:
    return None if amount is None else units.format_quantity(amount)


def _pack(pack: GPUPack, uid: str) -> PackStatus:
    mine = {each.service for each in pack.spec.assignments if each.uid == uid}
    return PackStatus(
        name=pack.metadata.name,
        node=pack.status.node,
        gpu=pack.status.gpu.uuid if pack.status.gpu else None,
        replicas=assigned_to(pack, uid),
        ready=sum(each.ready for each in pack.status.replicas if each.service in mine),
    )


def _gpus(view: View) -> GPUCount | None:
    """GPUs held, and those that one replica on each would have taken beyond them; none for CPUs."""
    service = view.verdict.service
    if service is not None and service.spec.accelerator.device == "cpu":
        return None
    return GPUCount(used=len(view.packs), saved=max(0, view.assigned - len(view.packs)))


def _phase(view: View, gates: Iterable[Condition], summary: Condition) -> str:
    if summary.status == "True":
        return "Ready" if view.wanted else "Idle"
    failing = next((gate for gate in gates if gate.status != "True"), summary)
    if failing.type == names.PROFILED and failing.reason in _STALLING:
        return "Failed"
    if failing.reason == Reason.AWAITING_APPROVAL:
        return "AwaitingApproval"
    if failing.type == names.RECOMMENDED and failing.status == "Unknown":
        return "Profiling"
    if view.wanted and view.ready and failing.type in (names.AVAILABLE, names.READY):
        return "Updating"
    return _PHASES.get(failing.type, "Progressing")


def _pack_condition(pack: GPUPack, kind: str) -> Any:
    return next((each for each in pack.status.conditions if each.type == kind), None)


def _conditions(obj: Object) -> list[Any]:
    return (obj.get("status") or {}).get("conditions") or []
