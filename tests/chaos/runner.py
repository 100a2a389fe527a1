"""One run: a seeded sequence of events in bursts, and after each burst the cluster must settle into what was asked for.

What the run's seed decides: the events, their order, their targets' numbers, and how they fall into bursts. What it can't decide is how far
the cluster has come when one strikes; a failure is reproduced by the same command, usually at the same event.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from chaos import invariants
from chaos.client import PATHS, Object
from chaos.events import EVENTS, Draw, Harm
from chaos.invariants import Seen, Tracker
from chaos.world import MISSING_IMAGE, World

SETTLE_SECONDS = 120.0
"""What a burst may take to settle on a busy machine: less than the operator's resync (300 s), which would hide what it has overlooked."""
REST_SECONDS = 1.0
"""How long everything must be right, and nothing change, to count as settled."""
AGENT_REST_SECONDS = 6.0
"""The same after the nodes' agent was started again: until it reports, the API shows pods as the one before left them."""
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


def plan(seed: int, hollow: bool = True) -> Iterator[list[Planned]]:
    """Bursts of events without end, the same for the same seed. `hollow`: as the nodes are."""
    rng = random.Random(seed)
    names = sorted(name for name, kind in EVENTS.items() if hollow or not kind.hollow)
    weights = [EVENTS[name].weight for name in names]
    while True:
        size = 1 + int(LARGEST_BURST * rng.random() ** 2)
        burst = []
        for _ in range(size):
            name = rng.choices(names, weights)[0]
            burst.append(Planned(name, Draw(rng.random(), rng.random(), rng.random()), 1.5 * rng.random() ** 2))
        yield burst


@dataclass
class Calm:
    """The cluster as it had last settled, and what has happened since."""

    settled: Seen
    harm: list[Harm] = field(default_factory=list)
    lowest: dict[tuple[str, str], int] = field(default_factory=dict)
    """The fewest replicas that were asked for, by service."""

    def ask(self, asked: Mapping[tuple[str, str], Object]) -> None:
        """Take note of what is asked for by now."""
        for key, service in asked.items():
            wanted = int(service["spec"]["replicas"])
            self.lowest[key] = min(wanted, self.lowest.get(key, wanted))

    def floors(self) -> dict[tuple[str, str], int]:
        """How many replicas have to serve throughout, by service."""
        if Harm.MORE in self.harm:
            return {}
        faults = self.harm.count(Harm.PACK)
        return invariants.floors(self.settled, self.lowest, faults, len(self.harm) - faults)


@dataclass
class Run:
    """A run under way. Events that find nothing to hit don't count."""

    world: World
    seed: int
    events: int
    say: Callable[[str], None] = print
    history: list[str] = field(default_factory=list)
    tracker: Tracker = field(default_factory=Tracker)
    happened: int = 0
    settle_seconds: list[float] = field(default_factory=list)
    _calm: Calm | None = None
    _began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """All bursts. Raises ChaosError."""
        self._settle("the services' first start")
        for burst in plan(self.seed, self.world.hollow):
            struck = [each.name for each in burst if self.happened < self.events and self._strike(each)]
            for ended in self.world.mend():
                self._note(f"  {ended}")
            if struck:
                self._settle(", ".join(struck), AGENT_REST_SECONDS if "kill-agent" in struck else REST_SECONDS)
            if self.happened >= self.events:
                return

    def _strike(self, planned: Planned) -> bool:
        """Have an event happen; whether it hit something."""
        kind = EVENTS[planned.name]
        assert self._calm is not None
        self._calm.harm.append(kind.harm)
        did = kind.act(self.world, planned.draw)
        if did is None:
            self._calm.harm.pop()
            return False
        self.happened += 1
        self._note(f"{self.happened:4} {planned.name}: {did}")
        self._calm.ask(self.world.services)
        until = time.monotonic() + planned.pause
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL))
            self._check_journal()
            self._check_served(observe(self.world))
        return True

    def _settle(self, what: str, rest: float = REST_SECONDS) -> None:
        """Wait until all invariants hold and nothing changes. Raises ChaosError."""
        began = right_since = time.monotonic()
        versions: object = None
        told = began + TELL_SECONDS
        while True:
            self._check_journal()
            seen = observe(self.world)
            self._check_served(seen)
            found, now = invariants.settled(seen), time.monotonic()
            current = _versions(seen)
            if found or current != versions:
                right_since, versions = now, current
            elif now - right_since >= rest:
                break
            if now > told:
                told = now + TELL_SECONDS
                self._note(f"     waiting: {found[0] if found else 'objects change'}")
            if now - began > SETTLE_SECONDS:
                found = found or ["objects go on changing: " + ", ".join(self._changing(current))]
                raise self._failure(f"not settled {SETTLE_SECONDS:g} s after {what}", found)
            time.sleep(_POLL)
        self._calm = Calm(Seen(seen.objects, copy.deepcopy(seen.asked)))
        self.settle_seconds.append(time.monotonic() - began)
        self._note(f"     settled in {self.settle_seconds[-1]:.1f} s")

    def _changing(self, before: dict[str, str]) -> list[str]:
        time.sleep(2 * REST_SECONDS)
        after = _versions(observe(self.world))
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    def _check_journal(self) -> None:
        if found := list(self.tracker.follow(self.world.news.read())):
            raise self._failure("on the nodes", found)

    def _check_served(self, seen: Seen) -> None:
        if self._calm is not None and (found := list(invariants.served(seen, self._calm.floors()))):
            raise self._failure("an outage", found)

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
