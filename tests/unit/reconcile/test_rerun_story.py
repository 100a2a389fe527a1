"""`profiling.rerun`: who asks, whose settings are measured with, what stands meanwhile, and what never starts a Job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pack_world import World, end_jobs, jobs, measured, name_of, profile
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.reconcile.rerun import replacing, settings

NS = "default"
Change = Callable[[dict[str, Any]], None]


def pod_of(world: World) -> dict[str, Any]:
    """The spec of the last Job's pod."""
    return dict(world.all("Job")[-1]["spec"]["template"]["spec"])


def measurement(world: World) -> dict[str, Any]:
    return dict(profile(world)["spec"]["measurement"])


def edit(world: World, change: Change, name: str = "opt") -> None:
    world.change("LLMService", NS, name, lambda obj: change(obj["spec"]))


def ask(world: World, text: str | None, name: str = "opt") -> None:
    edit(world, lambda spec: spec.setdefault("profiling", {}).update(rerun=text), name)


def told(world: World, which: str, name: str = "opt") -> tuple[str, str, str]:
    return world.condition("LLMService", NS, name, which)


def of_profile(world: World, which: str) -> tuple[str, str]:
    return world.condition("BatchProfile", NS, name_of(world), which)[:2]


def put_pod(world: World, status: dict[str, Any]) -> None:
    """The last Job's pod."""
    job = world.all("Job")[-1]
    uid, name = job["metadata"]["uid"], job["metadata"]["name"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}
    metadata = {"name": f"{name}-x", "namespace": NS, "labels": job["metadata"]["labels"], "ownerReferences": [owner]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}, "status": status}
    world.put(pod)


UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
        }
    ],
}
NO_IMAGE = {
    "phase": "Pending",
    "containerStatuses": [
        {"name": "engine", "image": "vllm", "restartCount": 0, "state": {"waiting": {"reason": "ImagePullBackOff"}}}
    ],
}
RUNNING = {
    "phase": "Running",
    "containerStatuses": [{"name": "engine", "image": "vllm", "restartCount": 0, "state": {"running": {}}}],
}
ENDED = {
    "phase": "Failed",
    "containerStatuses": [
        {"name": "engine", "image": "vllm", "restartCount": 0, "state": {"terminated": {"exitCode": 1}}}
    ],
}


async def make_measuring(*services: dict[str, Any]) -> World:
    """A world in which the services' one profile has its first Job."""
    world = World(gpus=(4, 4), profiling=True)
    for each in services or (make_service(),):
        world.put(each)
        await world.settle()
    return world


async def make_world(*services: dict[str, Any]) -> World:
    """A world in which the services' one profile is measured and all is at rest."""
    world = await make_measuring(*services)
    await finish(world)
    return world


async def finish(world: World, **found: Any) -> None:
    """The profiler ends well."""
    world.report(name_of(world), measured(profile(world), **found))
    end_jobs(world)
    await world.run(rounds=40)


# --- what stands meanwhile ---


async def test_a_complete_profile_serves_on_while_its_key_is_measured_again() -> None:
    world = await make_world()
    ask(world, "new driver")
    await world.run()
    assert jobs(world) == ["2"]
    put_pod(world, UNSCHEDULABLE)
    edit(world, lambda spec: spec.update(replicas=6))
    await world.run(rounds=40)
    assert of_profile(world, "Complete") == ("True", "Completed")
    assert of_profile(world, "Progressing") == ("True", "Unschedulable")
    status, _, message = told(world, "Profiled")
    assert status == "True"
    assert "meanwhile Job" in message
    assert "Insufficient nvidia.com/gpu" in message
    assert told(world, "Ready")[0] == "True"
    assert len([pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == "replica"]) == 6

    # What is found so far is beside it, and nothing is decided from that.
    half = measured(profile(world)) | {"rerun": {"request": "new driver", "points": [{"batch": 1}]}}
    half["outcome"] = {"state": "Completed"}
    world.report(name_of(world), half)
    await world.run()
    assert of_profile(world, "Complete") == ("True", "Completed")
    assert told(world, "Recommended")[:2] == ("True", "Measured")

    await finish(world, trials=())
    assert of_profile(world, "Progressing")[0] == "False"
    assert told(world, "Recommended")[:2] == ("True", "Estimated")
    assert jobs(world) == ["2"]


async def test_a_new_measurement_that_broke_is_remembered_and_a_new_text_tries_again() -> None:
    world = await make_world()
    ask(world, "2")
    await world.run()
    assert profile(world)["status"]["phase"] == "Remeasuring"
    put_pod(world, ENDED)
    end_jobs(world)
    await world.run()
    for _ in range(2):
        outcome = profile(world)["status"]["outcome"]
        assert (outcome["state"], outcome["reason"], outcome["rerun"]) == ("Completed", "JobFailed", "2")
        assert of_profile(world, "Complete") == ("True", "Completed")
        assert of_profile(world, "Progressing")[0] == "False"
        assert "the measurement that rerun 2 asked for failed" in told(world, "Profiled")[2]
        assert told(world, "Ready")[0] == "True"
        assert jobs(world) == ["2"]
        await world.look_at_everything()
    ask(world, "3")
    await world.run()
    assert jobs(world) == ["3"]
    assert of_profile(world, "Complete") == ("True", "Completed")


async def test_a_profile_that_failed_is_complete_only_when_it_was_measured_again() -> None:
    world = await make_measuring()
    failed = {"state": "Failed", "reason": "EngineFailed", "message": "no such model"}
    world.report(name_of(world), {"outcome": failed, "points": [{"batch": 1}]})
    end_jobs(world)
    await world.run()
    assert told(world, "Profiled")[:2] == ("False", "EngineFailed")
    ask(world, "2")
    await world.run()
    assert jobs(world) == ["2"]
    assert of_profile(world, "Complete") == ("False", "Measuring")
    assert of_profile(world, "Failed")[0] == "False"
    await finish(world)
    assert told(world, "Ready")[0] == "True"


# --- whose settings ---


async def test_a_raised_budget_reaches_the_new_measurement() -> None:
    world = await make_measuring(make_service(profiling={"budget": "60s"}))
    failed = {"state": "Failed", "reason": "NoPointInBudget", "message": "raise profiling.budget"}
    world.report(name_of(world), {"outcome": failed})
    end_jobs(world)
    await world.run()
    edit(world, lambda spec: spec["profiling"].update(budget="20m"))
    await world.run()
    assert measurement(world)["budget"] == "60s"
    assert jobs(world) == ["1"]
    ask(world, "2")
    await world.run()
    assert (measurement(world)["budget"], measurement(world)["rerun"]) == ("20m", "2")
    assert jobs(world) == ["2"]
    assert pod_of(world)["activeDeadlineSeconds"] > 1200 + 7200


SECRETS = {"spec": {"imagePullSecrets": [{"name": "pull"}], "runtimeClassName": "nvidia"}}
MENDS: dict[str, Change] = {
    "template": lambda spec: spec.update(template=SECRETS),
    "objectives": lambda spec: spec["slo"].update(objectives=[]),
    "floor": lambda spec: spec.update(advisor={"efficiencyFloor": "0.2"}),
    "gain": lambda spec: spec["packing"].update(minimumGain="1.5"),
    "reserve": lambda spec: spec["packing"].update(memoryReserve="4Gi"),
    "most replicas": lambda spec: spec["packing"].update(maxReplicasPerGPU=4),
    "cache": lambda spec: spec["model"].update(cache={"pvc": "models"}),
}


@pytest.mark.parametrize("mend", MENDS)
async def test_a_new_text_brings_the_services_settings_with_it(mend: str) -> None:
    world = await make_world()
    before = measurement(world)
    edit(world, MENDS[mend])
    await world.run(rounds=20)
    assert measurement(world) == before
    ask(world, "2")
    await world.run(rounds=20)
    service = LLMService.model_validate(world.get("LLMService", NS, "opt"))
    assert settings(service, profile(world)) == {}
    assert measurement(world) != before | {"rerun": "2"}


async def test_what_is_left_out_of_a_template_goes() -> None:
    template = {"spec": {"nodeSelector": {"zone": "a", "rack": "1"}, "runtimeClassName": "nvidia"}}
    world = await make_world(make_service(template=template))
    edit(world, lambda spec: spec.update(template={"spec": {"nodeSelector": {"zone": "b"}}}))
    ask(world, "2")
    await world.run()
    assert {name: value for name, value in pod_of(world)["nodeSelector"].items() if "/" not in name} == {"zone": "b"}
    assert "runtimeClassName" not in pod_of(world)


async def test_an_extension_is_made_with_the_services_settings() -> None:
    world = await make_measuring()
    await finish(world, trials=())
    edit(world, MENDS["template"])
    edit(world, lambda spec: spec["profiling"].update(extend="please", budget="1h"))
    await world.settle()
    assert jobs(world) == ["1", "2"]
    assert measurement(world)["extend"]["budget"] == measurement(world)["budget"] == "1h"
    assert pod_of(world)["imagePullSecrets"] == [{"name": "pull"}]


@pytest.mark.parametrize("status", [None, UNSCHEDULABLE, NO_IMAGE])
@pytest.mark.parametrize("again", [False, True], ids=["first measurement", "measured again"])
async def test_a_job_whose_engine_never_ran_follows_the_manifest(status: dict[str, Any] | None, again: bool) -> None:
    world = await (make_world if again else make_measuring)()
    if again:
        ask(world, "2")
        await world.run()
    attempt = int(jobs(world)[-1])
    if status is not None:
        put_pod(world, status)
    await world.run()
    edit(world, MENDS["template"])
    await world.run()
    assert jobs(world) == [str(attempt + 1)]
    assert pod_of(world)["imagePullSecrets"] == [{"name": "pull"}]
    before = world.api.writes()
    await world.look_at_everything()
    assert world.api.writes() == before


async def test_what_the_pod_is_not_made_from_replaces_no_job() -> None:
    world = await make_measuring()
    edit(world, MENDS["gain"])
    await world.run()
    assert measurement(world)["minimumGain"] == "1.5"
    assert jobs(world) == ["1"]


@pytest.mark.parametrize("status", [RUNNING, ENDED])
async def test_a_measurement_that_has_begun_is_left_alone(status: dict[str, Any]) -> None:
    world = await make_measuring()
    put_pod(world, status)
    before = measurement(world)
    edit(world, MENDS["template"])
    await world.run()
    assert jobs(world) == ["1"]
    assert measurement(world) == before


async def test_only_the_service_that_asked_is_followed() -> None:
    world = await make_measuring(make_service("one"), make_service("a", replicas=1))
    edit(world, MENDS["template"], "a")
    await world.run()
    assert jobs(world) == ["1"]
    world.remove("LLMService", NS, "one")
    edit(world, lambda spec: spec.update(replicas=2), "a")
    await world.run()
    assert jobs(world) == ["2"]
    assert pod_of(world)["imagePullSecrets"] == [{"name": "pull"}]


async def test_what_was_written_by_hand_is_not_made_to_follow() -> None:
    world = await make_measuring()
    path = (NS, name_of(world))
    world.change("BatchProfile", *path, lambda obj: obj["metadata"]["labels"].pop(labels.MANAGED_BY))
    before = measurement(world)
    edit(world, MENDS["template"])
    await world.run()
    assert measurement(world) == before


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1, "b": 2}, {"a": 1}, {"b": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": {"b": 1}}, {"a": {"b": 1}, "d": {"e": []}}, {"d": {"e": []}}),
        ({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]}, {"a": [{"b": 1}]}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({}, {"a": {}}, {"a": {}}),
    ],
)
def test_a_merge_patch_that_takes_away_too(old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]) -> None:
    assert replacing(old, new) == patch


# --- who asks ---


async def test_each_text_of_each_service_asks_once() -> None:
    world = await make_world(make_service("a", replicas=1), make_service("b", replicas=1))
    ask(world, "2", "a")
    await world.run()
    assert (jobs(world), measurement(world)["rerun"]) == (["2"], "2")
    await finish(world)
    ask(world, "1", "b")
    await world.run()
    assert (jobs(world), measurement(world)["rerun"]) == (["3"], "1")
    await finish(world)
    await world.look_at_everything()
    assert (jobs(world), measurement(world)["rerun"]) == (["3"], "1")


@pytest.mark.parametrize("gone", ["a", "b"])
async def test_a_service_that_goes_has_nothing_measured(gone: str) -> None:
    world = await make_world(make_service("a", replicas=1), make_service("b", replicas=1))
    for name, text in (("b", "1"), ("a", "2")):
        ask(world, text, name)
        await world.run()
        await finish(world)
    before = jobs(world)
    world.remove("LLMService", NS, gone)
    await world.run()
    await world.look_at_everything()
    assert jobs(world) == before
    world.put(make_service(gone, replicas=1, profiling={"rerun": "1" if gone == "b" else "2"}))
    await world.run()
    assert jobs(world) == before


async def test_the_same_text_of_another_service_is_answered_with_it() -> None:
    world = await make_world(make_service("a", replicas=1), make_service("b", replicas=1))
    for name in ("a", "b"):
        ask(world, "2026-03", name)
    await world.run()
    assert jobs(world) == ["2"]
    await finish(world)
    world.put(make_service("c", replicas=1, profiling={"rerun": "2026-03"}))
    await world.run(rounds=20)
    assert jobs(world) == ["2"]
    assert told(world, "Profiled", "c")[:2] == ("True", "CacheHit")


async def test_empty_texts_ask_for_nothing() -> None:
    world = await make_measuring(make_service(profiling={"rerun": "", "extend": ""}))
    for _ in range(3):
        await world.look_at_everything()
    assert jobs(world) == ["1"]
    assert "rerun" not in measurement(world)
    await finish(world, trials=())
    assert told(world, "Recommended")[:2] == ("True", "Estimated")
    ask(world, "2")
    await world.run()
    await finish(world, trials=())
    assert jobs(world) == ["2"]
    for nothing in ("", None):
        ask(world, nothing)
        await world.run()
        await world.look_at_everything()
    assert jobs(world) == ["2"]
    assert set(profile(world)["metadata"]["annotations"]) == {
        labels.ANNOTATION_ASKED_BY,
        labels.rerun_annotation("opt"),
    }


async def test_trials_wait_for_the_new_measurement() -> None:
    world = await make_measuring()
    await finish(world, trials=())
    edit(world, lambda spec: spec["profiling"].update(rerun="2", extend="please"))
    await world.run()
    assert jobs(world) == ["2"]
    assert "extend" not in measurement(world)
    assert "its trial waits for the new measurement" in told(world, "Recommended")[2]
    await finish(world, trials=())
    assert jobs(world) == ["2", "3"]
    assert measurement(world)["extend"]["request"] == "opt/please"
