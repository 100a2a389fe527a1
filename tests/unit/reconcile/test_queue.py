"""The work queue: each key once, never twice at a time, later when asked, slower when it fails."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_api import FakeClock, settle
from tightship.kube.errors import Conflict, NamespaceTerminating, Unreachable
from tightship.reconcile.queue import Closed, Key, Queue, Result, Workers

A, B = Key("LLMService", "ns", "a"), Key("GPUPack", "", "b")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queue(clock: FakeClock) -> Queue:
    return Queue(clock, base_delay=1.0, max_delay=60.0, jitter=0.0)


async def take_all(queue: Queue) -> list[Key]:
    """What is due now, each handed out and given back."""
    taken = []
    while len(queue):
        key = await queue.get()
        taken.append(key)
        queue.done(key)
    return taken


async def test_a_key_added_often_comes_once(queue: Queue) -> None:
    for key in (A, B, A, A, B):
        queue.add(key)
    assert await take_all(queue) == [A, B]


async def test_a_key_added_while_it_is_worked_on_comes_again_afterwards(queue: Queue) -> None:
    queue.add(A)
    key = await queue.get()
    queue.add(A)
    queue.add(A)
    assert len(queue) == 0
    queue.done(key)
    assert await take_all(queue) == [A]


async def test_a_key_that_rests_comes_once_when_its_rest_is_over(queue: Queue, clock: FakeClock) -> None:
    queue.add(A)
    key = await queue.get()
    queue.add(A)
    assert queue.done(key, rest=5) == 5
    queue.add(A)
    queue.add_after(A, 1)
    await clock.advance(4)
    assert await take_all(queue) == []
    taking = asyncio.create_task(queue.get())
    await clock.advance(2)
    assert taking.done()
    queue.done(taking.result())
    queue.add(A)
    assert await take_all(queue) == [A]


async def test_a_rest_calls_for_nothing_by_itself(queue: Queue, clock: FakeClock) -> None:
    queue.add(A)
    queue.done(await queue.get(), rest=5)
    await clock.advance(10)
    assert len(queue) == 0


async def test_a_wish_for_a_time_within_the_rest_is_granted_after_it(queue: Queue, clock: FakeClock) -> None:
    queue.add(A)
    queue.done(await queue.get(), requeue_after=2, rest=5)
    taking = asyncio.create_task(queue.get())
    await clock.advance(4)
    assert not taking.done()
    await clock.advance(1.5)
    assert taking.result() == A


async def test_the_earliest_wish_wins_and_now_beats_later(queue: Queue, clock: FakeClock) -> None:
    queue.add_after(A, 30)
    queue.add_after(A, 10)
    queue.add_after(A, 20)
    getting = asyncio.create_task(queue.get())
    await clock.advance(9)
    assert not getting.done()
    await clock.advance(1)
    assert getting.result() == A
    queue.done(A)
    queue.add_after(A, 30)
    queue.add(A)
    assert await take_all(queue) == [A]
    getting = asyncio.create_task(queue.get())
    await clock.advance(100)
    assert not getting.done()  # the later wish was fulfilled by the earlier look
    getting.cancel()
    await settle()


async def test_failures_wait_longer_each_time_up_to_a_bound_and_start_small_again(
    queue: Queue, clock: FakeClock
) -> None:
    waits = []
    for _ in range(9):
        queue.add(A)
        await queue.get()
        waits.append(queue.done(A, failed=True))
        await clock.advance(100)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    queue.add(A)
    await queue.get()
    assert queue.done(A) is None
    queue.add(A)
    await queue.get()
    assert queue.done(A, failed=True) == 1


async def test_news_during_a_failed_look_does_not_skip_the_wait(queue: Queue) -> None:
    queue.add(A)
    await queue.get()
    queue.add(A)
    assert queue.done(A, failed=True) == 1
    assert len(queue) == 0


async def test_jitter_only_shortens() -> None:
    queue = Queue(FakeClock(), base_delay=10, jitter=0.2, rng=random.Random(1))
    waits = []
    for key in (A, B):
        queue.add(key)
        await queue.get()
        waits.append(queue.done(key, failed=True) or 0.0)
    assert all(8 <= wait <= 10 for wait in waits)
    assert waits[0] != waits[1]


async def test_closing_wakes_who_waits_and_hands_out_nothing_more(queue: Queue) -> None:
    getting = asyncio.create_task(queue.get())
    await settle()
    queue.add(A)
    queue.close()
    await settle()
    assert getting.done()
    with pytest.raises(Closed):
        await queue.get()


@given(st.lists(st.tuples(st.sampled_from("adgfr"), st.integers(0, 2)), max_size=60))
def test_no_key_is_lost_and_none_is_handed_out_twice_at_a_time(steps: list[tuple[str, int]]) -> None:
    """Any order of add, delay, get, finish, fail: a key that was added is due, worked on, or waits its turn."""

    async def run() -> None:
        clock = FakeClock()
        queue = Queue(clock, base_delay=1, jitter=0)
        owed: Counter[Key] = Counter()
        active: set[Key] = set()
        for action, number in steps:
            key = Key("LLMService", "", str(number))
            if action == "a":
                queue.add(key)
                owed[key] = 1
            elif action == "d":
                queue.add_after(key, 5)
                owed[key] = 1
            elif action == "g" and len(queue):
                taken = await queue.get()
                assert taken not in active
                active.add(taken)
                owed[taken] = 0
            elif action in "fr" and key in active:
                active.discard(key)
                queue.done(key, failed=action == "f")
                owed[key] |= action == "f"
        for key in sorted(active):
            queue.done(key)
        seen = set()
        queue.add(Key("Placement", "", "last"))
        for _ in range(len(owed) + 1):
            await clock.advance(1000)
            while len(queue):
                key = await queue.get()
                seen.add(key)
                queue.done(key)
            queue.add(Key("Placement", "", "last"))
            taken = await queue.get()  # promotes what is due
            seen.add(taken)
            queue.done(taken)
        assert {key for key, count in owed.items() if count} <= seen

    asyncio.run(run())


class StubContext:
    """What workers need of a context."""

    def __init__(self, queue: Queue, clock: FakeClock) -> None:
        self.queue, self.clock = queue, clock
        self.outcomes: list[tuple[str, str]] = []
        self.metrics = self
        self.reported = asyncio.Event()

    def reconciled(self, kind: str, outcome: str, seconds: float) -> None:
        self.outcomes.append((kind, outcome))
        self.reported.set()


def error(kind: type[Any]) -> Exception:
    made: Exception = kind("apply", 409, "x", "x", {}) if kind is not Unreachable else Unreachable("x")
    return made


async def test_workers_run_keys_side_by_side_but_one_key_alone(queue: Queue, clock: FakeClock) -> None:
    running: Counter[Key] = Counter()
    most: Counter[Key] = Counter()
    together = 0

    async def slow(ctx: Any, key: Key) -> Result:
        nonlocal together
        running[key] += 1
        most[key] = max(most[key], running[key])
        together = max(together, running.total())
        await clock.sleep(1)
        running[key] -= 1
        return Result()

    context: Any = StubContext(queue, clock)
    workers = asyncio.create_task(Workers(context, {"LLMService": slow, "GPUPack": slow}, count=4).run())
    for _ in range(3):
        queue.add(A)
        queue.add(B)
        await clock.advance(0.5)
    await clock.advance(10)
    assert most == {A: 1, B: 1}
    assert together == 2
    queue.close()
    await settle()
    await workers


@pytest.mark.parametrize(
    ("raised", "outcome", "looks_within_a_minute"),
    [
        (None, "ok", 1),
        (ValueError("bug"), "error", 6),
        (error(Unreachable), "error", 6),
        (error(Conflict), "error", 6),
        (error(NamespaceTerminating), "ok", 1),
    ],
)
async def test_what_becomes_of_an_error(
    queue: Queue, clock: FakeClock, raised: Exception | None, outcome: str, looks_within_a_minute: int
) -> None:
    looks = 0

    async def reconciler(ctx: Any, key: Key) -> Result:
        nonlocal looks
        looks += 1
        if raised is not None:
            raise raised
        return Result()

    context: Any = StubContext(queue, clock)
    workers = asyncio.create_task(Workers(context, {"LLMService": reconciler}, count=2).run())
    queue.add(A)
    await clock.advance(60)
    assert looks == looks_within_a_minute
    assert set(context.outcomes) == {("LLMService", outcome)}
    queue.close()
    await settle()
    await workers


async def test_a_result_asks_for_another_look(queue: Queue, clock: FakeClock) -> None:
    looks: list[float] = []

    async def reconciler(ctx: Any, key: Key) -> Result:
        looks.append(clock.elapsed)
        return Result(requeue_after=15)

    context: Any = StubContext(queue, clock)
    workers = asyncio.create_task(Workers(context, {"LLMService": reconciler}).run())
    queue.add(A)
    await clock.advance(50)
    assert looks == [0, 15, 30, 45]
    queue.close()
    await settle()
    await workers


async def test_a_hung_reconcile_is_given_up_and_tried_again(queue: Queue, clock: FakeClock) -> None:
    looks = 0

    async def hangs(ctx: Any, key: Key) -> Result:
        nonlocal looks
        looks += 1
        await asyncio.Event().wait()
        raise AssertionError

    context: Any = StubContext(queue, clock)
    workers = asyncio.create_task(Workers(context, {"LLMService": hangs}, timeout=0.01).run())
    queue.add(A)
    await context.reported.wait()
    assert context.outcomes == [("LLMService", "error")]
    await clock.advance(1)
    assert looks == 2
    workers.cancel()
    await settle()


async def test_closing_lets_what_is_begun_be_finished(queue: Queue, clock: FakeClock) -> None:
    finished = []

    async def slow(ctx: Any, key: Key) -> Result:
        await clock.sleep(5)
        finished.append(key)
        return Result()

    context: Any = StubContext(queue, clock)
    workers = asyncio.create_task(Workers(context, {"LLMService": slow, "GPUPack": slow}, count=1).run())
    queue.add(A)
    queue.add(B)
    await clock.advance(1)
    queue.close()
    await clock.advance(30)
    await workers
    assert finished == [A]
