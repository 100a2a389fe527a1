"""One leader at a time, fast hand-over after a clean stop, and a leader that can't renew steps down first."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fake_api import FakeApi, FakeClock, settle
from tightship.kube.cluster import Cluster
from tightship.kube.errors import Unreachable
from tightship.kube.kinds import Ref
from tightship.kube.lease import Lease, LeaseLost, LeaseTimes
from tightship.kube.store import Store

REF = Ref("Lease", "system", "operator")
TIMES = LeaseTimes(duration=15, renew_deadline=10, retry=2)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def candidate(api: FakeApi, clock: FakeClock, name: str) -> Lease:
    return Lease(Cluster(api, Store(), clock=clock), clock, REF, name, TIMES)


def holder(api: FakeApi) -> str:
    lease = api.find("Lease", "system", "operator")
    assert lease is not None
    found: str = lease["spec"]["holderIdentity"]
    return found


async def test_a_free_lease_is_taken_without_waiting(api: FakeApi, clock: FakeClock) -> None:
    await candidate(api, clock, "one").acquire()
    assert holder(api) == "one"
    assert clock.elapsed == 0


async def test_a_second_candidate_leads_as_soon_as_the_first_lets_go(api: FakeApi, clock: FakeClock) -> None:
    first, second = candidate(api, clock, "one"), candidate(api, clock, "two")
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await clock.advance(4)
    assert not waiting.done()
    await first.release()
    await clock.advance(TIMES.retry)
    assert waiting.done()
    assert holder(api) == "two"


async def test_a_holder_that_died_is_succeeded_after_the_duration_not_before(api: FakeApi, clock: FakeClock) -> None:
    await candidate(api, clock, "dead").acquire()
    waiting = asyncio.create_task(candidate(api, clock, "two").acquire())
    await clock.advance(TIMES.duration - 1)
    assert not waiting.done()
    await clock.advance(3)
    assert waiting.done()
    assert holder(api) == "two"


async def test_a_holder_that_renews_is_never_succeeded(api: FakeApi, clock: FakeClock) -> None:
    first = candidate(api, clock, "one")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    waiting = asyncio.create_task(candidate(api, clock, "two").acquire())
    await clock.advance(300)
    assert not waiting.done()
    assert not keeping.done()
    for task in (keeping, waiting):
        task.cancel()
    await settle()


async def test_a_leader_that_cannot_renew_steps_down_before_another_can_lead(api: FakeApi, clock: FakeClock) -> None:
    first = candidate(api, clock, "one")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    await clock.advance(5)
    api.broken = True
    began = clock.elapsed
    while not keeping.done():
        await clock.advance(1)
    assert clock.elapsed - began < TIMES.duration
    with pytest.raises(LeaseLost, match="could not be renewed"):
        keeping.result()


async def test_a_short_outage_costs_nothing(api: FakeApi, clock: FakeClock) -> None:
    first = candidate(api, clock, "one")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    await clock.advance(5)
    api.broken = True
    await clock.advance(5)
    api.broken = False
    await clock.advance(60)
    assert not keeping.done()
    keeping.cancel()
    await settle()


async def test_a_leader_that_was_replaced_learns_it_at_once(api: FakeApi, clock: FakeClock) -> None:
    first = candidate(api, clock, "one")
    await first.acquire()
    lease = api.find("Lease", "system", "operator")
    assert lease is not None
    api.put({**lease, "spec": {**lease["spec"], "holderIdentity": "two"}})
    keeping = asyncio.create_task(first.keep())
    await clock.advance(TIMES.retry)
    with pytest.raises(LeaseLost, match="held by two"):
        keeping.result()
    await first.release()  # what isn't held isn't let go
    assert holder(api) == "two"


async def test_a_lease_that_was_only_touched_is_kept(api: FakeApi, clock: FakeClock) -> None:
    first = candidate(api, clock, "one")
    await first.acquire()
    lease = api.find("Lease", "system", "operator")
    assert lease is not None
    api.put({**lease, "metadata": {**lease["metadata"], "annotations": {"touched": "yes"}}})
    keeping = asyncio.create_task(first.keep())
    await clock.advance(60)
    assert not keeping.done()
    keeping.cancel()
    await settle()


async def test_nothing_is_written_before_the_lease_is_held_and_after_it_was_let_go(
    api: FakeApi, clock: FakeClock
) -> None:
    cluster = Cluster(api, Store(), clock=clock)
    lease = Lease(cluster, clock, REF, "one", TIMES)
    cluster.guard_writes(lease.check)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "system"}}
    with pytest.raises(LeaseLost, match="is not held"):
        await cluster.create(pod)
    await lease.acquire()
    await cluster.create(pod)
    await lease.release()
    with pytest.raises(LeaseLost, match="is not held"):
        await cluster.delete(Ref.of(pod))
    assert api.find("Pod", "system", "a") is not None


async def test_a_leader_that_was_paused_past_its_lease_writes_nothing_though_it_never_learned_of_another(
    api: FakeApi, clock: FakeClock
) -> None:
    cluster = Cluster(api, Store(), clock=clock)
    lease = Lease(cluster, clock, REF, "one", TIMES)
    cluster.guard_writes(lease.check)
    await lease.acquire()
    clock.elapsed += TIMES.renew_deadline - 1  # nothing of this process ran meanwhile
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "system"}}
    await cluster.create(pod)
    clock.elapsed += 1
    with pytest.raises(LeaseLost, match=r"last renewed 10\.0 s ago, more than the 10 s"):
        await cluster.delete(Ref.of(pod))
    assert await cluster.get(Ref.of(pod))  # reading harms nobody
    keeping = asyncio.create_task(lease.keep())
    await clock.advance(TIMES.retry)
    with pytest.raises(LeaseLost, match="could not be renewed"):
        keeping.result()


async def test_a_write_that_waits_past_the_lease_is_not_sent(api: FakeApi) -> None:
    """The check is over by then, and the process stands still, while a connection is being made."""
    sent, answer = [], api.request

    async def connecting(*request: Any) -> Any:
        opened = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.05, opened.set_result, None)
        time.sleep(0.2)  # noqa: ASYNC251 - paused; when it goes on, connection and deadline are both due
        await opened
        sent.append(request)
        return await answer(*request)

    cluster = Cluster(api, Store())
    cluster.guard_writes(lambda: 0.1)
    api.request = connecting  # type: ignore[method-assign]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "system"}}
    with pytest.raises(Unreachable, match=r"no answer within the 0\.1 s that the lease allowed"):
        await cluster.create(pod)
    assert not sent
    cluster.guard_writes(lambda: 5.0)
    await cluster.create(pod)
    assert len(sent) == 1


async def test_the_time_counts_from_before_a_renewal_is_sent(api: FakeApi, clock: FakeClock) -> None:
    """Others count from when they saw it, which may be long before the answer comes back."""
    lease = candidate(api, clock, "one")
    await lease.acquire()
    answer = api.request

    async def slow(*request: Any) -> Any:
        found = await answer(*request)
        await clock.sleep(6)
        return found

    api.request = slow  # type: ignore[method-assign]
    keeping = asyncio.create_task(lease.keep())
    await clock.advance(TIMES.retry + 6)
    lease.check()
    clock.elapsed = TIMES.retry + TIMES.renew_deadline
    with pytest.raises(LeaseLost, match=r"last renewed 10\.0 s ago"):
        lease.check()
    keeping.cancel()
    await settle()


async def test_trouble_is_told_and_standing_by_is_none(api: FakeApi, clock: FakeClock) -> None:
    told: list[str | None] = []
    api.refuse["POST", "Lease"] = {"code": 404, "reason": "NotFound", "message": "namespaces system not found"}
    cluster = Cluster(api, Store(), clock=clock)
    lease = Lease(cluster, clock, REF, "one", TIMES, on_trouble=told.append)
    waiting = asyncio.create_task(lease.acquire())
    await clock.advance(1)
    assert told
    assert "does namespace system exist" in (told[0] or "")
    api.refuse.clear()
    await candidate(api, clock, "other").acquire()
    await clock.advance(2)
    assert told[-1] is None
    waiting.cancel()
    await settle()


@pytest.mark.parametrize("times", [(15, 10, 10), (10, 10, 2), (15, 20, 2), (15, 10, 0)])
def test_times_that_contradict_each_other_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must grow"):
        LeaseTimes(*times)
