"""How one StatefulSet moves towards what is assigned, without ever exceeding the pack's memory. Pure.

Under OnDelete a pod that is lost comes back at the *new* template, whatever was planned; so until it is replaced a pod counts at the
larger of its own memory and the template's. Three rules follow:

- shrink before grow: the template changes only when all pods that stay, at that larger figure, fit together with those that
  are still going;
- a StatefulSet grows only as far as what is left carries replicas of the new template;
- pods are replaced one at a time, broken ones first; a pod that serves is replaced only while nothing else of the service is
  down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replica:
    """One pod: its ordinal, the bytes it was granted, and how it is."""

    ordinal: int
    memory: int
    ready: bool = False
    going: bool = False
    outdated: bool = False


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
    staying = [pod for pod in pods if pod.ordinal < target]
    leaving = [pod for pod in pods if pod.ordinal >= target]
    held = sum(max(pod.memory, memory) for pod in staying) + sum(pod.memory for pod in leaving)
    if held > capacity:
        return Step(min(target, live or 0), template=False)
    room, taken = (capacity - held) // max(1, memory), {pod.ordinal for pod in staying}
    replicas = target
    while replicas > 0 and sum(ordinal not in taken for ordinal in range(replicas)) > room:
        replicas -= 1
    return Step(replicas, template=True)


def next_to_replace(pods: Sequence[Replica], others_down: int) -> Replica | None:
    """The pod to delete next in a roll-out; None when there is none, or when it must wait.

    `others_down` is the number of the service's wanted replicas that do not serve, outside `pods`.
    """
    outdated = sorted((pod for pod in pods if pod.outdated and not pod.going), key=lambda pod: -pod.ordinal)
    if not outdated or any(pod.going for pod in pods):
        return None
    broken = [pod for pod in outdated if not pod.ready]
    if broken:
        return broken[0]
    down = others_down + sum(not pod.ready for pod in pods)
    return outdated[0] if down == 0 else None
