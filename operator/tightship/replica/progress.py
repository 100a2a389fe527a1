"""Whether an engine that answers `/health` still computes.

vLLM's `/health` asks its API server, which goes on answering while the engine behind it waits for a GPU kernel that never ends. What
shows it are the engine's own counters: while requests run, each step moves one of them. So an engine is hung when requests run and
no counter has moved for a bounded time. What must hold: an idle engine is never hung; a look that got no answer says nothing; a pause
of the whole machine counts as one look, not as the time it took.

A blind spot remains: vLLM updates its gauges with finished steps, so an engine that hangs in the first step after having been idle
still shows no running request.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """What the engine's metrics say: requests that run, tokens generated, and every counter that a step moves."""

    running: int
    tokens: int
    counters: tuple[float, ...]


class Watchdog:
    """Adds up for how long requests have run without anything having moved.

    Args:
        limit: seconds after which that is a hang; 0 never finds one.
        period: seconds between two looks as planned; a longer gap counts as twice this at most.
    """

    def __init__(self, limit: float, period: float) -> None:
        self._limit = limit
        self._period = period
        self._last: Activity | None = None
        self._looked = 0.0
        self._still = 0.0

    def look(self, seen: Activity | None, now: float) -> str | None:
        """Take what was just seen (None: no answer) at `now` (monotonic seconds); returns the finding once it is a hang."""
        gap, self._looked = min(now - self._looked, 2 * self._period), now
        if seen is None:
            return None
        moved = self._last is None or seen.counters != self._last.counters
        self._still = 0.0 if moved or not seen.running else self._still + gap
        self._last = seen
        if not self._limit or self._still < self._limit:
            return None
        return (
            f"{seen.running} requests run, and for {self._still:.0f} s (limit {self._limit:g} s) no step ended: "
            f"{seen.tokens} tokens since the engine started and no more, while /health answers; it is stopped and started anew"
        )
