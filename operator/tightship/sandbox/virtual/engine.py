"""An engine of the simulation behind the profiler's ports, in virtual time.

Each step is two timers: the end of its host part, when it queues for the GPU, and the end of its GPU part, when its tokens are
handed over, all of a step in one callback. Timers fire in order, so engines of one GPU queue in the order in which they are
ready, whichever they are. A request that comes while a step is under way is considered at the next one, as in vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, cast

from tightship.profiler.engine import EngineInfo
from tightship.profiler.errors import kind_of
from tightship.profiler.metrics import EngineSample
from tightship.profiler.wire import Channel, Completion, Listener
from tightship.sandbox.simulation.costs import Model
from tightship.sandbox.simulation.engine import Engine, Outcome, Sequence, Step
from tightship.sandbox.simulation.gpu import Gpu, OutOfMemoryError
from tightship.sandbox.simulation.serving.channel import RefusedError
from tightship.sandbox.simulation.serving.startup import Started, activation_bytes
from tightship.sandbox.virtual.disturbance import Faults, Noise

_REMEMBERED: Final = 4096
"""Requests that a channel keeps in mind before it forgets those that are over."""


@dataclass(slots=True, eq=False)
class _Request(Sequence):
    """A request, who asked for it, and whether its tokens are sampled from sorted logits."""

    listener: Listener | None = None
    sorts: bool = False


@dataclass
class _Counters:
    """What the engine's metrics count. Tokens, seconds."""

    generation_tokens: int = 0
    prompt_tokens: int = 0
    itl_sum: float = 0.0
    itl_count: int = 0


@dataclass(frozen=True)
class Place:
    """Where an engine runs: its GPU, the owner of its memory there, and what disturbs it."""

    gpu: Gpu
    owner: Hashable
    noise: Noise | None = None
    faults: Faults = field(default_factory=Faults)


class VirtualEngine:
    """A healthy engine on a simulated GPU; see the module's docstring."""

    def __init__(self, place: Place, model: Model, started: Started, info: EngineInfo) -> None:
        """`started` says what memory it took; the engine gives it back when it stops or dies."""
        self._place = place
        self._gpu = place.gpu
        self._model = model
        self._started = started
        self._info = info
        self._loop = asyncio.get_running_loop()
        self._engine = Engine(started.scheduling, model.costs)
        self._counters = _Counters()
        self._requests: set[_Request] = set()
        self._sorting = 0
        self._idle = True
        self._hangs = False
        self._over: str | None = None
        self._timer: asyncio.Handle | None = None
        self._faults: list[asyncio.TimerHandle] = []
        faults = place.faults
        if faults.dies_after is not None:
            self._faults.append(self._loop.call_later(faults.dies_after, self._die, faults.last_words))
        if faults.hangs_after is not None:
            self._faults.append(self._loop.call_later(faults.hangs_after, self._hang))

    @property
    def info(self) -> EngineInfo:
        """What it said of itself."""
        return self._info

    @property
    def memory(self) -> int:
        """Bytes it holds of its GPU."""
        return self._gpu.memory.owned(self._place.owner)

    def channel(self) -> Channel:
        """A new way to send requests to it."""
        return VirtualChannel(self)

    async def check(self) -> None:
        """Raise EngineError, or OutOfMemory, with its last words when it has died."""
        if self._over is not None:
            raise kind_of(self._over)(f"the engine died: exit status 1; its last words: {self._over}")

    def owns(self, pid: int) -> bool:
        """None: it is no process."""
        return False

    def last_words(self) -> str:
        """What it died of, or what it says by its faults."""
        return self._over or self._place.faults.says

    async def sample(self) -> EngineSample:
        """Its counters and gauges now."""
        await self.check()
        counters, engine = self._counters, self._engine
        return EngineSample(
            at=self._loop.time(),
            generation_tokens=counters.generation_tokens,
            prompt_tokens=counters.prompt_tokens,
            preemptions=engine.preemptions,
            running=len(engine.running),
            waiting=len(engine.waiting),
            kv_usage=engine.cache_usage,
            itl_sum=counters.itl_sum,
            itl_count=counters.itl_count,
        )

    async def stop(self) -> None:
        """End it and give its memory back; who waits for a token hears that the connection is lost."""
        if self._over is None:
            self._end("stopped")

    def submit(self, request: Completion, listener: Listener) -> _Request | None:
        """Queue a request; None where it is refused, which the listener hears of on the next turn of the loop."""
        if self._over is not None:
            self._loop.call_soon(listener.failed, "no connection: the engine is gone", False)
            return None
        sequence = _Request(
            request.prompt.count(b",") + 1,
            request.output,
            arrived=self._loop.time(),
            listener=listener,
            sorts=bool(request.sampling),
        )
        try:
            self._engine.add(sequence)
        except ValueError as error:
            self._loop.call_soon(listener.failed, f"the engine answered 400: {error}", True)
            return None
        self._requests.add(sequence)
        self._sorting += sequence.sorts
        if self._idle:
            self._idle = False
            self._timer = self._loop.call_soon(self._next)
        return sequence

    def abandon(self, sequence: _Request) -> None:
        """Drop a request nobody waits for any more."""
        if sequence in self._requests:
            self._forget(sequence)
            self._engine.abort(sequence)

    def _forget(self, sequence: _Request) -> None:
        self._requests.discard(sequence)
        self._sorting -= sequence.sorts

    def _next(self) -> None:
        """Begin the next step with its host part."""
        now = self._loop.time()
        step = None if self._hangs else self._engine.plan(now)
        if step is None:
            self._idle = True
            return
        stretch = 1.0 if self._place.noise is None else self._place.noise.stretch(now)
        self._timer = self._loop.call_at(now + step.cost.host * stretch, self._queue, step, step.cost.gpu * stretch)

    def _queue(self, step: Step, seconds: float) -> None:
        """Queue for the GPU, with the memory the step needs."""
        try:
            self._grow(step)
        except RefusedError as error:
            self._die(str(error))
            return
        end = self._gpu.serve(self._loop.time(), seconds, step.cost.memory_share, owner=self)
        self._timer = self._loop.call_at(end, self._complete, step)

    def _grow(self, step: Step) -> None:
        """Take the memory a step needs beyond what any step before it needed."""
        rows = len(step.prefills) + len(step.decodes)
        tokens = sum(count for _, count in step.prefills) + len(step.decodes)
        holdings = self._started.holdings
        more = activation_bytes(self._model, tokens, rows, sorted_rows=self._sorting) - holdings.parts["activations"]
        if more <= 0:
            return
        try:
            self._gpu.memory.allocate(self._place.owner, more)
        except OutOfMemoryError as error:
            refused = RefusedError({"error": str(error), "free": error.free})
            raise RefusedError({"error": holdings.out_of_memory(more, refused)}) from error
        holdings.parts["activations"] += more

    def _complete(self, step: Step) -> None:
        """Hand over what a step brought, and go on."""
        outcome = self._engine.complete(step, self._loop.time())
        self._count(outcome)
        for sequence in cast("list[_Request]", outcome.tokens):
            assert sequence.listener is not None
            sequence.listener.tokens(1)
        for sequence in cast("list[_Request]", outcome.finished):
            self._forget(sequence)
            assert sequence.listener is not None
            sequence.listener.finished()
        if self._over is None:
            self._next()

    def _count(self, outcome: Outcome) -> None:
        counters = self._counters
        counters.generation_tokens += len(outcome.tokens)
        counters.prompt_tokens += outcome.prompt_tokens
        for gap, count in outcome.gaps.items():
            counters.itl_sum += gap * count
            counters.itl_count += count

    def _hang(self) -> None:
        self._hangs = True

    def _die(self, words: str) -> None:
        if self._over is None:
            self._end(words)

    def _end(self, words: str) -> None:
        self._over = words
        for timer in (self._timer, *self._faults):
            if timer is not None:
                timer.cancel()
        self._gpu.memory.release(self._place.owner)
        requests, self._requests = self._requests, set()
        for sequence in sorted(requests, key=lambda one: one.arrived):
            assert sequence.listener is not None
            sequence.listener.failed(f"connection lost after {sequence.generated} of {sequence.output} tokens", False)


class VirtualTicket:
    """A request that was sent; None in it where the engine refused it."""

    __slots__ = ("_engine", "_request")

    def __init__(self, engine: VirtualEngine, request: _Request | None) -> None:
        self._engine = engine
        self._request = request

    def cancel(self) -> None:
        """Drop it, if it is still in flight: its listener hears nothing more."""
        if self._request is not None:
            self._engine.abandon(self._request)


class VirtualChannel:
    """Requests straight into a virtual engine."""

    def __init__(self, engine: VirtualEngine) -> None:
        self._engine = engine
        self._sent: list[_Request] = []

    def submit(self, request: Completion, listener: Listener) -> VirtualTicket:
        """Send a request; returns at once, the listener hears the rest."""
        sequence = self._engine.submit(request, listener)
        if sequence is not None:
            self._sent.append(sequence)
            if len(self._sent) > _REMEMBERED:
                self._sent = [one for one in self._sent if not (one.finished or one.aborted)]
        return VirtualTicket(self._engine, sequence)

    async def close(self) -> None:
        """Drop all requests; listeners hear nothing more."""
        sent, self._sent = self._sent, []
        for sequence in sent:
            self._engine.abandon(sequence)
