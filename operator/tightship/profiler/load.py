"""A closed loop: exactly B requests in flight, each answered one replaced at once, every token's arrival timed.

What must hold: between `resize` and `close` the number of requests in flight never exceeds the size, and falls below it only while a
connection is made or a failed request waits to be sent again. Latency is counted by tokens: a gap that brings k tokens counts as k gaps of
a k-th. Only what happens between two `begin` calls is in a recording. The load measures its own lateness, how much later than due its event
loop ran a timer: a load that is late measures itself, not the engine.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Final

from tightship.profiler.clock import Clock
from tightship.profiler.errors import EngineError, LoadError
from tightship.profiler.histogram import Histogram
from tightship.profiler.lengths import Length, Lengths, Prompts
from tightship.profiler.wire import Channel, Completion

RETRY_SECONDS: Final = 0.2
FAILURES_IN_A_ROW: Final = 20
STALL_SECONDS: Final = 90.0
_TICK: Final = 0.02
_TIMER_GRAIN: Final = 0.001
"""The event loop's timers are rounded up to a millisecond (epoll's unit): that much late is not late. Seconds."""


@dataclass
class Recording:
    """What the client saw since `begin`."""

    since: float
    tokens: int = 0
    requests: int = 0
    failures: int = 0
    itl: Histogram = field(default_factory=Histogram)
    """Inter-token latency in seconds, weighed by tokens."""
    ttft: Histogram = field(default_factory=Histogram)
    """Time to first token in seconds, of requests that started fresh."""
    lateness: Histogram = field(default_factory=Histogram)
    """How late the client's own timers ran, seconds."""
    busy: float = 0.0
    """Integral of requests in flight over time, request-seconds."""


class ClosedLoop:
    """Keeps a number of requests in flight on a channel."""

    def __init__(self, channel: Channel, lengths: Lengths, prompts: Prompts, clock: Clock, seed: int) -> None:
        self._channel = channel
        self._lengths = lengths
        self._prompts = prompts
        self._clock = clock
        self._rng = random.Random(seed)
        self._slots: set[_Slot] = set()
        self._size = 0
        self._waiting = 0  # slots without their first token since they started or failed
        self._in_flight = 0
        self._changed = clock.now()
        self._row = 0
        self._last_failure = ""
        self._broken: str | None = None
        self._progress = clock.now()
        self._ticker: asyncio.TimerHandle | None = None
        self.recording = Recording(since=clock.now())

    @property
    def size(self) -> int:
        """Requests kept in flight."""
        return self._size

    @property
    def settled(self) -> bool:
        """Whether exactly `size` requests are in flight and each has had a token since it was added."""
        return not self._waiting and len(self._slots) == self._size

    @property
    def silent(self) -> float:
        """Seconds since the last token came."""
        return self._clock.now() - self._progress

    def resize(self, size: int) -> None:
        """Keep `size` requests in flight: what runs goes on, new ones start in the steady state, spare ones end by themselves."""
        self._size = size
        if self._ticker is None:
            self._tick(self._clock.now())
        self._progress = self._clock.now()
        while len(self._slots) < size:
            slot = _Slot(self)
            self._slots.add(slot)
            self._waiting += 1
            slot.start(self._lengths.aged(self._rng), fresh=False)

    def begin(self) -> Recording:
        """Start a new recording, and return it; it fills until the next `begin`."""
        self._account()
        self.recording = Recording(since=self._clock.now())
        return self.recording

    def check(self) -> None:
        """Raise when the load can't go on.

        Raises:
            LoadError: the engine refuses the requests as such.
            EngineError: requests fail one after the other, or no token has come for 90 s.
        """
        if self._broken is not None:
            raise LoadError(self._broken)
        if self._row >= FAILURES_IN_A_ROW:
            raise EngineError(f"{self._row} requests failed in a row, the last because {self._last_failure}")
        if self._size and self.silent > STALL_SECONDS:
            raise EngineError(f"no token has come for {self.silent:.0f} s with {self._in_flight} requests in flight")

    async def close(self) -> None:
        """Drop everything in flight."""
        self._size = 0
        self._slots.clear()
        if self._ticker is not None:
            self._ticker.cancel()
        await self._channel.close()

    def _account(self) -> None:
        now = self._clock.now()
        self.recording.busy += self._in_flight * (now - self._changed)
        self._changed = now

    def _tick(self, due: float) -> None:
        late = self._clock.now() - due - _TIMER_GRAIN
        self.recording.lateness.add(max(0.0, late))
        self._ticker = asyncio.get_running_loop().call_later(_TICK, self._tick, self._clock.now() + _TICK)

    def _submit(self, slot: _Slot, length: Length) -> None:
        self._account()
        self._in_flight += 1
        self._channel.submit(Completion(self._prompts.draw(length.input), length.output), slot)

    def _left(self) -> None:
        self._account()
        self._in_flight -= 1

    def _finished(self, slot: _Slot) -> None:
        self._left()
        self.recording.requests += 1
        if len(self._slots) > self._size:
            self._slots.discard(slot)
        elif slot in self._slots:
            slot.start(self._lengths.fresh(self._rng), fresh=True)

    def _failed(self, slot: _Slot, reason: str, final: bool) -> None:
        self._left()
        self.recording.failures += 1
        self._row += 1
        self._last_failure = reason
        if final:
            self._broken = reason
        elif slot in self._slots:
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._again, slot)

    def _again(self, slot: _Slot) -> None:
        if slot in self._slots:
            slot.start(self._lengths.fresh(self._rng), fresh=True)


class _Slot:
    """One of the B places: a request, and after it the next."""

    __slots__ = ("_fresh", "_last", "_loop", "_new", "_submitted")

    def __init__(self, loop: ClosedLoop) -> None:
        self._loop = loop
        self._new = True
        self._fresh = False
        self._last: float | None = None
        self._submitted = 0.0

    def start(self, length: Length, *, fresh: bool) -> None:
        self._fresh = fresh
        self._last = None
        self._submitted = self._loop._clock.now()
        self._loop._submit(self, length)

    def tokens(self, count: int) -> None:
        loop = self._loop
        now = loop._clock.now()
        recording = loop.recording
        recording.tokens += count
        last = self._last
        self._last = now
        if last is not None:
            recording.itl.add((now - last) / count, count)
            loop._progress = now
            return
        loop._progress = now
        loop._row = 0
        if self._fresh:
            recording.ttft.add(now - self._submitted)
        if self._new:
            self._new = False
            loop._waiting -= 1

    def finished(self) -> None:
        self._loop._finished(self)

    def failed(self, reason: str, final: bool) -> None:
        self._loop._failed(self, reason, final)
