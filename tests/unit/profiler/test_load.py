"""The closed loop going down, and how it knows that it can't keep up: in virtual time, and on sockets against canned streams."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.core.memory import context_from_lengths
from tightship.profiler.arrivals import OpenLoop
from tightship.profiler.clock import SystemClock
from tightship.profiler.engine import EngineSettings
from tightship.profiler.histogram import Histogram
from tightship.profiler.lengths import Length, Lengths, Prompts
from tightship.profiler.load import ClosedLoop, Recording
from tightship.profiler.wire import Channel, Completion, HttpChannel, Listener, Ticket
from tightship.sandbox.simulation.experiment import sharegpt_lengths
from unit.profiler.fakes import FakeDevice, FakeEngine, FakeModel, VirtualClock, VirtualLoop, in_virtual_time

ROOT = Path(__file__).resolve().parents[3]

SHAREGPT = [Length(*pair) for pair in sharegpt_lengths(500, seed=3)]


def make_engine(model: FakeModel | None = None) -> FakeEngine:
    return FakeEngine(model or FakeModel(), EngineSettings(model="m", max_num_seqs=4096), FakeDevice())


def make_load(channel: Channel, lengths: Lengths | None = None, seed: int = 1) -> ClosedLoop:
    return ClosedLoop(channel, lengths or Lengths(SHAREGPT), Prompts(100, 1), VirtualClock(), seed)


def in_flight(engine: FakeEngine) -> int:
    return len(engine.running) + len(engine.waiting)


# --- going down ---


def test_surplus_requests_end_at_once() -> None:
    async def story() -> None:
        engine = make_engine()
        load = make_load(engine.channel())
        load.resize(64)
        await asyncio.sleep(5)
        load.resize(16)
        assert not load.settled
        assert load.drop_surplus() == 48
        assert load.settled
        assert in_flight(engine) == 16
        recording = load.begin()
        await asyncio.sleep(20)
        load.begin()
        assert in_flight(engine) == 16
        assert recording.failures == 0
        assert recording.requests > 0
        assert recording.busy == pytest.approx(16 * recording.seconds, rel=0.01)
        assert load.drop_surplus() == 0
        await load.close()

    in_virtual_time(story)


def test_what_stays_is_in_flight_as_in_the_steady_state() -> None:
    wanted = context_from_lengths(((pair.input, pair.output) for pair in SHAREGPT), block_size=0)

    async def story(seed: int) -> list[int]:
        engine = make_engine(FakeModel(kv_tokens=10_000_000))
        load = make_load(engine.channel(), seed=seed)
        load.resize(400)
        await asyncio.sleep(10)
        load.resize(100)
        load.drop_surplus()
        contexts = [one.context for one in engine.running]
        await load.close()
        return contexts

    contexts = [context for seed in range(8) for context in in_virtual_time(lambda seed=seed: story(seed))]  # type: ignore[misc]
    assert abs(statistics.fmean(contexts) - wanted.mean) < 2 * wanted.std / math.sqrt(len(contexts))


def test_what_stays_is_as_what_there_was() -> None:
    async def story(seed: int) -> float:
        engine = make_engine(FakeModel(kv_tokens=10_000_000))
        load = make_load(engine.channel(), seed=seed)
        load.resize(400)
        await asyncio.sleep(10)
        before = [one.context for one in engine.running]
        load.resize(100)
        load.drop_surplus()
        after = [one.context for one in engine.running]
        await load.close()
        return (statistics.fmean(after) - statistics.fmean(before)) / statistics.pstdev(before)

    off = [in_virtual_time(lambda seed=seed: story(seed)) for seed in range(10)]  # type: ignore[misc]
    assert math.sqrt(statistics.fmean(each * each for each in off)) < 0.4 / math.sqrt(100)  # by lot 0.087


def test_drawn_by_lot_or_evenly_is_the_loads_to_say() -> None:
    class Spy(Lengths):
        drawn: ClassVar[list[str]] = []

        def aged(self, rng: random.Random) -> Length:
            self.drawn.append("aged")
            return super().aged(rng)

        def fresh(self, rng: random.Random) -> Length:
            self.drawn.append("fresh")
            return super().fresh(rng)

    async def story() -> None:
        lengths = Spy([Length(10, 20)])
        load = make_load(make_engine(FakeModel(kv_tokens=10_000_000)).channel(), lengths)
        load.resize(4)
        await asyncio.sleep(10)
        assert not lengths.drawn
        load.by_lot = True
        load.resize(8)
        assert lengths.drawn == ["aged"] * 4
        await asyncio.sleep(10)
        assert "fresh" in lengths.drawn
        await load.close()

    in_virtual_time(story)


def test_surplus_without_a_first_token_or_between_two_tries_is_dropped_too() -> None:
    class Refusing:
        """Fails every second request, before it returns."""

        def __init__(self, inner: Channel) -> None:
            self.inner = inner
            self.asked = 0

        def submit(self, request: Completion, listener: Listener) -> Ticket:
            self.asked += 1
            if self.asked % 2 == 0:
                listener.failed("busy", final=False)
            return self.inner.submit(request, listener) if self.asked % 2 else Nothing()

        async def close(self) -> None:
            await self.inner.close()

    class Nothing:
        def cancel(self) -> None:
            raise AssertionError("a request that failed can't be cancelled")

    async def story() -> None:
        engine = make_engine()
        load = make_load(Refusing(engine.channel()))
        load.resize(40)
        load.resize(4)
        assert load.drop_surplus() == 36
        assert in_flight(engine) <= 4
        await asyncio.sleep(5)
        assert load.settled
        assert in_flight(engine) == load.size == 4
        await load.close()

    in_virtual_time(story)


def test_surplus_that_fails_is_not_sent_again() -> None:
    class Held:
        def __init__(self) -> None:
            self.listeners: list[Listener] = []

        def submit(self, request: Completion, listener: Listener) -> Ticket:
            self.listeners.append(listener)
            return self

        def cancel(self) -> None:
            raise AssertionError("nothing here is cancelled")

        async def close(self) -> None:
            """Nothing is open."""

    async def story() -> None:
        channel = Held()
        load = make_load(channel)
        load.resize(4)
        load.resize(2)
        for listener in channel.listeners[:3]:
            listener.failed("busy", final=False)
        await asyncio.sleep(5)
        assert len(channel.listeners) == 4 + 1  # two left, and the third was sent again
        for listener in channel.listeners[3:]:
            listener.tokens(1)
        assert load.settled
        await load.close()

    in_virtual_time(story)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.floats(0, 3)), min_size=1, max_size=12), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_never_more_in_flight_than_asked_for(moves: list[tuple[int, bool, float]], seed: int) -> None:
    async def story() -> None:
        engine = make_engine()
        load = make_load(engine.channel(), Lengths([Length(5, 30), Length(9, 4)]), seed)
        for size, drop, seconds in moves:
            before = in_flight(engine)
            load.resize(size)
            if drop:
                load.drop_surplus()
                assert in_flight(engine) == size
            assert in_flight(engine) == (size if drop else max(size, before))
            await asyncio.sleep(seconds)
            assert in_flight(engine) >= size
        load.drop_surplus()
        await asyncio.sleep(2)
        assert in_flight(engine) == load.size
        assert load.settled
        assert load.recording.failures == 0
        await load.close()

    in_virtual_time(story)


# --- knowing that it can't keep up ---


def recorded(*lateness: float, cpu: float | None = None) -> Recording:
    recording = Recording(since=0.0, tokens=20_000, seconds=2.0, cpu=cpu, lateness=Histogram())
    for seconds in lateness:
        recording.lateness.add(seconds)
    return recording


@pytest.mark.parametrize(
    ("recording", "itl", "blurred", "words"),
    [
        (recorded(), 0.02, False, None),
        (recorded(*[0.0] * 94, *[0.004] * 6), 0.02, True, None),
        (recorded(*[0.0] * 94, *[0.004] * 6), 0.05, False, None),
        (recorded(*[0.003] * 10), 0.02, True, None),
        (recorded(*[0.005] * 10), 0.02, True, "ran 5.0 ms late on average, more than 20% of the 20.00 ms"),
        (recorded(*[0.0] * 96, *[0.05] * 4), 0.02, False, None),
        (recorded(0.0, cpu=0.89), 0.02, False, None),
        (recorded(0.0, cpu=0.97), 0.02, False, "it took 97% of a core for 10000 tokens/s: one thread can't drive more"),
    ],
)
def test_overload_is_said_with_numbers(recording: Recording, itl: float, blurred: bool, words: str | None) -> None:
    said = recording.overloaded(itl)
    assert recording.blurred(itl) == blurred
    assert (said is None) == (words is None)
    assert (words or "") in (said or "")


@dataclass
class Costly:
    """A listener that takes the loop's time with every token, as a client on a slow core does."""

    inner: Listener
    clock: CostlyClock

    def tokens(self, count: int) -> None:
        self.clock.take()
        self.inner.tokens(count)

    def finished(self) -> None:
        self.inner.finished()

    def failed(self, reason: str, final: bool) -> None:
        self.inner.failed(reason, final)


class CostlyClock(VirtualClock):
    """Virtual time in which the client's work takes time, and is counted."""

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.taken = 0.0

    def take(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop._virtual.time += self.cost
        self.taken += self.cost

    def cpu(self) -> float:
        return self.taken


class CostlyChannel:
    """Hands every token over at a cost."""

    def __init__(self, inner: Channel, clock: CostlyClock) -> None:
        self.inner = inner
        self.clock = clock

    def submit(self, request: Completion, listener: Listener) -> Ticket:
        return self.inner.submit(request, Costly(listener, self.clock))

    async def close(self) -> None:
        await self.inner.close()


@pytest.mark.parametrize(
    ("streams", "step", "cost", "blurred", "words"),
    [
        (256, 0.025, 5e-6, False, None),  # 5 % of a core
        (512, 0.018, 15e-6, True, None),  # 20,000 tokens/s for 30 % of a core, all in one burst
        (256, 0.025, 180e-6, True, "ms late on average"),  # 65 %
        (1, 0.01, 0.0002, False, None),
        (1, 0.00005, 0.0009, False, "of a core for"),  # too short to be late, but never idle
    ],
)
def test_a_client_that_is_too_slow_says_so(
    streams: int, step: float, cost: float, blurred: bool, words: str | None
) -> None:
    async def story() -> str | None:
        engine = make_engine(FakeModel(host=step, per_request=0.0, kv_tokens=1_000_000))
        clock = CostlyClock(cost)
        load = ClosedLoop(CostlyChannel(engine.channel(), clock), Lengths(SHAREGPT), Prompts(100, 1), clock, 1)
        load.resize(streams)
        await asyncio.sleep(2)
        recording = load.begin()
        await asyncio.sleep(10)
        load.begin()
        await load.close()
        assert recording.cpu == pytest.approx(streams * cost / (step + streams * cost), rel=0.05)
        assert recording.blurred(recording.itl.mean or 0.0) == blurred
        return recording.overloaded(recording.itl.mean or 0.0)

    said = in_virtual_time(story)
    assert (said is None) == (words is None)
    assert (words or "") in (said or "")


def test_random_arrivals_are_refused_as_the_closed_loop_is_when_the_client_is_never_idle() -> None:
    async def story() -> str | None:
        engine = make_engine(FakeModel(host=0.00005, per_request=0.0, kv_tokens=1_000_000))
        clock = CostlyClock(0.0009)
        load = OpenLoop(CostlyChannel(engine.channel(), clock), Lengths(SHAREGPT), Prompts(100, 1), clock, 1)
        load.start(0.01, 4)
        recording = load.begin()
        await asyncio.sleep(0.05)
        load.begin()
        await load.close()
        return recording.overloaded(1.0)

    assert "of a core for" in (in_virtual_time(story) or "")


def test_virtual_time_has_no_cpu_share() -> None:
    async def story() -> float | None:
        load = make_load(make_engine().channel())
        load.resize(4)
        await asyncio.sleep(5)
        await load.close()
        return load.recording.cpu

    assert in_virtual_time(story) is None


@contextmanager
def canned(rate: float, streams: int) -> Iterator[int]:
    """A server of canned streams in a process of its own; 0: as fast as it can."""
    command = [sys.executable, str(ROOT / "benchmarks" / "canned_server.py"), f"--rate={rate}", f"--streams={streams}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def record(port: int, streams: int, output: int, enough: Callable[[list[Recording]], object]) -> list[Recording]:
    """Recordings of half a second each, until there are enough."""
    load = ClosedLoop(
        HttpChannel("127.0.0.1", port, "m"), Lengths.constant(16, output), Prompts(100, 1), SystemClock(), 1
    )
    load.resize(streams)
    recordings: list[Recording] = []
    async with asyncio.timeout(60):
        while not load.settled:  # noqa: ASYNC110 (what is waited for is the server's doing)
            await asyncio.sleep(0.01)
        while not enough(recordings):
            recordings.append(load.begin())
            await asyncio.sleep(0.5)
            load.check()
            load.begin()
    await load.close()
    return recordings


def test_a_server_that_outruns_the_client_is_noticed() -> None:
    def enough(recordings: list[Recording]) -> bool:
        return any(one.overloaded(one.itl.mean or 0.0) for one in recordings)

    with canned(0, 32) as port:
        recordings = asyncio.run(record(port, 32, 2000, enough))
    assert sum(recording.failures for recording in recordings) == 0
    assert sum(recording.tokens for recording in recordings) > 0


def test_a_pace_the_client_can_keep_is_kept() -> None:
    def enough(recordings: list[Recording]) -> bool:  # undisturbed at least once, whatever else the machine does
        return len(recordings) >= 8 and any(one.overloaded(0.25) is None for one in recordings)

    with canned(32, 8) as port:  # 250 ms between tokens
        recordings = asyncio.run(record(port, 8, 4, enough))
    assert sum(recording.failures for recording in recordings) == 0
    rate = sum(recording.tokens for recording in recordings) / sum(recording.seconds for recording in recordings)
    assert rate == pytest.approx(32, rel=0.25)
