"""One run: a seeded sequence of events in bursts, and after each burst the cluster must settle into what was asked for.

What the run's seed decides: the events, their order, their targets' numbers, and how they fall into bursts. What it can't decide is how far
the cluster has come when one strikes; a failure is reproduced by the same command, usually at the same event.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from chaos import invariants
from chaos.client import PATHS
from chaos.events import EVENTS, Draw
from chaos.invariants import Seen, Tracker
from chaos.world import MISSING_IMAGE, World

SETTLE_SECONDS = 120.0
"""What a burst may take to settle on a busy machine: less than the operator's resync (300 s), which would hide what it has overlooked."""
REST_SECONDS = 1.0
"""How long everything must be right, and nothing change, to count as settled."""
TELL_SECONDS = 10.0
LARGEST_BURST = 4
_POLL = 0.4


class ChaosError(AssertionError):
    """An invariant was violated; the text has the seed, what happened before, and how to run it again."""


@dataclass(frozen=True)
class Planned:
    """One event to come, and the pause (seconds) after it."""

    name: str
    draw: Draw
    pause: float


def plan(seed: int, events: int, hollow: bool = True) -> Iterator[list[Planned]]:
    """Bursts of events; the same for the same seed, and a longer run begins as a shorter one. `hollow`: as the nodes are."""
    rng = random.Random(seed)
    names = sorted(name for name, kind in EVENTS.items() if hollow or not kind.hollow)
    weights = [EVENTS[name].weight for name in names]
    left = events
    while left:
        size = min(left, 1 + int(LARGEST_BURST * rng.random() ** 2))
        burst = []
        for _ in range(size):
            name = rng.choices(names, weights)[0]
            burst.append(Planned(name, Draw(rng.random(), rng.random(), rng.random()), 1.5 * rng.random() ** 2))
        left -= size
        yield burst


@dataclass
class Run:
    """A run under way."""

    world: World
    seed: int
    events: int
    say: Callable[[str], None] = print
    history: list[str] = field(default_factory=list)
    tracker: Tracker = field(default_factory=Tracker)
    happened: int = 0
    settle_seconds: list[float] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """All bursts. Raises ChaosError."""
        self._settle("the services' first start")
        for burst in plan(self.seed, self.events, self.world.hollow):
            for each in burst:
                self._strike(each)
            for ended in self.world.mend():
                self._note(f"  {ended}")
            self._settle(", ".join(each.name for each in burst))

    def _strike(self, planned: Planned) -> None:
        self.happened += 1
        did = EVENTS[planned.name].act(self.world, planned.draw)
        self._note(f"{self.happened:4} {planned.name}: {did or 'nothing to hit'}")
        time.sleep(planned.pause)
        self._check_journal()

    def _settle(self, what: str) -> None:
        """Wait until all invariants hold and nothing changes. Raises ChaosError."""
        began = right_since = time.monotonic()
        versions: object = None
        told = began + TELL_SECONDS
        while True:
            self._check_journal()
            seen = observe(self.world)
            found, now = invariants.settled(seen), time.monotonic()
            current = _versions(seen)
            if found or current != versions:
                right_since, versions = now, current
            elif now - right_since >= REST_SECONDS:
                break
            if now > told:
                told = now + TELL_SECONDS
                self._note(f"     waiting: {found[0] if found else 'objects change'}")
            if now - began > SETTLE_SECONDS:
                found = found or ["objects go on changing: " + ", ".join(self._changing(current))]
                raise self._failure(f"not settled {SETTLE_SECONDS:g} s after {what}", found)
            time.sleep(_POLL)
        self.settle_seconds.append(time.monotonic() - began)
        self._note(f"     settled in {self.settle_seconds[-1]:.1f} s")

    def _changing(self, before: dict[str, str]) -> list[str]:
        time.sleep(2 * REST_SECONDS)
        after = _versions(observe(self.world))
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    def _check_journal(self) -> None:
        if found := list(self.tracker.follow(self.world.news.read())):
            raise self._failure("on the nodes", found)

    def _note(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:7.1f}  {text}"
        self.history.append(line)
        self.say(line)

    def _failure(self, when: str, violations: Sequence[str]) -> ChaosError:
        plane = "real" if self.world.real else "embedded"
        return ChaosError(
            "\n".join(
                [
                    f"chaos, seed {self.seed}, event {self.happened}: {when}:",
                    *(f"  - {each}" for each in violations),
                    "what happened:",
                    *self.history,
                    f"again: make chaos SEED={self.seed} EVENTS={self.happened or 1} PLANE={plane}",
                ]
            )
        )


def observe(world: World) -> Seen:
    """The cluster now."""
    return Seen({kind: world.client.list(kind) for kind in PATHS if kind != "Namespace"}, world.services)


def _versions(seen: Seen) -> dict[str, str]:
    """Version of everything whose change means that something goes on: not of nodes, which have heartbeats, nor of what is told
    of a service whose image is tried again and again.
    """
    trying = {key for key, asked in seen.asked.items() if asked["spec"]["engine"]["image"] == MISSING_IMAGE}
    return {
        f"{kind} {obj['metadata'].get('namespace', '')}/{obj['metadata']['name']}": obj["metadata"]["resourceVersion"]
        for kind, found in seen.objects.items()
        if kind != "Node"
        for obj in found
        if not trying & invariants.concerned(obj)
    }
