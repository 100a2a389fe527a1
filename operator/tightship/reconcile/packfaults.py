"""What is to be done about replicas that don't share their GPU as they should. Pure over a view and what the pack's status remembers.

Two faults need the operator; the others end by themselves, by the holder, the replicas' supervisors and the kubelet, also while it is down.

    MPSFault         A fatal fault took every client, and the server takes no new one until the last old one has left. So all replicas of
                     the pack stop, those that the daemon doesn't list too; once the server is out of FAULT, none is left and the
                     back-off is over, they start again, one by one as always.
    MPSNotAttached   A replica serves without being among the daemon's clients: the GPU takes turns. It alone is started anew, while
                     nothing else on the pack moves.

What must always hold: a replica is called unattached only while the watcher runs that would have seen it, and only if the daemon has no
client of unknown pod that it could be; without a holder only if it told so itself, since a driver may not say; a pack that is well is not
touched; repairs that follow one another wait ever longer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import PackRepair
from tightship.core.conditions import timestamp
from tightship.kube.clock import parse_timestamp
from tightship.kube.store import Object
from tightship.reconcile import podstate
from tightship.reconcile.packview import Holding, View, replica_pods

ATTACH_SECONDS = 30.0
"""A ready replica without an MPS client for so long runs without MPS; the watcher publishes every few seconds."""

BACK_OFF_SECONDS = (0.0, 30.0, 60.0, 120.0, 240.0, 480.0)
"""How long after the n-th repair in a row began replicas may start (MPSFault), or the next may be restarted (MPSNotAttached)."""

IN_A_ROW = timedelta(hours=1)
"""A repair that comes so long after the one before it is a first one again."""


@dataclass(frozen=True)
class Course:
    """What to do now: no replica may run (`stop`), one pod to start anew (`restart`), and what to remember.

    `wait` is the seconds after which to look again, where only time has to pass.
    """

    stop: bool = False
    restart: Object | None = None
    repair: PackRepair | None = None
    wait: float | None = None


def decide(view: View, held: Holding, now: datetime) -> Course:
    """What to do about the pack at `now`."""
    known = view.pack.status.repair
    if known is not None and known.ended is not None and now - parse_timestamp(known.since) >= IN_A_ROW:
        known = None
    if view.cpu or not view.pack.spec.assignments:
        return Course(repair=known)
    if known is not None and known.reason == Reason.MPS_FAULT and known.ended is None:
        return _under_repair(view, held, known, now)
    if held.status != "True" or held.mps is None:
        return Course(repair=known)
    if held.mps.state == "FAULT":
        return Course(stop=True, repair=_next(known, "MPSFault", now))
    return _attach(view, held, known, now)


def _under_repair(view: View, held: Holding, known: PackRepair, now: datetime) -> Course:
    """All replicas stop, until the server takes clients, none of the old ones is left, and the back-off is over."""
    serves = held.status == "True" and held.mps is not None and held.mps.state in ("ACTIVE", "IDLE")
    if not serves or replica_pods(view):
        return Course(stop=True, repair=known)
    left = _left(known, now)
    if left > 0:
        return Course(stop=True, repair=known, wait=left)
    # Replicas are made once this is written down: one that starts must not be taken for one that has not left.
    return Course(stop=True, repair=known.model_copy(update={"ended": timestamp(now)}))


def _attach(view: View, held: Holding, known: PackRepair | None, now: datetime) -> Course:
    late = [pod for pod in unattached(view, held) if attach_time(view, held, pod, now) >= ATTACH_SECONDS]
    if not late or not provable(view, held):
        return Course(repair=_proven(view, held, known, now))
    left = _left(known, now)
    if left > 0:
        return Course(repair=known, wait=left)
    # An engine that starts reads how much memory is free, so nobody beside it may release any.
    if any(podstate.moves(pod) for pod in replica_pods(view)):
        return Course(repair=known)
    return Course(restart=late[0], repair=_next(known, "MPSNotAttached", now))


def _proven(view: View, held: Holding, known: PackRepair | None, now: datetime) -> PackRepair | None:
    """What is known of the last repair; it is over once every replica serves and is among the daemon's clients."""
    if known is None or known.ended is not None:
        return known
    serving = [pod for pod in replica_pods(view) if podstate.is_ready(pod)]
    whole = len(serving) == len(replica_pods(view)) == sum(each.replicas for each in view.pack.spec.assignments)
    over = whole and not unattached(view, held)
    return known.model_copy(update={"ended": timestamp(now)}) if over else known


def unattached(view: View, held: Holding) -> list[Object]:
    """Ready replicas that are not among the daemon's clients, by name; those of which nobody can tell are left out."""
    return _ready_but(view, held.mps.pods | held.mps.untold if held.mps else frozenset())


def untold(view: View, held: Holding) -> list[Object]:
    """Ready replicas of which nobody can tell whether they are attached, by name."""
    known = {str(pod["metadata"]["uid"]) for pod in replica_pods(view)} - (held.mps.untold if held.mps else frozenset())
    return _ready_but(view, known)


def _ready_but(view: View, others: Collection[str]) -> list[Object]:
    found = [pod for pod in replica_pods(view) if podstate.is_ready(pod) and str(pod["metadata"]["uid"]) not in others]
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


def attach_time(view: View, held: Holding, pod: Object, now: datetime) -> float:
    """Seconds that a ready replica has had to be seen among the clients: since it and the watcher run."""
    since = [moment for moment in (podstate.ready_since(pod), held.watched_since) if moment is not None]
    return (now - max(since)).total_seconds() if since else 0.0


def provable(view: View, held: Holding) -> bool:
    """Whether a replica's absence from the list of clients proves anything."""
    return held.watched and held.mps is not None and held.mps.unknown < max(1, len(unattached(view, held)))


def next_look(view: View, held: Holding, now: datetime) -> float | None:
    """Seconds until time alone changes what is to be done, or what is known."""
    waits = [
        ATTACH_SECONDS - attach_time(view, held, pod, now) + 1
        for pod in unattached(view, held)
        if attach_time(view, held, pod, now) < ATTACH_SECONDS
    ]
    course = decide(view, held, now)
    return min([*waits, *([course.wait + 1] if course.wait is not None else [])], default=None)


def back_off(count: int) -> float:
    """Seconds after the beginning of the `count`-th repair in a row."""
    return BACK_OFF_SECONDS[min(count, len(BACK_OFF_SECONDS)) - 1]


def _left(known: PackRepair | None, now: datetime) -> float:
    if known is None:
        return 0.0
    return back_off(known.count) - (now - parse_timestamp(known.since)).total_seconds()


def _next(known: PackRepair | None, reason: str, now: datetime) -> PackRepair:
    count = known.count + 1 if known is not None and known.reason == reason else 1
    return PackRepair.model_validate({"reason": reason, "count": count, "since": timestamp(now)})


def in_words(repair: PackRepair) -> str:
    """How often, since when and for how long replicas of a GPU with a fatal fault are kept from starting, for a condition's message."""
    until = parse_timestamp(repair.since) + timedelta(seconds=back_off(repair.count))
    waits = f", not before {timestamp(until)}" if back_off(repair.count) else ""
    return f"fault {repair.count} within an hour of the one before, seen at {repair.since}; back-off {back_off(repair.count):g} s{waits}"


def names_of(pods: Sequence[Object]) -> str:
    """The pods' names, sorted."""
    return ", ".join(sorted(str(pod["metadata"]["name"]) for pod in pods))
