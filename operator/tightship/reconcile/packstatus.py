"""The status of a GPUPack, from a view: what is held, shared and running, each with the cause when it isn't. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import GPUPackStatus, PackLedger, PackMPS, PackRepair, PackReplica
from tightship.core import conditions
from tightship.core.conditions import Condition
from tightship.kube.store import Object, labels_of
from tightship.manifests.podparts import ENGINE_CONTAINER
from tightship.reconcile import admission, modes, packfaults, podstate
from tightship.reconcile.packfaults import Course
from tightship.reconcile.packfaults import names_of as _names
from tightship.reconcile.packview import (
    Holding,
    Problem,
    View,
    apart,
    current_revision,
    holding,
    replica_pods,
    rollout_pods,
)

# The cause that explains the others comes first.
_GRAVITY = (
    Reason.UNSCHEDULABLE,
    Reason.IMAGE_PULL_FAILED,
    Reason.OOM_KILLED,
    Reason.GPU_NOT_VISIBLE,
    Reason.GPU_MISMATCH,
    Reason.HOLDER_LOST,
    Reason.MPS_NOT_ATTACHED,
    Reason.MPS_FAULT,
    Reason.ENGINE_HUNG,
    Reason.INSUFFICIENT_MEMORY,
    Reason.CRASH_LOOP,
)


def status(view: View, problems: Sequence[Problem], now: datetime, course: Course | None = None) -> dict[str, Any]:
    """The whole status to write; `course` is what was done about faults (None: to be decided)."""
    held, pods = holding(view), [pod for pod in replica_pods(view) if not podstate.is_going(pod)]
    repair = (course or packfaults.decide(view, held, now)).repair
    gates = [
        _held(held, problems),
        sharing(view, held, now, repair),
        replicas(view, held, problems),
    ]
    ready = conditions.ready(gates, reason=Reason.FULLY_REALISED, message=gates[-1].message)
    generation = view.pack.metadata.generation or 0
    made = GPUPackStatus(
        observed_generation=generation,
        phase=_phase(view, gates, ready),
        node=held.node,
        holder=view.holder["metadata"]["name"] if view.holder else None,
        gpu=held.gpu,
        ledger=_ledger(view, held),
        mps=PackMPS(
            state=held.mps.state,  # type: ignore[arg-type]
            clients=held.mps.clients,
            attached_replicas=sum(pod["metadata"]["uid"] in held.mps.pods for pod in pods),
        )
        if held.mps
        else None,
        replica_count=_wanted(view),
        ready_replicas=sum(podstate.is_ready(pod) for pod in pods),
        replicas=[_replica(view, held, pod) for pod in sorted(pods, key=lambda each: str(each["metadata"]["name"]))],
        repair=repair,
    ).to_dict()
    existing = (view.obj.get("status") or {}).get("conditions") or []
    return made | {"conditions": conditions.merge(existing, [*gates, ready], generation=generation, now=now)}


_UNSHARED = (Reason.MPS_NOT_ATTACHED, Reason.GPU_NOT_VISIBLE)


def _held(held: Holding, problems: Sequence[Problem]) -> Condition:
    """Whether the device is held; what keeps its holder from being made counts for more than that it isn't there."""
    found = next((each for each in problems if each.gate == names.HELD), None)
    passing = found is not None and found.reason == Reason.NOT_YET_KNOWN
    if found is None or held.status == "True" or (passing and held.status == "False"):
        return Condition(names.HELD, _status(held.status), held.reason, held.message)
    return Condition(names.HELD, "Unknown" if passing else "False", found.reason, found.message)


def next_look(view: View, problems: Sequence[Problem], now: datetime, retry: float) -> float | None:
    """Seconds until something changes that no watch tells: a retry, the end of a replica's time to attach or to be made."""
    crowded = len(replica_pods(view)) > _wanted(view)
    waits = [retry] if problems or crowded or outdated(view) else []
    if any(admission.missing(view, found) for found in view.sets):
        left = admission.patience(view, now)
        waits.append(left + 1 if left > 0 else retry)
    if not view.cpu and view.pack.spec.mode != modes.EXCLUSIVE:
        wait = packfaults.next_look(view, holding(view), now)
        waits += [wait] if wait is not None else []
    return min(waits, default=None)


def sharing(view: View, held: Holding, now: datetime, repair: PackRepair | None = None) -> Condition:
    """Whether the replicas really share the device as intended."""
    kind = names.SHARING_READY
    if view.cpu:
        return Condition(kind, "True", Reason.CPU_SET, "each replica has cores of its own; there is nothing to share")
    condition = _sharing(view, held, now, repair)
    return replace(condition, message="; ".join(filter(None, (condition.message, view.why))))


def _sharing(view: View, held: Holding, now: datetime, repair: PackRepair | None) -> Condition:
    kind, mps = names.SHARING_READY, held.mps
    if view.pack.spec.mode == modes.EXCLUSIVE:
        return Condition(kind, "True", Reason.EXCLUSIVE, "the replica has the GPU alone, without MPS")
    if not view.pack.spec.has_holder:
        refused = [
            (pod, found) for pod in replica_pods(view) if (found := podstate.trouble(pod)) and found.reason in _UNSHARED
        ]
        for pod, found in refused:
            return Condition(kind, "False", found.reason, f"{pod['metadata']['name']}: {found.message}")
    if view.pack.spec.mode == modes.DEVICE_PLUGIN and (words := apart(view)):
        text = f"the device plugin gave the replicas of this pack different GPUs: {words}; they don't share as was measured. "
        text += "A node with one GPU can't, and packing.mode Reservation never does"
        return Condition(kind, "False", Reason.GPU_MISMATCH, text)
    if repair is not None and repair.ended is None:
        words_of = _faulted if repair.reason == Reason.MPS_FAULT else _restarted
        return Condition(kind, "False", repair.reason, words_of(view, held, repair))
    if held.status != "True" or mps is None:
        return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, "the MPS daemon has not been seen yet")
    if mps.state == "FAULT":
        # Nobody is assigned, so there is nothing to repair: what is left is drained.
        text = f"MPS server {mps.server} is in FAULT with {mps.clients} clients"
        return Condition(kind, "False", Reason.MPS_FAULT, text)
    if mps.state == "DOWN":
        text = "the MPS daemon does not answer; the holder starts it anew within a minute or two, see its container mps"
        return Condition(kind, "False", Reason.MPS_FAULT, text)
    loose = packfaults.unattached(view, held)
    if loose and not held.watched:
        text = (
            f"the holder's container watch does not run, so it can't be told whether {_names(loose)} is attached to MPS"
        )
        return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, text)
    late = [pod for pod in loose if packfaults.attach_time(view, held, pod, now) >= packfaults.ATTACH_SECONDS]
    if late and not packfaults.provable(view, held):
        text = (
            f"the daemon lists {mps.unknown} clients that can't be assigned to pods, so it can't be told whether {_names(late)} is "
            "attached to MPS: the holder needs hostPID, and the pod's UID in /proc/PID/cgroup"
        )
        return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, text)
    if late:
        text = f"{_bare(view, held)}; it is started anew when nothing else on the pack moves"
        return Condition(kind, "False", Reason.MPS_NOT_ATTACHED, text)
    if loose:
        return Condition(
            kind, "Unknown", Reason.NOT_YET_KNOWN, f"{_names(loose)} has not been seen among MPS's clients yet"
        )
    if untold := packfaults.untold(view, held):
        text = (
            f"{_names(untold)} serves, but could not tell whether through MPS: drivers say so since CUDA 12. Nothing is started anew for it; "
            f"update the driver of node {held.node}, or use packing.mode Reservation, whose holder sees the daemon's clients"
        )
        return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, text)
    if view.pack.spec.mode == modes.DEVICE_PLUGIN:
        return Condition(kind, "True", Reason.DEVICE_LIMITS_FORCED, f"warning: {view.limits}")
    return Condition(
        kind, "True", Reason.MPS_ACTIVE, f"MPS is {mps.state} with {mps.clients} clients{_seen(view, held)}"
    )


def _restarted(view: View, held: Holding, repair: PackRepair) -> str:
    """How far a pack is on which a replica ran without MPS."""
    when = (
        f"restart {repair.count} at {repair.since}, the next not within {packfaults.back_off(repair.count):g} s of it"
    )
    return f"{_bare(view, held)}; one is started anew at a time ({when})"


def _bare(view: View, held: Holding) -> str:
    loose, clients = packfaults.unattached(view, held), held.mps.clients if held.mps else 0
    who = f"{_names(loose)} serves" if loose else "a replica served"
    return f"{who} without being among the daemon's {clients} clients, so the GPU takes turns instead of sharing"


def _faulted(view: View, held: Holding, repair: PackRepair) -> str:
    """How far a pack is whose MPS server had a fatal fault."""
    mps, left = held.mps, len(replica_pods(view))
    state = f"MPS server {mps.server} is {mps.state}, {mps.clients} clients left" if mps else "MPS is not seen"
    what = f"a fatal fault took all clients of the GPU: its replicas stop ({left} left), then start again one by one"
    return f"{what}; {state}; {packfaults.in_words(repair)}"


def _seen(view: View, held: Holding) -> str:
    """The least memory that a replica found free before its engine started, in words."""
    pods = {str(pod["metadata"]["uid"]): str(pod["metadata"]["name"]) for pod in replica_pods(view)}
    seen = {uid: each for uid, each in held.preflights.items() if uid in pods}
    if not seen:
        return ""
    uid, least = min(seen.items(), key=lambda each: (units.parse_quantity(each[1].free), each[0]))
    return f"; before its engine started {pods[uid]} saw {least.uuid} with {least.free} of {least.total} free"


def replicas(view: View, held: Holding, problems: Sequence[Problem]) -> Condition:
    """Whether all assigned replicas run, at their newest revision."""
    kind, wanted = names.REPLICAS_READY, _wanted(view)
    problems = [each for each in problems if each.gate == kind]
    pods = [pod for pod in replica_pods(view) if not podstate.is_going(pod)]
    ready, count = sum(podstate.is_ready(pod) for pod in pods), f"{wanted} assigned"
    if problems:
        return Condition(kind, "False", problems[0].reason, "; ".join(each.message for each in problems))
    if not wanted:
        return Condition(kind, "False", Reason.NOT_ASSIGNED, "no replicas are assigned; what runs is drained")
    so_far = f"{ready} of {count} replicas ready"
    troubles = [(pod, found) for pod in pods if (found := podstate.trouble(pod))]
    if troubles:
        pod, worst = min(troubles, key=lambda each: (_gravity(each[1].reason), str(each[0]["metadata"]["name"])))
        return Condition(kind, "False", worst.reason, f"{so_far}; {pod['metadata']['name']}: {worst.message}")
    if held.place is None and not pods:
        return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, "replicas are made once the device is held")
    if len(pods) > wanted or len(pods) != len(replica_pods(view)):
        text = (
            f"{so_far}; {len(replica_pods(view)) - wanted} that are no longer wanted here leave as enough others serve"
        )
        return Condition(kind, "False", Reason.REPLICAS_STARTING, text)
    if ready < wanted:
        starting = [pod for pod in pods if not podstate.is_ready(pod)]
        slot = len(starting) > 1
        text = f"{so_far}; {_names(starting)} " + ("start one after the other" if slot else "is starting")
        if not starting:
            text = f"{so_far}; pods are being made"
        return Condition(kind, "False", Reason.WAITING_FOR_START_SLOT if slot else Reason.REPLICAS_STARTING, text)
    behind = outdated(view)
    if behind is None or behind:
        text = f"{so_far}; " + (
            f"{behind} run an older revision and are replaced one by one" if behind else "a change is being taken up"
        )
        return Condition(kind, "False", Reason.REPLICAS_STARTING, text)
    return Condition(kind, "True", Reason.REPLICAS_READY, so_far)


def outdated(view: View) -> int | None:
    """Replicas that still run an older revision; None while that is not known."""
    total = 0
    for found in view.sets:
        if current_revision(found) is None:
            return None
        service = labels_of(found).get(labels.SERVICE, "")
        total += sum(pod.outdated for pod in rollout_pods(view, service, found))
    return total


def _wanted(view: View) -> int:
    return sum(each.replicas for each in view.pack.spec.assignments)


def _ledger(view: View, held: Holding) -> PackLedger:
    assigned = sum(each.replicas * units.parse_quantity(each.memory_per_replica) for each in view.pack.spec.assignments)
    total = units.parse_quantity(held.gpu.memory) if held.gpu and held.gpu.memory else None
    free = units.format_quantity(max(0, total - assigned)) if total is not None else None
    return PackLedger(assigned=units.format_quantity(assigned), free=free)


def _replica(view: View, held: Holding, pod: Object) -> PackReplica:
    trouble, uid = podstate.trouble(pod), pod["metadata"]["uid"]
    shares = not view.cpu and view.pack.spec.mode != modes.EXCLUSIVE
    untold = held.mps is not None and uid in held.mps.untold
    return PackReplica(
        name=pod["metadata"]["name"],
        service=labels_of(pod).get(labels.SERVICE, ""),
        ready=podstate.is_ready(pod),
        attached=held.mps is not None and uid in held.mps.pods if shares and not untold else None,
        restarts=podstate.restarts(pod, ENGINE_CONTAINER),
        preflight=held.preflights.get(str(pod["metadata"]["uid"])),
        message=f"{trouble.reason}: {trouble.message}"[:4096] if trouble else None,
    )


def _phase(view: View, gates: Sequence[Condition], ready: Condition) -> str:
    if not view.pack.spec.assignments:
        return "Draining"
    if ready.status == "True":
        return "Ready"
    if gates[0].status != "True":
        return "Lost" if gates[0].status == "False" and view.pack.status.gpu else "Holding"
    return "Starting"


def _gravity(reason: str) -> int:
    return _GRAVITY.index(reason) if reason in _GRAVITY else len(_GRAVITY)


def _status(text: str) -> conditions.Status:
    return "True" if text == "True" else "False" if text == "False" else "Unknown"
