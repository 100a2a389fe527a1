"""Which turns of conditions are worth an event, and that events follow the status, never precede it."""

from __future__ import annotations

from typing import Any

import pytest

from fake_api import FakeApi, FakeClock
from tightship.api.v1alpha1 import labels
from tightship.kube.cluster import Cluster
from tightship.kube.events import Events, turns
from tightship.kube.store import Store


def condition(text: str) -> dict[str, str]:
    """ "Packed=False/InsufficientGPUs: words" as a condition."""
    head, _, message = text.partition(": ")
    kind, _, rest = head.partition("=")
    status, _, reason = rest.partition("/")
    return {"type": kind, "status": status, "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([], ["Profiled=True/Completed: done"], [("Completed", "done", False)]),
        (["Profiled=True/Completed"], ["Profiled=True/Completed: other words"], []),
        (["Packed=True/Placed"], ["Packed=False/InsufficientGPUs: no"], [("InsufficientGPUs", "no", True)]),
        ([], ["Profiled=False/Measuring: wait"], [("Measuring", "wait", False)]),
        ([], ["Available=False/TooFewReplicas: 0"], [("TooFewReplicas", "0", False)]),
        (["Available=True/Enough"], ["Available=False/TooFewReplicas: 0"], [("TooFewReplicas", "0", True)]),
        ([], ["Ready=Unknown/Measuring"], []),
        (["Ready=Unknown/Measuring"], ["Ready=False/InsufficientGPUs"], []),
        (["Ready=Unknown/Measuring"], ["Ready=True/FullyRealised: all"], [("FullyRealised", "all", False)]),
        (["Ready=True/FullyRealised"], ["Ready=False/TooFewReplicas: 1"], [("TooFewReplicas", "1", True)]),
        ([], ["Reconciling=True/Progressing"], []),
        ([], ["Failed=False/Measuring"], []),
        (["Failed=False/Measuring"], ["Failed=True/EngineFailed: oom"], [("EngineFailed", "oom", True)]),
        ([], ["Progressing=True/Unschedulable: no node"], [("Unschedulable", "no node", True)]),
        ([], ["Progressing=True/Measuring: a", "Complete=False/Measuring: a"], [("Measuring", "a", False)]),
        ([], ["Complete=False/JobFailed: x", "Failed=True/JobFailed: x"], [("JobFailed", "x", True)]),
    ],
)
def test_turns(old: list[str], new: list[str], expected: list[tuple[str, str, bool]]) -> None:
    told = turns([condition(each) for each in old], [condition(each) for each in new])
    assert [(turn.reason, turn.message, turn.warning) for turn in told] == expected


def make_profile(api: FakeApi, store: Store) -> dict[str, Any]:
    made = api.put(
        {"apiVersion": labels.API_VERSION, "kind": "BatchProfile", "metadata": {"name": "p", "namespace": "a"}}
    )
    store.observe(made)
    return made


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def events(api: FakeApi, store: Store, clock: FakeClock) -> Events:
    return Events(Cluster(api, store, clock=clock), clock, instance="test")


def posted(api: FakeApi) -> list[dict[str, Any]]:
    return [obj for path, obj in api.objects.items() if "/events/" in path]


async def test_a_report_writes_status_then_events_and_the_second_time_neither(
    api: FakeApi, store: Store, events: Events
) -> None:
    profile = make_profile(api, store)
    status = {"conditions": [condition("Complete=True/Completed: 5 points")]}
    assert await events.report(profile, status)
    assert [(event["reason"], event["type"]) for event in posted(api)] == [("Completed", "Normal")]
    before = api.requests.total()
    current = store.get("BatchProfile", "a", "p")
    assert current is not None
    assert not await events.report(current, status)
    assert api.requests.total() == before


async def test_no_event_when_the_status_could_not_be_written(api: FakeApi, store: Store, events: Events) -> None:
    profile = make_profile(api, store)
    api.objects.clear()
    assert not await events.report(profile, {"conditions": [condition("Complete=True/Completed")]})
    assert posted(api) == []


async def test_an_event_that_cannot_be_written_is_no_error(api: FakeApi, store: Store, events: Events) -> None:
    profile = make_profile(api, store)
    api.refuse["POST", "Event"] = {"code": 403, "message": "no"}
    assert await events.report(profile, {"conditions": [condition("Complete=True/Completed")]})


async def test_the_same_words_soon_again_are_counted(
    api: FakeApi, store: Store, events: Events, clock: FakeClock
) -> None:
    profile = make_profile(api, store)
    await events.emit(profile, "Flaps", "words")
    await clock.advance(30)
    await events.emit(profile, "Flaps", "words")
    assert [event["count"] for event in posted(api)] == [2]
    await clock.advance(3600)
    await events.emit(profile, "Flaps", "words")
    assert sorted(event["count"] for event in posted(api)) == [1, 2]


async def test_long_messages_are_cut_and_cluster_scoped_objects_have_events_in_default(
    api: FakeApi, events: Events
) -> None:
    pack = api.put({"apiVersion": labels.API_VERSION, "kind": "GPUPack", "metadata": {"name": "g"}})
    await events.emit(pack, "Long", "x" * 5000)
    [event] = posted(api)
    assert len(event["message"]) == 1024
    assert event["metadata"]["namespace"] == "default"
