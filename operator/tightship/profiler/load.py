"""A closed loop: exactly B requests in flight, each answered one replaced at once, every token's arrival timed.

What must hold: between `resize` and `close` the number of requests in flight never exceeds the size, and falls below it only while a
connection is made or a failed request waits to be sent again. Latency is counted by tokens: a gap that brings k tokens counts as k gaps of
a k-th. Only what happens between two `begin` calls is in a recording.

A load that can't keep up measures itself, not the engine, so it watches itself in two ways. Its event loop runs a timer at random moments
and notes how much later than due it ran: the time that anything due at that moment would have waited, a token that became readable
included, since one round of the loop handles all readable sockets before its timers. That shows rounds that are long beside the time between
tokens, and cores that other processes took. It is blind below a timer's grain, and to a loop that is always busy in short rounds;
so the share of its core that the loop's thread took is noted as well.

The rule, here and nowhere else: what a load saw is refused when its mean lateness exceeds a fifth of the time between tokens, or its thread
took more than 90 % of a core. Lateness puts off all arrivals of a step alike, so it hardly moves the mean of the gaps, but it blurs their
tail by as much as its own: where its 95th percentile exceeds a tenth of the time between tokens, p95 and p99 count as unresolved. An
engine sends all streams their tokens at once, and a client that is busy for a share u of each step then is u^2/2 of a step late on average
and almost u at the 95th percentile: so it is refused from u = 0.63 on, and has blurred percentiles from u = 0.15 on.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

from tightship.profiler.clock import Clock
from tightship.profiler.errors import LoadError, UnansweredError
from tightship.profiler.histogram import Histogram
from tightship.profiler.lengths import Length, Lengths, Prompts
from tightship.profiler.wire import Channel, Completion, Ticket

RETRY_SECONDS: Final = 0.2
FAILURES_IN_A_ROW: Final = 20
STALL_SECONDS: Final = 90.0
LATENESS_MOST: Final = 0.2
"""How late the load may run on average, as a share of the time between tokens."""
BLUR_MOST: Final = 0.1
"""How late it may run at the 95th percentile for the latency's own high percentiles to count, as a share of the same."""
CPU_MOST: Final = 0.9
"""Share of a core above which one thread has nothing left to react with."""
_TICK: Final = 0.02
_TIMER_GRAIN: Final = 0.001
"""The event loop's timers are rounded up to a millisecond (epoll's unit): that much late is not late. Seconds."""


@runtime_checkable
class Metered(Protocol):
    """A clock that also counts CPU time; one whose seconds are virtual has none to compare them with."""

    def cpu(self) -> float:
        """CPU seconds that the calling thread took so far."""


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
    """How late the client's own timers ran at random moments, seconds."""
    busy: float = 0.0
    """Integral of requests in flight over time, request-seconds."""
    seconds: float = 0.0
    """Length so far."""
    cpu: float | None = None
    """Share of one core that the load's thread took, 0 to 1; None where the clock counts no CPU time."""

    def overloaded(self, itl: float) -> str | None:
        """Why the load could not drive what it should, so that nothing it saw counts, with numbers; None when it could.

        Args:
            itl: mean time between a request's tokens in seconds, what lateness is measured by.
        """
        late = self.lateness.mean or 0.0
        if late > LATENESS_MOST * itl:
            return (
                f"its event loop ran {late * 1000:.1f} ms late on average, more than {LATENESS_MOST:.0%} of the "
                f"{itl * 1000:.2f} ms between tokens: give it a core of its own"
            )
        if self.cpu is not None and self.cpu > CPU_MOST:
            rate = self.tokens / self.seconds if self.seconds else 0.0
            return f"it took {self.cpu:.0%} of a core for {rate:.0f} tokens/s: one thread can't drive more"
        return None

    def blurred(self, itl: float) -> bool:
        """Whether lateness hides the high percentiles of the latency, though its mean may hold; `itl` as for `overloaded`."""
        return (self.lateness.quantile(0.95) or 0.0) > BLUR_MOST * itl


class Loop:
    """What every load does: it counts what it sees in a recording, notes its own use of the processor, and knows when it can't go on."""

    def __init__(self, channel: Channel, prompts: Prompts, clock: Clock, seed: int) -> None:
        self._channel = channel
        self._prompts = prompts
        self._clock = clock
        self._now = clock.now
        self._rng = random.Random(seed)
        self._row = 0
        self._last_failure = ""
        self._broken: str | None = None
        self._progress = clock.now()
        self._cpu = clock.cpu if isinstance(clock, Metered) else None
        self._cpu_since = 0.0
        self.in_flight = 0
        """Requests on their way now."""
        self.recording = Recording(since=clock.now())

    @property
    def last_token(self) -> float:
        """When the last token came, by the load's clock; when the size last changed, if none has come since."""
        return self._progress

    @property
    def silent(self) -> float:
        """Seconds since the last token came."""
        return self._now() - self._progress

    def begin(self) -> Recording:
        """Start a new recording, and return it; it fills until the next `begin`."""
        self._meter()
        self.recording = Recording(since=self._now())
        if self._cpu is not None:
            self._cpu_since = self._cpu()
        return self.recording

    def check(self) -> None:
        """Raise when the load can't go on.

        Raises:
            LoadError: the engine refuses the requests as such.
            UnansweredError: requests fail one after the other, or no token has come for 90 s though some were due.
        """
        if self._broken is not None:
            raise LoadError(self._broken)
        if self._row >= FAILURES_IN_A_ROW:
            raise UnansweredError(f"{self._row} requests failed in a row, the last because {self._last_failure}")
        if self._awaits_tokens and self.silent > STALL_SECONDS:
            raise UnansweredError(f"no token has come for {self.silent:.0f} s with {self.in_flight} requests in flight")

    @property
    def _awaits_tokens(self) -> bool:
        """Whether an engine that is well would send tokens now."""
        return self.in_flight > 0

    def _meter(self) -> None:
        recording = self.recording
        recording.seconds = self._now() - recording.since
        if self._cpu is not None and recording.seconds > 0:
            recording.cpu = (self._cpu() - self._cpu_since) / recording.seconds

    def _late(self, due: float) -> None:
        """Record how late something that was due then is done."""
        self.recording.lateness.add(max(0.0, self._now() - due - _TIMER_GRAIN))

    def _count_failure(self, reason: str, *, final: bool) -> None:
        self.recording.failures += 1
        self._row += 1
        self._last_failure = reason
        if final:
            self._broken = reason


class ClosedLoop(Loop):
    """Keeps a number of requests in flight on a channel."""

    def __init__(self, channel: Channel, lengths: Lengths, prompts: Prompts, clock: Clock, seed: int) -> None:
        super().__init__(channel, prompts, clock, seed)
        self._moments = random.Random(seed + 1)
        self._lengths = lengths
        self._aged, self._fresh = lengths.aged_evenly(self._rng), lengths.fresh_evenly(self._rng)
        self.by_lot = False
        """Whether requests are drawn independently, so that what they hold together fluctuates as a workload's does; evenly otherwise."""
        self._slots: dict[_Slot, None] = {}  # in the order they were added: a set's would differ from run to run
        self._size = 0
        self._waiting = 0  # slots without their first token since they started or failed
        self._changed = clock.now()
        self._ticker: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """Requests kept in flight."""
        return self._size

    @property
    def settled(self) -> bool:
        """Whether exactly `size` requests are in flight and each has had a token since it was added."""
        return not self._waiting and len(self._slots) == self._size

    def resize(self, size: int) -> None:
        """Keep `size` requests in flight: what runs goes on, new ones start in the steady state.

        Spare ones end by themselves, each in its own time, unless `drop_surplus` ends them at once.
        """
        self._size = size
        if self._ticker is None:
            self._tick(self._now())
        self._progress = self._now()
        while len(self._slots) < size:
            slot = _Slot(self)
            self._slots[slot] = None
            self._waiting += 1
            slot.start(self._lengths.aged(self._rng) if self.by_lot else next(self._aged), fresh=False)

    def drop_surplus(self) -> int:
        """End at once what is in flight beyond `size`; returns how many requests that was. The engine aborts them.

        Who goes is drawn by lot, evenly over the contexts in flight: the rest then is as in a steady state of the new size. Dropping the
        newest, say, would leave the old and long.
        """
        surplus = max(0, len(self._slots) - self._size)
        ordered = sorted(self._slots, key=lambda slot: slot.context)
        first = self._rng.random()
        going = [ordered[int((first + number) * len(ordered) / surplus)] for number in range(surplus)]
        for slot in going if surplus < len(ordered) else ordered:
            self._remove(slot)
            ticket, slot.ticket = slot.ticket, None
            if ticket is not None:
                self._left()
                ticket.cancel()
        return surplus

    def begin(self) -> Recording:
        """Start a new recording, and return it; it fills until the next `begin`."""
        self._account()
        return super().begin()

    @property
    def _awaits_tokens(self) -> bool:
        return self._size > 0

    async def close(self) -> None:
        """Drop everything in flight."""
        self._size = 0
        self._slots.clear()
        if self._ticker is not None:
            self._ticker.cancel()
        await self._channel.close()

    def _account(self) -> None:
        now = self._now()
        self.recording.busy += self.in_flight * (now - self._changed)
        self._changed = now

    def _tick(self, due: float) -> None:
        self._late(due)
        self._meter()
        wait = _TICK * self._moments.uniform(0.5, 1.5)  # at random moments, or it could fall in step with the engine
        self._ticker = asyncio.get_running_loop().call_later(wait, self._tick, self._now() + wait)

    def _next(self) -> Length:
        return self._lengths.fresh(self._rng) if self.by_lot else next(self._fresh)

    def _submit(self, slot: _Slot, length: Length) -> None:
        self._account()
        self.in_flight += 1
        slot.ended = False
        ticket = self._channel.submit(Completion(self._prompts.draw(length.input), length.output), slot)
        slot.ticket = None if slot.ended else ticket  # a channel may fail a request before it returns

    def _remove(self, slot: _Slot) -> None:
        del self._slots[slot]
        self._waiting -= slot.new

    def _left(self) -> None:
        self._account()
        self.in_flight -= 1

    def _finished(self, slot: _Slot) -> None:
        self._left()
        self.recording.requests += 1
        if len(self._slots) > self._size:
            self._slots.pop(slot, None)
        elif slot in self._slots:
            slot.start(self._next(), fresh=True)

    def _failed(self, slot: _Slot, reason: str, final: bool) -> None:
        self._left()
        self._count_failure(reason, final=final)
        if final:
            return
        if len(self._slots) > self._size and slot in self._slots:
            self._remove(slot)
        elif slot in self._slots:
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._again, slot)

    def _again(self, slot: _Slot) -> None:
        if slot in self._slots:
            slot.start(self._next(), fresh=True)


class _Slot:
    """One of the B places: a request, and after it the next."""

    __slots__ = ("_fresh", "_last", "_loop", "_submitted", "context", "ended", "new", "ticket")

    def __init__(self, loop: ClosedLoop) -> None:
        self._loop = loop
        self.new = True
        """Whether it is still without a first token."""
        self.ended = False
        """Whether its request is over."""
        self.ticket: Ticket | None = None
        """Its request in flight."""
        self.context = 0
        """Tokens of that request so far, its prompt included."""
        self._fresh = False
        self._last: float | None = None
        self._submitted = 0.0

    def start(self, length: Length, *, fresh: bool) -> None:
        self._fresh = fresh
        self.context = length.input
        self._last = None
        self._submitted = self._loop._now()
        self._loop._submit(self, length)

    def tokens(self, count: int) -> None:
        loop = self._loop
        now = loop._now()
        recording = loop.recording
        recording.tokens += count
        self.context += count
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
        if self.new:
            self.new = False
            loop._waiting -= 1

    def finished(self) -> None:
        self.ended = True
        self.ticket = None
        self._loop._finished(self)

    def failed(self, reason: str, final: bool) -> None:
        self.ended = True
        self.ticket = None
        self._loop._failed(self, reason, final)
