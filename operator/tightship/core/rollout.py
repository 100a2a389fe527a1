"""How one StatefulSet moves towards what is assigned, without ever exceeding the pack's memory. Pure.

Under OnDelete a pod that is lost comes back at the *new* template, whatever was planned; so until it is replaced a pod counts at the
larger of its own memory and the template's. Three rules follow:

- shrink before grow: the template changes only when all pods that stay, at that larger figure, fit together with those that
  are still going;
- a StatefulSet grows only as far as what is left carries replicas of the new template;
- on a pack pods are replaced one at a time, broken ones first, and over the whole service as many as may be missing: never
  fewer serve than have to, whatever else keeps replicas from serving. Only where the service has no place for as many does less
  than that have to do: of those places one may be empty. What doesn't serve may be replaced at any time. The first one goes
  alone: until it serves at the new revision, and as long as one of that revision is in trouble, no other that serves is touched.
  A revision that mends it makes the broken one outdated, and that one is replaced first.

A service's replicas may also be wanted elsewhere, or be fewer on a GPU at a larger shape. Then those that serve leave as others come:

- a StatefulSet shrinks only as far as as many serve as there is a place for, those in trouble left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replica:
    """One pod: its ordinal, the bytes it was granted, and how it is; `failed` when something else than time keeps it from being ready."""

    ordinal: int
    memory: int
    ready: bool = False
    going: bool = False
    outdated: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Group:
    """The replicas of one service on one pack: what its StatefulSet asks for (0 once that goes), and its pods.

    `crowded`: a replica of another service there is leaving or starting. `taken_up`: the StatefulSet was made from the present
    manifest, so its newest revision is the service's.
    """

    pack: str
    wanted: int
    pods: tuple[Replica, ...] = ()
    crowded: bool = False
    taken_up: bool = True


@dataclass(frozen=True)
class Step:
    """What to write next: the replica count, and whether the pod template may change yet."""

    replicas: int
    template: bool


def step(target: int, live: int | None, pods: Sequence[Replica], memory: int, capacity: int | None) -> Step:
    """The next step towards `target` replicas of `memory` bytes each.

    `live` is the StatefulSet's replica count (None: there is none yet), `pods` its pods, those that are going included; `capacity`
    is what all of them may use together (None: not known, nothing is held back).
    """
    if capacity is None:
        return Step(target, template=True)
    held = _held(target, pods, memory)
    if held > capacity:
        return Step(min(target, live or 0), template=False)
    room, taken = (capacity - held) // max(1, memory), {pod.ordinal for pod in pods if pod.ordinal < target}
    replicas = target
    while replicas > 0 and sum(ordinal not in taken for ordinal in range(replicas)) > room:
        replicas -= 1
    return Step(replicas, template=True)


def fitting(target: int, pods: Sequence[Replica], memory: int, capacity: int | None) -> int:
    """How many of `target` replicas of `memory` bytes are there, going or not, or have memory beside what `pods` hold now.

    The others wait until some of those are replaced by smaller ones. `pods` and `capacity` as in `step`.
    """
    if capacity is None:
        return target
    there = sum(pod.ordinal < target for pod in pods)
    return min(target, there + max(0, capacity - _held(target, pods, memory)) // max(1, memory))


def _held(target: int, pods: Iterable[Replica], memory: int) -> int:
    """Bytes that pods hold, and may hold once those below `target` come back at a template of `memory` bytes."""
    return sum(max(pod.memory, memory) if pod.ordinal < target else pod.memory for pod in pods)


def replacements(groups: Iterable[Group], least: int, placed: int) -> tuple[tuple[str, int], ...]:
    """The pods, each as (pack, ordinal), that may be deleted now so that they come back at the newest revision.

    `groups` are all of one service, `least` how many of its replicas have to serve (`rollout.maxUnavailable`), `placed` how many it
    has a place for that don't wait for one of these to be replaced (`fitting`). Fewer than `least` have to serve only where there is no
    place for more: of `n` places one may always be empty. A place is one while its StatefulSet asks for nobody, or isn't made yet:
    what is under repair or starts is missing like everything else that doesn't serve.
    """
    groups = sorted(groups, key=lambda group: group.pack)
    spare = _serving(groups) - min(least, placed - 1)
    if not _proven(groups):
        spare = min(spare, 0 if _under_way(groups) else 1)
    chosen = []
    for group in groups:
        staying = [pod for pod in group.pods if pod.outdated and pod.ordinal < group.wanted]
        outdated = sorted(staying, key=lambda pod: -pod.ordinal)
        if group.crowded or any(pod.going for pod in group.pods):
            continue
        broken = [pod for pod in outdated if not pod.ready]
        if broken:
            chosen.append((group.pack, broken[0].ordinal))
        elif outdated and spare > 0 and not _starting(group):
            chosen.append((group.pack, outdated[0].ordinal))
            spare -= 1
    return tuple(chosen)


def stopped_by(groups: Iterable[Group]) -> tuple[str, int] | None:
    """The pod (pack, ordinal) of the newest revision whose trouble keeps the others from being replaced; None where none does."""
    groups = sorted(groups, key=lambda group: group.pack)
    if not any(pod.outdated and not pod.going for group in groups for pod in group.pods):
        return None
    return next(((group.pack, pod.ordinal) for group in groups for pod in _newest(group) if pod.failed), None)


def may_shrink_to(groups: Iterable[Group], pack: str, target: int, *, least: int, placed: int, assigned: int) -> int:
    """How far one group may be scaled down towards `target` now: `target`, or more where others are yet to come in their stead.

    `assigned` is how many replicas are to be somewhere, `placed` how many of them don't wait for memory that others hold. As long as those
    start, or wait for their GPU, what serves stays; for those that are in trouble, or that wait for others, nobody waits beyond the
    `least` that have to serve. From the highest ordinal down, since that is the order in which a StatefulSet shrinks; what doesn't
    serve holds nobody up.
    """
    groups = list(groups)
    own = next((group for group in groups if group.pack == pack), None)
    if own is None:
        return target
    failed = sum(pod.failed and not pod.going and pod.ordinal < group.wanted for group in groups for pod in group.pods)
    spare, count = _serving(groups) - max(min(least, assigned), placed - failed), own.wanted
    serves = {pod.ordinal for pod in own.pods if _serves(own, pod)}
    while count > target:
        if count - 1 in serves:
            if spare <= 0:
                break
            spare -= 1
        count -= 1
    return count


def _serving(groups: Iterable[Group]) -> int:
    return sum(_serves(group, pod) for group in groups for pod in group.pods)


def _serves(group: Group, pod: Replica) -> bool:
    # A StatefulSet that was scaled down takes its last pods away at any moment.
    return pod.ready and not pod.going and pod.ordinal < group.wanted


def _newest(group: Group) -> list[Replica]:
    """The pods of the newest revision that are to stay."""
    if not group.taken_up:
        return []
    return [pod for pod in group.pods if not pod.outdated and not pod.going and pod.ordinal < group.wanted]


def _starting(group: Group) -> bool:
    return any(not pod.ready for pod in _newest(group))


def _proven(groups: Iterable[Group]) -> bool:
    """Whether the newest revision serves somewhere and is in trouble nowhere."""
    newest = [pod for group in groups for pod in _newest(group)]
    return any(pod.ready for pod in newest) and not any(pod.failed for pod in newest)


def _under_way(groups: Iterable[Group]) -> bool:
    """Whether a replica has been replaced and doesn't serve yet, or is about to be made anew."""
    return any(_starting(group) for group in groups) or any(
        pod.going and pod.ordinal < group.wanted for group in groups for pod in group.pods
    )
