"""The status of a GPUPack, from a view: what is held, shared and running, each with the cause when it isn't. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import GPUPackStatus, PackLedger, PackMPS, PackReplica
from tightship.core import conditions
from tightship.core.conditions import Condition
from tightship.kube.store import Object, labels_of
from tightship.reconcile import admission, podstate
from tightship.reconcile.packview import Holding, Problem, View, current_revision, holding, replica_pods, rollout_pods

ATTACH_SECONDS = 30.0
"""A ready replica without an MPS client for so long runs without MPS; the watcher publishes every few seconds."""

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
    Reason.INSUFFICIENT_MEMORY,
    Reason.CRASH_LOOP,
)


def status(view: View, problems: Sequence[Problem], now: datetime) -> dict[str, Any]:
    """The whole status to write."""
    held, pods = holding(view), [pod for pod in replica_pods(view) if not podstate.is_going(pod)]
    gates = [
        _held(held, problems),
        sharing(view, held, now),
        replicas(view, held, problems),
    ]
    ready = conditions.ready(gates, reason=Reason.FULLY_REALISED, message=gates[-1].message)
    generation = view.pack.metadata.generation or 0
    attached = held.mps.pods if held.mps else frozenset()
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
            attached_replicas=sum(pod["metadata"]["uid"] in attached for pod in pods),
        )
        if held.mps
        else None,
        replica_count=_wanted(view),
        ready_replicas=sum(podstate.is_ready(pod) for pod in pods),
        replicas=[
            _replica(view, pod, attached) for pod in sorted(pods, key=lambda each: str(each["metadata"]["name"]))
        ],
    ).to_dict()
    existing = (view.obj.get("status") or {}).get("conditions") or []
    return made | {"conditions": conditions.merge(existing, [*gates, ready], generation=generation, now=now)}


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
    if not view.cpu:
        for pod in replica_pods(view):
            since = podstate.ready_since(pod)
            left = ATTACH_SECONDS - (now - since).total_seconds() if since and podstate.is_ready(pod) else 0
            waits += [left + 1] if left > 0 else []
    return min(waits, default=None)


def sharing(view: View, held: Holding, now: datetime) -> Condition:
    """Whether the replicas really share the device as intended."""
    kind = names.SHARING_READY
    if view.cpu:
        return Condition(kind, "True", Reason.CPU_SET, "each replica has cores of its own; there is nothing to share")
    mps = held.mps
    if held.status != "True" or mps is None:
        return Condition(kind, "Unknown", Reason.NOT_YET_KNOWN, "the MPS daemon has not been seen yet")
    if mps.state == "FAULT":
        text = f"MPS server {mps.server} is in FAULT: its {mps.clients} clients are stopped, then it takes new ones"
        return Condition(kind, "False", Reason.MPS_FAULT, text)
    if mps.state == "DOWN":
        return Condition(
            kind, "False", Reason.MPS_FAULT, "the MPS daemon does not answer; see the holder's container mps"
        )
    loose = [pod for pod in replica_pods(view) if podstate.is_ready(pod) and pod["metadata"]["uid"] not in mps.pods]
    late = [pod for pod in loose if _ready_for(pod, now) >= ATTACH_SECONDS]
    if late:
        text = f"{_names(late)} runs without MPS, so the GPU takes turns instead of sharing; see its log for CUDA_MPS_PIPE_DIRECTORY"
        return Condition(kind, "False", Reason.MPS_NOT_ATTACHED, text)
    if loose:
        return Condition(
            kind, "Unknown", Reason.NOT_YET_KNOWN, f"{_names(loose)} has not been seen among MPS's clients yet"
        )
    return Condition(kind, "True", Reason.MPS_ACTIVE, f"MPS is {mps.state} with {mps.clients} clients")


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


def _replica(view: View, pod: Object, attached: frozenset[str]) -> PackReplica:
    trouble = podstate.trouble(pod)
    return PackReplica(
        name=pod["metadata"]["name"],
        service=labels_of(pod).get(labels.SERVICE, ""),
        ready=podstate.is_ready(pod),
        attached=None if view.cpu else pod["metadata"]["uid"] in attached,
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


def _ready_for(pod: Object, now: datetime) -> float:
    since = podstate.ready_since(pod)
    return (now - since).total_seconds() if since else 0.0


def _gravity(reason: str) -> int:
    return _GRAVITY.index(reason) if reason in _GRAVITY else len(_GRAVITY)


def _names(pods: Sequence[Object]) -> str:
    return ", ".join(sorted(str(pod["metadata"]["name"]) for pod in pods))


def _status(text: str) -> conditions.Status:
    return "True" if text == "True" else "False" if text == "False" else "Unknown"
