"""Lengths of requests from a ConfigMap: what is read, what is said when it can't be, and what a change leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pack_world import World, complete, make_lengths, measured
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.validation import lengths_digest
from tightship.reconcile.queue import Key
from tightship.reconcile.routing import keys_for

NS = "default"


def with_lengths(
    name: str = "opt", config_map: str = "chat", key: str = "lengths.csv", **changes: Any
) -> dict[str, Any]:
    workload = {"lengthsFrom": {"configMap": {"name": config_map, "key": key}}}
    return make_service(name, workload=workload, **changes)


def accepted(world: World, name: str = "opt") -> tuple[str, str, str]:
    return world.condition("LLMService", NS, name, "Accepted")


def profiles(world: World) -> list[dict[str, Any]]:
    return world.all("BatchProfile")


async def test_the_text_makes_the_key_and_the_profile_knows_where_it_lies() -> None:
    world = World()
    world.put(make_lengths("10,20\n"))
    world.put(with_lengths())
    await world.settle()
    assert accepted(world)[:2] == ("True", "Valid")
    spec = profiles(world)[0]["spec"]
    assert spec["key"]["workload"] == {"lengthsDigest": lengths_digest("10,20\n")}
    assert spec["measurement"]["lengthsFrom"] == {"configMap": {"name": "chat", "key": "lengths.csv"}}


@pytest.mark.parametrize(
    ("there", "words"),
    [
        pytest.param(
            None, ["ConfigMap chat", "lengths.csv", f"kubectl label configmap chat {labels.LENGTHS}="], id="missing"
        ),
        pytest.param(
            make_lengths(labelled=False),
            ["ConfigMap chat", f"lacks the label {labels.LENGTHS}", f"kubectl label configmap chat {labels.LENGTHS}="],
            id="not labelled",
        ),
        pytest.param(
            make_lengths() | {"data": {"a.csv": "1,2", "b.csv": "1,2"}},
            ["no entry lengths.csv", "a.csv, b.csv"],
            id="no entry",
        ),
        pytest.param(
            make_lengths() | {"data": {}, "binaryData": {"lengths.csv": "MSwy"}}, ["not as binaryData"], id="binary"
        ),
        pytest.param(make_lengths(" \n"), ["lengths.csv of ConfigMap chat is empty"], id="empty"),
    ],
)
async def test_what_cannot_be_read_is_said_and_nothing_is_measured_until_it_can(there: Any, words: list[str]) -> None:
    world = World()
    if there is not None:
        world.put(there)
    world.put(with_lengths())
    await world.settle()
    status, reason, message = accepted(world)
    assert (status, reason) == ("False", "InvalidSpec")
    assert all(each in message for each in words), message
    assert profiles(world) == []
    if there is None:
        world.put(make_lengths())
    else:
        world.change(
            "ConfigMap", NS, "chat", lambda obj: obj.update(make_lengths(), metadata=obj["metadata"] | labelled())
        )
    await world.settle()
    assert accepted(world)[:2] == ("True", "Valid")
    assert len(profiles(world)) == 1


def labelled() -> dict[str, Any]:
    return {"labels": {labels.LENGTHS: ""}}


async def packed() -> World:
    world = World()
    world.put(make_lengths("10,20\n"))
    world.put(with_lengths())
    await world.settle()
    world.change("BatchProfile", NS, profiles(world)[0]["metadata"]["name"], complete)
    await world.run()
    assert world.condition("LLMService", NS, "opt", "Ready")[0] == "True"
    return world


async def test_changed_lengths_are_measured_while_the_old_replicas_serve() -> None:
    world = await packed()
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    world.change("ConfigMap", NS, "chat", lambda obj: obj["data"].update({"lengths.csv": "10,20\n30,40\n"}))
    await world.run()
    assert len(profiles(world)) == 2
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("False", "Measuring")
    assert world.condition("LLMService", NS, "opt", "Available")[0] == "True"
    assert {pod["metadata"]["uid"] for pod in world.all("Pod")} == before


async def test_another_entry_of_the_same_text_changes_nothing() -> None:
    world = await packed()
    world.change("ConfigMap", NS, "chat", lambda obj: obj["data"].update(other="1,2"))
    await world.run()
    assert len(profiles(world)) == 1
    assert world.condition("LLMService", NS, "opt", "Ready")[0] == "True"


@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(lambda world: world.remove("ConfigMap", NS, "chat"), id="deleted"),
        pytest.param(
            lambda world: world.change("ConfigMap", NS, "chat", lambda obj: obj["metadata"].update(labels={})),
            id="label taken",
        ),
    ],
)
async def test_lengths_that_vanish_leave_the_replicas_alone_and_may_come_back(lose: Callable[[World], None]) -> None:
    world = await packed()
    before = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    lose(world)
    await world.run()
    assert accepted(world)[:2] == ("False", "InvalidSpec")
    assert world.condition("LLMService", NS, "opt", "Available")[0] == "True"
    assert world.get("LLMService", NS, "opt")["status"]["recommendation"]["batch"] == 96
    if world.api.find("ConfigMap", NS, "chat"):
        world.change("ConfigMap", NS, "chat", lambda obj: obj["metadata"].update(labelled()))
    else:
        world.put(make_lengths("10,20\n"))
    await world.run()
    assert world.condition("LLMService", NS, "opt", "Ready")[0] == "True"
    assert len(profiles(world)) == 1
    assert {pod["metadata"]["uid"] for pod in world.all("Pod")} == before


async def test_a_job_starts_only_with_the_lengths_of_its_key() -> None:
    world = World(profiling=True)
    world.put(make_lengths("10,20\n"))
    world.put(with_lengths())
    await world.settle()
    old = profiles(world)[0]["metadata"]["name"]
    assert [job["metadata"]["name"] for job in world.all("Job")] == [f"{old}-1"]
    by_hand = {**profiles(world)[0], "metadata": {"name": "by-hand", "namespace": NS}}
    world.change("ConfigMap", NS, "chat", lambda obj: obj["data"].update({"lengths.csv": "1,2\n"}))
    by_hand.pop("status")
    world.put(by_hand)
    await world.settle()
    assert f"{old}-1" not in [job["metadata"]["name"] for job in world.all("Job")]  # wanted no more
    status, reason, message = world.condition("BatchProfile", NS, "by-hand", "Progressing")
    assert (status, reason) == ("True", "Waiting")
    assert lengths_digest("10,20\n")[:10] in message
    assert lengths_digest("1,2\n")[:10] in message


async def test_a_measurement_goes_on_with_the_same_lengths_under_another_name() -> None:
    world = World(profiling=True)
    world.put(make_lengths("10,20\n"))
    world.put(with_lengths())
    await world.settle()
    world.put(make_lengths("10,20\n", "renamed"))
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(with_lengths(config_map="renamed")["spec"]))
    world.remove("ConfigMap", NS, "chat")
    await world.settle()
    assert len(profiles(world)) == 1
    assert profiles(world)[0]["spec"]["measurement"]["lengthsFrom"]["configMap"]["name"] == "renamed"


async def test_two_services_with_the_same_lengths_share_one_job() -> None:
    world = World(profiling=True)
    world.put(make_lengths("10,20\n"))
    world.put(make_lengths("10,20\n", "copy"))
    world.put(with_lengths("one"))
    world.put(with_lengths("two", config_map="copy", slo__objectives=[], packing__minimumGain="1.2"))
    await world.settle()
    assert len(profiles(world)) == len(world.all("Job")) == 1
    world.report(profiles(world)[0]["metadata"]["name"], measured(profiles(world)[0]))
    await world.run()
    for name in ("one", "two"):
        assert world.condition("LLMService", NS, name, "Recommended")[0] == "True"
    assert len(world.all("Job")) == 1


def test_a_config_map_leads_to_the_services_that_name_it_and_to_waiting_measurements() -> None:
    world = World(gpus=())
    for service in (with_lengths("one"), with_lengths("two", config_map="other"), make_service("three")):
        world.put(service)
    found = keys_for(world.store, "ConfigMap", None, world.put(make_lengths()))
    assert found == {Key("LLMService", NS, "one")}
