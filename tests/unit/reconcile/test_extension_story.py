"""Packings that are only estimated: what runs meanwhile, how they are tried, and what never starts a Job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pack_world import TRIALS, World, curve, end_jobs, jobs, measured, name_of, profile, trial
from story import make_profile, make_service
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, BatchProfileStatus
from tightship.profiler.__main__ import kept

NS = "default"
ESTIMATED = {"batch": 96, "replicas": 2}


async def make_world(*services: dict[str, Any], **found: Any) -> World:
    """A world in which the services' one profile is measured (without trials, unless `found` has some) and all is at rest."""
    world = World(gpus=(4, 4), profiling=True)
    for each in services or (make_service(),):
        world.put(each)
    await world.settle()
    world.report(name_of(world), measured(profile(world), **{"trials": (), **found}))
    end_jobs(world)
    await world.run(rounds=20)
    return world


def ask(world: World, text: str, name: str = "opt") -> None:
    world.change("LLMService", NS, name, lambda obj: obj["spec"].setdefault("profiling", {}).update(extend=text))


def extend(world: World) -> dict[str, Any]:
    return dict(profile(world)["spec"]["measurement"].get("extend") or {})


def recommendation(world: World, name: str = "opt") -> dict[str, Any]:
    return dict(world.get("LLMService", NS, name)["status"]["recommendation"])


def told(world: World, which: str, name: str = "opt") -> tuple[str, str, str]:
    return world.condition("LLMService", NS, name, which)


def of_profile(world: World, which: str) -> tuple[str, str]:
    return world.condition("BatchProfile", NS, name_of(world), which)[:2]


def per_pack(world: World) -> set[tuple[int, int]]:
    """Batch and replicas of every assignment."""
    return {(each["batch"], each["replicas"]) for pack in world.all("GPUPack") for each in pack["spec"]["assignments"]}


async def test_an_untried_packing_is_recommended_and_one_replica_on_each_gpu_runs_meanwhile() -> None:
    world = await make_world()
    advice = recommendation(world)
    assert (advice["basis"], advice["batch"], advice["replicasPerGPU"]) == ("Estimated", 96, 2)
    assert (advice["applied"]["batch"], advice["applied"]["replicasPerGPU"]) == (256, 1)
    assert per_pack(world) == {(256, 1)}
    status, reason, message = told(world, "Recommended")
    assert (status, reason) == ("True", "Estimated")
    assert "until profiling.extend has had it tried" in message
    status, reason, message = told(world, "Packed")
    assert (status, reason) == ("True", "Placed")
    assert "until batch 96 with 2 per GPU has been tried" in message
    assert told(world, "Ready")[0] == "True"
    assert world.get("LLMService", NS, "opt")["status"]["gpus"] == {"used": 4, "saved": 0}


def leave_open(world: World, *parts: str) -> None:
    """The measurement ended without some of its parts."""
    world.change(
        "BatchProfile", NS, name_of(world), lambda obj: obj["status"]["outcome"].update(unfinished=list(parts))
    )


async def test_a_text_makes_up_for_what_the_measurement_left_unfinished() -> None:
    world = await make_world(trials=TRIALS)
    assert recommendation(world)["basis"] == "Measured"
    leave_open(world, "Confirmation")
    ask(world, "please")
    await world.settle()
    assert extend(world)["request"] == "opt/please"
    assert extend(world).get("pairs", []) == []
    assert jobs(world) == ["1", "2"]
    world.report(name_of(world), measured(profile(world), trials=TRIALS))
    end_jobs(world)
    await world.run(rounds=20)
    assert of_profile(world, "Progressing") == ("False", "Completed")
    ask(world, "again")
    await world.settle()
    assert extend(world)["request"] == "opt/please", "nothing is left to do"
    assert jobs(world) == ["1", "2"]


async def test_a_text_has_it_tried_while_the_service_serves_and_then_it_is_packed() -> None:
    world = await make_world()
    pods = {pod["metadata"]["uid"] for pod in world.all("Pod")}
    ask(world, "please")
    await world.settle()
    objective = {"metric": "InterTokenLatency", "statistic": "mean", "max": "30ms"}
    assert extend(world) == {
        "request": "opt/please",
        "pairs": [ESTIMATED],
        "budget": "45s",
        "objectives": [objective],
    }
    assert jobs(world) == ["1", "2"]
    job = world.all("Job")[-1]
    assert job["metadata"]["annotations"][labels.ANNOTATION_EXTEND] == "opt/please"
    # The profiler takes its outcome back while it is at work.
    world.report(name_of(world), measured(profile(world), trials=(), answers=False))
    await world.run()
    assert of_profile(world, "Complete") == ("True", "Completed")
    assert of_profile(world, "Progressing") == ("True", "Measuring")
    assert told(world, "Ready")[0] == "True"
    assert "its trial is under way" in told(world, "Recommended")[2]
    assert {pod["metadata"]["uid"] for pod in world.all("Pod")} == pods

    world.report(name_of(world), measured(profile(world)))
    end_jobs(world)
    await world.run(rounds=40)
    assert of_profile(world, "Progressing") == ("False", "Completed")
    advice = recommendation(world)
    assert (advice["basis"], advice["tokensPerSecond"]) == ("Measured", "12313.9")
    assert advice["latencies"] == [
        {"metric": "InterTokenLatency", "statistic": "mean", "value": "18.98ms", "max": "30ms"}
    ]
    assert "applied" not in advice
    assert per_pack(world) == {(96, 1)}
    assert "2 fit on each, so 2 would do" in told(world, "Packed")[2]
    for replicas in (2, 4):
        world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(replicas=replicas))  # noqa: B023
        await world.run(rounds=20)
    assert per_pack(world) == {(96, 2)}
    assert told(world, "Ready")[0] == "True"
    assert world.get("LLMService", NS, "opt")["status"]["gpus"] == {"used": 2, "saved": 2}
    assert jobs(world) == ["1", "2"]


def fails_by_itself(world: World) -> None:
    end_jobs(world, "Failed")


def tells_of_failure(world: World) -> None:
    found = measured(profile(world), trials=())
    found["outcome"] |= {"state": "Failed", "reason": "EngineFailed", "message": "the daemon said no"}
    world.report(name_of(world), found)
    end_jobs(world)


@pytest.mark.parametrize("fail", [fails_by_itself, tells_of_failure])
@pytest.mark.parametrize("answers", [True, False])
async def test_a_trial_that_fails_leaves_the_profile_complete(fail: Callable[[World], None], answers: bool) -> None:
    world = await make_world()
    ask(world, "please")
    await world.settle()
    world.report(name_of(world), measured(profile(world), trials=(), answers=False))
    make_pod(world)
    await world.settle()
    fail(world)
    await world.run()
    for _ in range(2):
        assert of_profile(world, "Complete") == ("True", "Completed")
        assert of_profile(world, "Failed") == ("False", "Completed")
        assert of_profile(world, "Progressing")[0] == "False"
        message = world.condition("BatchProfile", NS, name_of(world), "Complete")[2]
        assert "the trials that opt/please asked for failed" in message
        assert "the daemon said no" in message
        assert told(world, "Ready")[0] == "True"
        assert recommendation(world)["applied"]["replicasPerGPU"] == 1
        assert jobs(world) == ["1", "2"]
        await world.look_at_everything()
    ask(world, "once more")
    await world.settle()
    assert jobs(world) == ["1", "2", "3"]
    assert of_profile(world, "Complete")[0] == "True"


def make_pod(world: World) -> None:
    """The last Job's pod, which ended with words."""
    job = world.all("Job")[-1]
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "controller": True,
    }
    ended = {"terminated": {"exitCode": 1, "message": "the daemon said no"}}
    container = {"name": "engine", "image": "vllm", "restartCount": 0, "state": ended}
    world.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": job["metadata"]["name"] + "-x",
                "namespace": NS,
                "labels": job["metadata"]["labels"],
                "ownerReferences": [owner],
            },
            "spec": {"containers": []},
            "status": {"phase": "Failed", "containerStatuses": [container]},
        }
    )


async def test_nobody_left_to_want_the_trials_gives_the_gpu_back() -> None:
    world = await make_world()
    ask(world, "please")
    await world.settle()
    assert jobs(world) == ["1", "2"]
    world.remove("LLMService", NS, "opt")
    await world.run()
    assert jobs(world) == ["1"]
    assert of_profile(world, "Complete")[0] == "True"
    world.put(make_service())
    await world.run()
    assert jobs(world) == ["1", "3"]


def with_p95(rows: Any, factor: float = 1.2) -> list[dict[str, Any]]:
    """Points or trials with a p95 that is so many times the mean."""

    def text(row: dict[str, Any]) -> str:
        return f"{factor * float(row['interTokenLatency']['mean'].removesuffix('ms')):.2f}ms"

    return [row | {"interTokenLatency": row["interTokenLatency"] | {"p95": text(row)}} for row in rows]


async def test_a_trial_that_left_the_objectives_percentile_open_is_made_again() -> None:
    objective = {"metric": "InterTokenLatency", "statistic": "p95", "max": "30ms"}
    hasty = [trial | {"unresolved": ["p95", "p99"]} for trial in with_p95(TRIALS)]
    world = await make_world(make_service(slo__objectives=[objective]), points=with_p95(curve()), trials=hasty)
    advice = recommendation(world)
    assert (advice["basis"], advice["batch"], advice["replicasPerGPU"]) == ("Estimated", 96, 2)
    assert advice["applied"]["replicasPerGPU"] == 1
    assert per_pack(world) == {(96, 1)}
    ask(world, "to p95")
    await world.settle()
    assert extend(world) == {
        "request": "opt/to p95",
        "pairs": [ESTIMATED],
        "budget": "45s",
        "objectives": [objective],
    }
    found = measured(profile(world), points=with_p95(curve()), trials=with_p95(TRIALS))
    world.report(name_of(world), found)
    end_jobs(world)
    await world.run(rounds=20)
    assert recommendation(world)["basis"] == "Measured"
    assert recommendation(world)["replicasPerGPU"] == 2


async def test_a_rerun_during_the_first_measurement_begins_from_nothing() -> None:
    world = World(gpus=(4, 4), profiling=True)
    world.put(make_service())
    await world.settle()
    begun = {"stage": "Sweeping", "points": 3, "message": "measuring batch 8"}
    world.report(name_of(world), {"points": curve()[:3], "progress": begun})
    await world.settle()
    assert kept(BatchProfile.model_validate(profile(world))) == BatchProfile.model_validate(profile(world)).status
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"]["profiling"].update(rerun="new driver"))
    await world.run()
    assert jobs(world) == ["2"]
    assert profile(world)["status"]["points"], "nobody has measured anew yet"
    assert kept(BatchProfile.model_validate(profile(world))) == BatchProfileStatus()


async def test_a_rerun_during_an_extension_takes_its_place() -> None:
    world = await make_world()
    ask(world, "please")
    await world.settle()
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"]["profiling"].update(rerun="new driver"))
    await world.run()
    assert jobs(world) == ["3"]
    assert of_profile(world, "Complete") == ("True", "Completed")
    assert of_profile(world, "Progressing") == ("True", "Measuring")
    assert told(world, "Profiled")[:2] == ("True", "Completed")
    assert told(world, "Ready")[0] == "True"


async def test_two_services_of_one_key_ask_in_turn_and_each_once() -> None:
    world = await make_world(make_service("a", replicas=1), make_service("b", replicas=1))
    for name in ("a", "b"):
        ask(world, "x", name)
    await world.settle()
    assert extend(world)["request"] == "a/x"
    assert "the trials that a/x asked for are under way" in told(world, "Recommended", "b")[2]
    for last in ("2", "3"):
        assert jobs(world)[-1] == last
        # Nothing comes of it: the packing stays estimated, so both would ask again if they could.
        world.report(name_of(world), measured(profile(world), trials=()))
        end_jobs(world)
        await world.run()
    assert extend(world)["request"] == "b/x"
    await world.look_at_everything()
    assert jobs(world) == ["1", "2", "3"]
    for name in ("a", "b"):
        assert "profiling.extend 'x' was answered" in told(world, "Recommended", name)[2]


async def test_a_text_with_nothing_to_try_is_used_up() -> None:
    world = await make_world(trials=TRIALS)
    ask(world, "please")
    await world.settle()
    assert extend(world) == {}
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"]["slo"]["objectives"][0].update(max="25ms"))
    world.report(name_of(world), measured(profile(world), trials=()))  # now there would be something to try
    await world.run(rounds=40)
    assert recommendation(world)["basis"] == "Estimated"
    assert extend(world) == {}
    assert jobs(world) == ["1"]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "objective": lambda spec: spec["slo"]["objectives"][0].update(max="22ms"),
    "no objective": lambda spec: spec["slo"].update(objectives=[]),
    "floor": lambda spec: spec.update(advisor={"efficiencyFloor": "0.2"}),
    "gain": lambda spec: spec["packing"].update(minimumGain="1.5"),
    "reserve": lambda spec: spec["packing"].update(memoryReserve="40Gi"),
    "most replicas": lambda spec: spec["packing"].update(maxReplicasPerGPU=8),
    "budget": lambda spec: spec["profiling"].update(budget="2h"),
    "replicas": lambda spec: spec.update(replicas=2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trials", [(), TRIALS], ids=["estimated", "measured"])
async def test_deciding_again_never_starts_a_job(change: str, trials: Any) -> None:
    world = await make_world(trials=trials)
    world.change("LLMService", NS, "opt", lambda obj: CHANGES[change](obj["spec"]))
    await world.run(rounds=40)
    assert jobs(world) == ["1"]
    assert len(world.all("BatchProfile")) == 1
    generation = world.get("LLMService", NS, "opt")["metadata"]["generation"]
    assert world.get("LLMService", NS, "opt")["status"]["observedGeneration"] == generation == 2


async def test_what_the_key_holds_is_measured_under_a_key_of_its_own() -> None:
    world = await make_world()
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"]["engine"].update(args=["--enable-lora"]))
    await world.settle()
    assert len(world.all("BatchProfile")) == len(world.all("Job")) == 2


async def test_two_services_of_one_key_applied_together_share_one_job() -> None:
    world = World(profiling=True)
    world.put(make_service("one"))
    world.put(make_service("two", slo__objectives=[], packing={"maxReplicasPerGPU": 4}, profiling={"budget": "1h"}))
    await world.settle()
    assert len(world.all("BatchProfile")) == len(world.all("Job")) == 1
    measurement = profile(world)["spec"]["measurement"]
    assert (measurement["budget"], measurement["maxReplicasPerGPU"], measurement["minimumGain"]) == ("45s", 2, "1.05")


async def test_what_is_asked_of_an_imported_profile_is_answered_in_words() -> None:
    world = World(profiling=True)
    service = make_service(profiling={"extend": "please", "rerun": "again"})
    imported = make_profile(service)
    del imported["spec"]["results"]["trials"]
    world.put(imported)
    world.put(service)
    await world.run(rounds=20)
    assert world.all("Job") == []
    assert "profiling.rerun measures nothing here" in told(world, "Profiled")[2]
    assert "profiling.extend can't have anything tried" in told(world, "Recommended")[2]
    assert set(profile(world)["spec"]) == {"key", "results"}


async def test_a_profile_in_use_is_kept_when_another_is_finished_later() -> None:
    world = World(profiling=True)
    world.put(make_service())
    await world.settle()
    own = name_of(world)
    world.put(make_profile(make_service()))
    await world.run(rounds=20)
    assert world.get("LLMService", NS, "opt")["status"]["profile"]["name"] == "imported"
    mine = world.get("BatchProfile", NS, own)
    world.report(own, measured(mine) | {"outcome": {"state": "BudgetExceeded"}})
    await world.run(rounds=20)
    assert world.get("LLMService", NS, "opt")["status"]["profile"]["name"] == "imported"


@pytest.mark.parametrize(
    ("trials", "changes", "reason", "words"),
    [
        pytest.param(
            [trial(96, 2, 9500, 25.0), trial(256, 2, 9900, 29.9)],
            {},
            "ExclusiveNoGain",
            ["batch 96 with 2 tried at 9500 tokens/s", "batch 256 with 2 tried at 9900 tokens/s"],
            id="tried in vain",
        ),
        pytest.param(
            [],
            {"packing": {"minimumGain": "3", "maxReplicasPerGPU": 2}},
            "ExclusiveNoGain",
            ["predicted at"],
            id="predicted",
        ),
        pytest.param(
            [], {"packing": {"maxReplicasPerGPU": 1}}, "Placed", ["as many as may share"], id="only one allowed"
        ),
    ],
)
async def test_one_replica_to_a_gpu_says_why(trials: Any, changes: Any, reason: str, words: list[str]) -> None:
    world = await make_world(make_service(replicas=1, **changes), trials=trials)
    status, found, message = told(world, "Packed")
    assert (status, found) == ("True", reason), message
    assert all(each in message for each in words), message


async def test_the_default_engine_stands_beside_the_recommendation() -> None:
    world = await make_world(trials=TRIALS)
    baseline = {"batch": 1024, "totalTokensPerSecond": "11000", "interTokenLatency": {"mean": "91ms"}}
    world.report(name_of(world), measured(profile(world)) | {"baseline": baseline})
    await world.run()
    assert recommendation(world)["defaultEngine"] == {
        "batch": 1024,
        "totalTokensPerSecond": "11000.0",
        "latencies": [{"metric": "InterTokenLatency", "statistic": "mean", "value": "91ms", "max": "30ms"}],
        "meetsObjectives": False,
    }
