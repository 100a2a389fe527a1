"""What becomes of a profile, as a table of situations and as short stories on an API in memory."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest

from fake_api import BEGIN, FakeApi, FakeClock
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import KeyEngine, KeyModel, KeyWorkload, Outcome, ProfileKey
from tightship.api.v1alpha1.spec import AcceleratorSpec
from tightship.api.v1alpha1.template import Resources
from tightship.api.v1alpha1.validation import parse_service, profile_key
from tightship.core.conditions import timestamp
from tightship.kube.cluster import Cluster
from tightship.kube.events import Events
from tightship.kube.store import Store
from tightship.reconcile.batchprofile import (
    MAX_ATTEMPTS,
    Decision,
    Observed,
    conditions,
    decide,
    read,
    reconcile,
    status,
)
from tightship.reconcile.context import Context, Settings
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.queue import Key, Queue
from tightship.telemetry.metrics import Metrics

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
H100 = "NVIDIA-H100-80GB-HBM3"


def make_key(product: str = H100) -> dict[str, Any]:
    return ProfileKey.of(
        model=KeyModel(source="hf://facebook/opt-1.3b"),
        engine=KeyEngine(image="vllm/vllm-openai:v0.33.0"),
        accelerator=AcceleratorSpec(device="cuda", product=product),
        workload=KeyWorkload(input_tokens=111, output_tokens=292),
        resources=Resources(),
    ).to_dict()


def make_profile(name: str = "opt", status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": labels.API_VERSION,
        "kind": "BatchProfile",
        "metadata": {"name": name, "namespace": "team", "uid": f"uid-of-{name}", "generation": 3},
        "spec": {"key": make_key()} | spec,
        "status": status or {},
    }


def make_job(
    attempt: int = 1, end: str | None = None, profile: str = "opt", rerun: str | None = None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": f"{profile}-{attempt}",
        "namespace": "team",
        "uid": f"job-{profile}-{attempt}",
        "labels": labels.common(profile, labels.COMPONENT_PROFILER, {labels.PROFILE: profile}),
        "ownerReferences": [{"kind": "BatchProfile", "name": profile, "uid": f"uid-of-{profile}", "controller": True}],
    }
    if rerun:
        metadata["annotations"] = {"tightship.dev/rerun": rerun}
    ended = (
        [{"type": end, "status": "True", "reason": "BackoffLimitExceeded", "message": "limit reached"}] if end else []
    )
    for each in ended:
        each["lastTransitionTime"] = timestamp(NOW)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "status": {"conditions": ended}}


def make_pod(**state: Any) -> dict[str, Any]:
    metadata = {
        "name": "opt-1-abc",
        "namespace": "team",
        "uid": "pod-1",
        "labels": {labels.PROFILE: "opt"},
        "ownerReferences": [{"kind": "Job", "name": "opt-1", "uid": "job-opt-1", "controller": True}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"nodeName": "n1"}, "status": state}


def engine_status(**state: Any) -> list[dict[str, Any]]:
    return [{"name": "engine", "image": "vllm/vllm-openai:v0.33.0", "restartCount": 0, "state": state}]


def seen(obj: dict[str, Any] | None = None, **changes: Any) -> Observed:
    obj = obj or make_profile()
    profile, problems = read(obj)
    return replace(
        Observed(obj=obj, profile=profile, problems=problems, now=NOW, slots=1, products=(H100,)),
        **changes,
    )


def labelled(profile: dict[str, Any], key: str) -> dict[str, Any]:
    return {**profile, "metadata": {**profile["metadata"], "labels": {labels.PROFILE_KEY: key}}}


UNSCHEDULABLE = make_pod(
    phase="Pending",
    conditions=[
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
        }
    ],
)
NO_IMAGE = make_pod(
    phase="Pending",
    containerStatuses=engine_status(waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"}),
)
RUNNING = make_pod(phase="Running", containerStatuses=engine_status(running={}))
EVICTED = make_pod(phase="Failed", reason="Evicted", message="low on memory")
DISRUPTED = make_pod(
    phase="Failed", conditions=[{"type": "DisruptionTarget", "status": "True", "message": "node drained"}]
)
CRASHED = make_pod(
    phase="Failed", containerStatuses=engine_status(terminated={"exitCode": 1, "message": "no such module: httpx"})
)
TOO_LATE = make_pod(phase="Failed", reason="DeadlineExceeded")


def failed(reason: str, message: str) -> Outcome:
    return Outcome(state="Failed", reason=reason, message=message)


def replace_outcome(outcome: Outcome, **changes: Any) -> Outcome:
    return outcome.model_copy(update=changes)


def jobs(*ended: str | None) -> tuple[dict[str, Any], ...]:
    return tuple(make_job(number, end) for number, end in enumerate(ended, 1))


IMPORTED = make_profile(results={"points": [{"batch": 1}, {"batch": 2}]})
LATER = NOW.replace(hour=13)


def lost_before(attempts: int, points: Any = (), **measurement: Any) -> dict[str, Any]:
    """A profile that has lost so many attempts, the last one with number 8, whose Jobs are gone."""
    lost = {"attempts": attempts, "last": 8, "found": 0}
    return make_profile(status={"lost": lost, "points": list(points)}, measurement=measurement)


EXTEND = {"request": "opt/please", "pairs": [{"batch": 96, "replicas": 2}]}
COMPLETE = [
    {"type": "Complete", "status": "True", "reason": "BudgetExceeded", "message": "2 points within the budget"},
]
POINTS = [{"batch": 1}, {"batch": 2}]
EXTENDED = make_profile(status={"points": POINTS, "conditions": COMPLETE}, measurement={"extend": EXTEND})
DONE = Outcome(state="BudgetExceeded")
AGAIN = make_profile(
    status={"points": POINTS, "conditions": COMPLETE, "outcome": {"state": "BudgetExceeded", "rerun": "1"}},
    measurement={"rerun": "2"},
)


def extension_job(attempt: int = 2, end: str | None = None, request: str = "opt/please") -> dict[str, Any]:
    job = make_job(attempt, end)
    job["metadata"]["annotations"] = {labels.ANNOTATION_EXTEND: request}
    return job


SITUATIONS: dict[str, tuple[Observed, str, str, str]] = {
    # situation: (what is seen, stage, reason, words in the message)
    "new": (seen(), "running", "Measuring", "Job opt-1 is starting"),
    "imported": (seen(IMPORTED), "complete", "Imported", "2 points came with the profile"),
    "imported, whatever a Job does": (seen(IMPORTED, jobs=jobs(None)), "complete", "Imported", "2 points"),
    "all slots taken": (seen(busy=1), "waiting", "Waiting", "1 of 1 profiling Jobs are running"),
    "nobody wants it": (seen(wanted=False), "idle", "Waiting", "no LLMService needs"),
    "pod not there yet": (seen(jobs=jobs(None)), "running", "Measuring", "its pod isn't there yet"),
    "no pod for a long time": (
        seen(jobs=({**make_job(), "metadata": {**make_job()["metadata"], "creationTimestamp": timestamp(BEGIN)}},)),
        "waiting",
        "Waiting",
        "kubectl describe job opt-1",
    ),
    "no free GPU": (
        seen(jobs=jobs(None), pods=(UNSCHEDULABLE,)),
        "running",
        "Unschedulable",
        "2 Insufficient nvidia.com/gpu",
    ),
    "unknown product": (
        seen(jobs=jobs(None), pods=(UNSCHEDULABLE,), products=("NVIDIA-L4",)),
        "running",
        "Unschedulable",
        f"no node has nvidia.com/gpu.product={H100}: this cluster's are NVIDIA-L4",
    ),
    "no product at all": (
        seen(jobs=jobs(None), pods=(UNSCHEDULABLE,), products=()),
        "running",
        "Unschedulable",
        "no node has that label",
    ),
    "image can't be pulled": (
        seen(jobs=jobs(None), pods=(NO_IMAGE,)),
        "running",
        "ImagePullFailed",
        "imagePullSecrets",
    ),
    "measuring": (seen(jobs=jobs(None), pods=(RUNNING,)), "running", "Measuring", "Job opt-1 is measuring"),
    "a retried pod": (seen(jobs=jobs(None), pods=(CRASHED, RUNNING)), "running", "Measuring", "is measuring"),
    "measured": (
        seen(outcome=Outcome(state="Completed", message="T no longer rises"), jobs=jobs("Complete")),
        "complete",
        "Completed",
        "T no longer rises",
    ),
    "measured in part": (
        seen(outcome=Outcome(state="BudgetExceeded")),
        "complete",
        "BudgetExceeded",
        "within the budget",
    ),
    "engine failed": (
        seen(outcome=failed("EngineFailed", "CUDA out of memory")),
        "failed",
        "EngineFailed",
        "CUDA out of memory (final until profiling.rerun",
    ),
    "GPU too small": (seen(outcome=failed("InsufficientMemory", "x")), "failed", "InsufficientMemory", "x"),
    "evicted": (seen(jobs=jobs("Failed"), pods=(EVICTED,)), "waiting", "Waiting", "Evicted: low on memory; the next"),
    "drained": (seen(jobs=jobs("Failed"), pods=(DISRUPTED,)), "waiting", "Waiting", "node drained"),
    "pod gone with its node": (seen(jobs=jobs("Failed")), "waiting", "Waiting", "gone, with its node"),
    "evicted a while ago": (seen(jobs=jobs("Failed"), pods=(EVICTED,), now=LATER), "running", "Measuring", "Job opt-2"),
    "evicted again and again": (
        seen(lost_before(MAX_ATTEMPTS - 1), jobs=(make_job(9, "Failed"),), pods=(EVICTED,), now=LATER),
        "failed",
        "JobFailed",
        f"{MAX_ATTEMPTS} attempts in a row were lost, the last one, Job opt-9: ",
    ),
    "evicted again and again, with a point more": (
        seen(lost_before(MAX_ATTEMPTS - 1, points=POINTS), jobs=(make_job(9, "Failed"),), pods=(EVICTED,), now=LATER),
        "running",
        "Measuring",
        "Job opt-10 is starting",
    ),
    "evicted again and again, for another text": (
        seen(
            lost_before(MAX_ATTEMPTS - 1, rerun="2"),
            jobs=(make_job(9, "Failed", rerun="2"),),
            pods=(EVICTED,),
            now=LATER,
        ),
        "running",
        "Measuring",
        "Job opt-10 is starting",
    ),
    "profiler crashed": (
        seen(jobs=jobs("Failed"), pods=(CRASHED,)),
        "failed",
        "JobFailed",
        "exit status 1 (restart 0): no such module: httpx",
    ),
    "took too long": (seen(jobs=jobs("Failed"), pods=(TOO_LATE,)), "failed", "JobFailed", "not done after 13200 s"),
    "ended without a word": (seen(jobs=jobs("Complete")), "failed", "JobFailed", "reported no outcome"),
    "measured anew": (
        seen(superseded=jobs(None)),
        "waiting",
        "Waiting",
        "the Job of the previous one is being removed",
    ),
    "a name too long for a label": (seen(make_profile("p" * 64)), "failed", "InvalidSpec", "64 characters"),
    "a key that was edited": (
        seen(make_profile(key=make_key() | {"workload": {"inputTokens": 1, "outputTokens": 2}})),
        "failed",
        "InvalidSpec",
        "a key can't be edited",
    ),
    "a key that was replaced": (
        seen(labelled(make_profile(key=make_key("NVIDIA-L4")), make_key()["hash"][:40])),
        "failed",
        "InvalidSpec",
        "this profile was made for key",
    ),
    "trials asked for": (seen(EXTENDED, outcome=DONE, attempts=1), "running", "Measuring", "Job opt-2 is starting"),
    "trials wait for their turn": (seen(EXTENDED, outcome=DONE, busy=1), "waiting", "Waiting", "1 of 1 profiling Jobs"),
    "trials nobody wants": (seen(EXTENDED, outcome=DONE, wanted=False), "idle", "Waiting", "no LLMService needs"),
    "trials being made": (
        seen(EXTENDED, jobs=(extension_job(),), pods=(RUNNING,)),
        "running",
        "Measuring",
        "Job opt-2 is measuring",
    ),
    "trials lost with their node": (
        seen(EXTENDED, jobs=(extension_job(end="Failed"),), pods=(EVICTED,)),
        "waiting",
        "Waiting",
        "Evicted: low on memory; the next",
    ),
    "trials that crashed": (
        seen(EXTENDED, outcome=DONE, jobs=(extension_job(end="Failed"),), pods=(CRASHED,)),
        "complete",
        "BudgetExceeded",
        "the trials that opt/please asked for failed: Job opt-2 failed",
    ),
    "trials whose engine failed": (
        seen(EXTENDED, outcome=replace_outcome(failed("EngineFailed", "no MPS"), extend="opt/please")),
        "complete",
        "BudgetExceeded",
        "the trials that opt/please asked for failed: no MPS",
    ),
    "trials made": (
        seen(EXTENDED, outcome=Outcome(state="Completed", extend="opt/please"), jobs=(extension_job(end="Complete"),)),
        "complete",
        "Completed",
        "2 points measured",
    ),
    "again: asked for": (seen(AGAIN, attempts=1), "running", "Measuring", "Job opt-2 is starting"),
    "again: the earlier Job is in the way": (
        seen(AGAIN, superseded=jobs(None)),
        "waiting",
        "Waiting",
        "a new measurement was asked for (rerun)",
    ),
    "again: no GPU is free": (
        seen(AGAIN, jobs=(make_job(1, rerun="2"),), pods=(UNSCHEDULABLE,)),
        "running",
        "Unschedulable",
        "2 Insufficient nvidia.com/gpu",
    ),
    "again: nobody wants it": (seen(AGAIN, wanted=False), "idle", "Waiting", "no LLMService needs"),
    "again: lost with its node": (
        seen(AGAIN, jobs=(make_job(1, "Failed", rerun="2"),), pods=(EVICTED,)),
        "waiting",
        "Waiting",
        "Evicted: low on memory; the next",
    ),
    "again: crashed": (
        seen(AGAIN, jobs=(make_job(1, "Failed", rerun="2"),), pods=(CRASHED,)),
        "complete",
        "BudgetExceeded",
        "the measurement that rerun 2 asked for failed: Job opt-1 failed",
    ),
    "again: with trials still to be made": (
        seen(make_profile(status=AGAIN["status"], measurement={"rerun": "2", "extend": EXTEND}), attempts=1),
        "running",
        "Measuring",
        "Job opt-2 is starting",
    ),
    "a failure that is measured again": (
        seen(
            make_profile(
                status={"points": POINTS, "outcome": {"state": "Failed"}, "conditions": COMPLETE},
                measurement={"rerun": "2"},
            )
        ),
        "running",
        "Measuring",
        "Job opt-1 is starting",
    ),
    "made otherwise before an engine ran": (
        seen(jobs=jobs(None), outdated=jobs(None), pods=(UNSCHEDULABLE,)),
        "waiting",
        "Waiting",
        "how to measure was changed before an engine ran",
    ),
    "a measurement that failed with trials asked for": (
        seen(make_profile(measurement={"extend": EXTEND}), outcome=failed("EngineFailed", "x")),
        "failed",
        "EngineFailed",
        "x (final until",
    ),
    "lengths that can't be had": (seen(lengths="ConfigMap chat is not there"), "waiting", "Waiting", "ConfigMap chat"),
    "imported, asked in vain": (
        seen(make_profile(results={"points": POINTS}, measurement={"rerun": "a", "extend": EXTEND})),
        "complete",
        "Imported",
        "nothing is measured, whatever is in measurement.rerun and measurement.extend",
    ),
    "not a profile": (
        seen({**make_profile(), "spec": {"key": {"hash": "x"}}}),
        "failed",
        "InvalidSpec",
        "spec.key.model: Field required",
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation: str) -> None:
    observed, stage, reason, words = SITUATIONS[situation]
    decision = decide(observed)
    assert (decision.stage, decision.reason) == (stage, reason)
    assert words in decision.message


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_decision_starts_a_job_only_where_none_is_active_and_nothing_is_final(situation: str) -> None:
    observed, *_ = SITUATIONS[situation]
    decision = decide(observed)
    if decision.start is not None:
        assert decision.stage == "running"
        assert observed.wanted
        assert observed.busy < observed.slots
        assert observed.outcome is None or observed.extending
        assert decision.start == observed.attempt + 1


@pytest.mark.parametrize("situation", SITUATIONS)
def test_deciding_again_from_what_was_reported_changes_nothing(situation: str) -> None:
    observed, *_ = SITUATIONS[situation]
    reported = status(observed, decide(observed))
    obj = {**observed.obj, "status": {**observed.obj["status"], **reported}}
    again = replace(observed, obj=obj)
    if decide(observed).start is None:
        assert status(again, decide(again)) == reported


@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name.startswith(("trials", "again: "))])
def test_a_profile_stays_complete_whatever_becomes_of_trials_or_a_new_measurement(situation: str) -> None:
    observed, stage, *_ = SITUATIONS[situation]
    found = {condition.type: condition.status for condition in conditions(decide(observed))}
    busy = "True" if stage in ("running", "waiting") else "False"
    assert found == {"Progressing": busy, "Complete": "True", "Failed": "False", "Ready": "True"}


def test_an_attempt_that_broke_stays_final_when_its_job_is_cleaned_away() -> None:
    observed = seen(jobs=jobs("Failed"), pods=(CRASHED,))
    obj = make_profile(status=status(observed, decide(observed)))
    profile, _ = read(obj)
    assert profile is not None
    cleaned = seen(obj, outcome=profile.status.outcome)
    decision = decide(cleaned)
    assert (decision.stage, decision.reason, decision.start) == ("failed", "JobFailed", None)
    assert status(cleaned, decision)["outcome"] == obj["status"]["outcome"]


def test_waits_between_lost_attempts_grow() -> None:
    waits = [decide(seen(jobs=jobs("Failed"), pods=(EVICTED,))).requeue_after]
    for lost in range(1, MAX_ATTEMPTS - 1):
        decision = decide(seen(lost_before(lost), jobs=(make_job(9, "Failed"),), pods=(EVICTED,)))
        waits.append(decision.requeue_after)
    assert waits == [10, 20, 40, 80, 160]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("running", {"Progressing": "True", "Complete": "False", "Failed": "False", "Ready": "Unknown"}),
        ("waiting", {"Progressing": "True", "Complete": "False", "Failed": "False", "Ready": "Unknown"}),
        ("idle", {"Progressing": "False", "Complete": "False", "Failed": "False", "Ready": "Unknown"}),
        ("complete", {"Progressing": "False", "Complete": "True", "Failed": "False", "Ready": "True"}),
        ("failed", {"Progressing": "False", "Complete": "False", "Failed": "True", "Ready": "False"}),
    ],
)
def test_conditions_of_a_stage(stage: Any, expected: dict[str, str]) -> None:
    found = conditions(Decision(stage, "Reason", "message"))
    assert {condition.type: condition.status for condition in found} == expected
    assert {condition.reason for condition in found} == {"Reason"}


# --- stories ---


class World:
    """A cluster in memory and the reconciler on it."""

    def __init__(self, slots: int = 1, api: FakeApi | None = None) -> None:
        self.api, self.clock = api or FakeApi(), FakeClock()
        self.store = Store(indexers=INDEXERS)
        cluster = Cluster(self.api, self.store, clock=self.clock)
        self.context = Context(
            cluster=cluster,
            store=self.store,
            queue=Queue(self.clock),
            clock=self.clock,
            settings=Settings(operator_image="tightship:test", max_concurrent_profiles=slots),
            metrics=Metrics(),
            events=Events(cluster, self.clock, instance="test"),
        )

    def put(self, obj: dict[str, Any]) -> dict[str, Any]:
        made = self.api.put(obj)
        self.store.observe(made)
        return made

    async def look(self, name: str = "opt") -> None:
        await reconcile(self.context, Key("BatchProfile", "team", name))

    def profile(self, name: str = "opt") -> dict[str, Any]:
        found = self.api.find("BatchProfile", "team", name)
        assert found is not None
        return found

    def condition(self, kind: str, name: str = "opt") -> tuple[str, str]:
        found = {each["type"]: each for each in self.profile(name)["status"]["conditions"]}
        return found[kind]["status"], found[kind]["reason"]

    def jobs(self) -> list[str]:
        return sorted(obj["metadata"]["name"] for obj in self.api.objects.values() if obj["kind"] == "Job")

    def report(self, outcome: dict[str, Any] | None, name: str = "opt") -> None:
        """What the profiler writes."""
        profile = self.profile(name)
        told = {"points": [{"batch": 1}], **({"outcome": outcome} if outcome else {})}
        self.put({**profile, "status": {**profile.get("status", {}), **told}})

    def end_job(self, attempt: int, how: str) -> None:
        job = self.api.find("Job", "team", f"opt-{attempt}")
        assert job is not None
        ended = {"type": how, "status": "True", "lastTransitionTime": timestamp(self.clock.now())}
        self.put({**job, "status": {"conditions": [ended]}})


async def test_from_nothing_to_measured() -> None:
    world = World()
    world.put(make_profile())
    await world.look()
    assert world.jobs() == ["opt-1"]
    assert {kind for _, kind in world.api.requests} >= {"ServiceAccount", "Role", "RoleBinding", "Job"}
    assert world.condition("Progressing") == ("True", "Measuring")
    world.report({"state": "Completed", "message": "done"})
    await world.look()
    assert world.condition("Complete") == ("True", "Completed")
    assert world.condition("Ready") == ("True", "Completed")
    assert world.jobs() == ["opt-1"]


async def test_looking_twice_writes_nothing() -> None:
    world = World()
    world.put(make_profile())
    for _ in range(3):
        await world.look()
    before = world.api.writes()
    await world.look()
    assert world.api.writes() == before


async def test_a_new_operator_goes_on_where_the_old_one_was_killed() -> None:
    first = World()
    first.put(make_profile())
    await first.look()
    second = World(api=first.api)
    for obj in first.api.objects.values():
        if obj["kind"] in ("BatchProfile", "Job"):
            second.store.observe(obj)
    versions = {path: obj["metadata"]["resourceVersion"] for path, obj in first.api.objects.items()}
    await second.look()
    await second.look()
    changed = [
        path for path, obj in first.api.objects.items() if obj["metadata"]["resourceVersion"] != versions.get(path)
    ]
    # The message of the conditions goes on ("its pod isn't there yet"); nothing else may change.
    assert [path.rsplit("/", 2)[-2] for path in changed] == ["batchprofiles"]
    assert second.jobs() == ["opt-1"]


async def test_imported_results_are_copied_and_no_job_is_made() -> None:
    world = World()
    results = {"points": [{"batch": 8, "totalTokensPerSecond": "900"}], "gpu": {"product": H100}}
    world.put(make_profile(results=results))
    await world.look()
    told = world.profile()["status"]
    assert told["points"] == results["points"]
    assert told["gpu"] == results["gpu"]
    assert told["progress"]["points"] == 1
    assert world.condition("Complete") == ("True", "Imported")
    assert world.jobs() == []


async def test_only_as_many_jobs_as_there_are_slots() -> None:
    world = World(slots=2)
    for name in ("a", "b", "c"):
        world.put(make_profile(name))
        await world.look(name)
    assert world.jobs() == ["a-1", "b-1"]
    assert world.condition("Progressing", "c") == ("True", "Waiting")


async def test_a_job_that_finds_no_node_holds_nobody_up() -> None:
    world = World(slots=1)
    for name in ("a", "b"):
        world.put(make_profile(name))
        await world.look(name)
    assert world.jobs() == ["a-1"]
    job = world.api.find("Job", "team", "a-1")
    assert job is not None
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/2 nodes are available",
    }
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "a-1", "uid": job["metadata"]["uid"], "controller": True}
    world.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "a-1-x",
                "namespace": "team",
                "labels": job["metadata"]["labels"],
                "ownerReferences": [owner],
            },
            "status": {"phase": "Pending", "conditions": [unschedulable]},
        }
    )
    await world.look("b")
    assert world.jobs() == ["a-1", "b-1"]


async def test_an_outcome_that_the_cache_has_not_seen_yet_is_asked_for() -> None:
    world = World()
    world.put(make_profile())
    await world.look()
    world.end_job(1, "Complete")
    profile = world.profile()
    world.api.put({**profile, "status": {**profile["status"], "outcome": {"state": "Completed"}}})
    await world.look()
    assert world.condition("Complete") == ("True", "Completed")


async def test_a_lost_attempt_is_made_again_after_a_pause() -> None:
    world = World()
    world.put(make_profile())
    await world.look()
    world.end_job(1, "Failed")
    await world.look()
    assert world.jobs() == ["opt-1"]
    assert world.condition("Progressing") == ("True", "Waiting")
    await world.clock.advance(11)
    await world.look()
    assert world.jobs() == ["opt-1", "opt-2"]
    assert world.profile()["status"]["job"] == {"name": "opt-2", "attempt": 2}


async def lose(world: World, attempt: int) -> None:
    """An attempt is lost; the next look is after the longest pause, the one after that when its Job has been cleaned away."""
    world.end_job(attempt, "Failed")
    await world.look()
    await world.clock.advance(301)


def clean(world: World) -> None:
    """An hour has passed since the Jobs ended."""
    for path, obj in list(world.api.objects.items()):
        if obj["kind"] == "Job" and (obj.get("status") or {}).get("conditions"):
            world.store.forget(world.api.objects.pop(path))


@pytest.mark.parametrize("early", [False, True], ids=["cleaned after the next start", "cleaned before it"])
async def test_lost_attempts_end_although_their_jobs_are_cleaned_away(early: bool) -> None:
    world = World()
    world.put(make_profile())
    await world.look()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert world.jobs() == [f"opt-{attempt}"]
        await lose(world, attempt)
        if early:
            clean(world)
        await world.look()
        clean(world)
    assert world.jobs() == []
    assert world.condition("Failed") == ("True", "JobFailed")
    assert "lost" not in world.profile()["status"]
    await world.clock.advance(10_000)
    await world.look()
    assert world.jobs() == []


async def test_lost_attempts_that_find_something_go_on() -> None:
    world = World()
    world.put(make_profile())
    await world.look()
    for attempt in range(1, 3 * MAX_ATTEMPTS):
        profile = world.profile()
        found = [{"batch": 2**number} for number in range(attempt)]
        world.put({**profile, "status": {**profile["status"], "points": found}})
        await lose(world, attempt)
        assert world.profile()["status"]["lost"]["attempts"] == 1
        await world.look()
        clean(world)
        assert world.jobs() == [f"opt-{attempt + 1}"]


async def test_an_empty_text_asks_for_nothing() -> None:
    world = World()
    world.put(make_profile(measurement={"rerun": ""}))
    for _ in range(3):
        await world.look()
    assert world.jobs() == ["opt-1"]
    assert world.condition("Progressing") == ("True", "Measuring")
    world.report({"state": "Completed", "rerun": "earlier"})
    world.end_job(1, "Complete")
    await world.look()
    assert world.condition("Complete") == ("True", "Completed")
    assert world.jobs() == ["opt-1"]


async def test_failed_is_final_until_rerun_changes() -> None:
    world = World()
    world.put(make_profile())
    await world.look()
    world.report({"state": "Failed", "reason": "EngineFailed", "message": "unknown argument --foo"})
    world.end_job(1, "Complete")
    await world.look()
    assert world.condition("Failed") == ("True", "EngineFailed")
    await world.clock.advance(10_000)
    await world.look()
    assert world.jobs() == ["opt-1"]
    profile = world.profile()
    world.put({**profile, "spec": {**profile["spec"], "measurement": {"rerun": "once more"}}})
    await world.look()  # removes the old Job
    await world.look()
    assert world.jobs() == ["opt-2"]
    assert world.condition("Failed") == ("False", "Measuring")


def make_service() -> dict[str, Any]:
    return {
        "apiVersion": labels.API_VERSION,
        "kind": "LLMService",
        "metadata": {"name": "opt", "namespace": "team"},
        "spec": {
            "model": {"source": "hf://facebook/opt-1.3b"},
            "engine": {"image": "vllm/vllm-openai:v0.33.0"},
            "accelerator": {"device": "cuda", "product": H100},
            "workload": {"inputTokens": 111, "outputTokens": 292},
        },
    }


async def test_a_measurement_nobody_wants_gives_its_gpu_back_and_goes_on_later() -> None:
    world = World()
    service = world.put(make_service())
    profile = make_profile(key=profile_key(parse_service(service).spec).to_dict())
    profile["metadata"]["labels"] = {labels.MANAGED_BY: labels.PRODUCT}
    world.put(profile)
    await world.look()
    assert world.jobs() == ["opt-1"]
    world.store.forget(service)
    await world.look()
    assert world.jobs() == []
    assert world.condition("Progressing") == ("False", "Waiting")
    world.store.observe({**service, "metadata": {**service["metadata"], "uid": "another"}})
    await world.look()
    assert world.jobs() == ["opt-2"]


@pytest.mark.parametrize(
    ("rerun", "jobs"),
    [
        pytest.param(None, [], id="answered elsewhere"),
        pytest.param("again", ["opt-1"], id="asked for again all the same"),
    ],
)
async def test_what_another_complete_profile_answers_is_not_measured_on(rerun: str | None, jobs: list[str]) -> None:
    world = World()
    service = make_service()
    service["spec"]["profiling"] = {"rerun": rerun} if rerun else {}
    key = profile_key(parse_service(world.put(service)).spec).to_dict()
    profile = make_profile(key=key, measurement={"rerun": rerun} if rerun else {})
    profile["metadata"]["labels"] = {labels.MANAGED_BY: labels.PRODUCT}
    world.put(profile)
    await world.look()
    assert world.jobs() == ["opt-1"]
    complete = {"type": "Complete", "status": "True", "reason": "Imported", "message": "from Git"}
    imported = make_profile("imported", {"conditions": [complete]}, key=key)
    world.put(imported)
    await world.look()
    assert world.jobs() == jobs


async def test_a_job_of_that_name_that_is_not_ours_is_left_alone() -> None:
    world = World()
    world.put(make_profile())
    foreign = world.api.put(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "opt-1", "namespace": "team"}}
    )
    await world.look()
    await world.look()
    assert world.condition("Progressing") == ("True", "NameConflict")
    assert world.api.find("Job", "team", "opt-1") == foreign


async def test_a_job_the_api_refuses_is_said_with_its_words() -> None:
    world = World()
    world.put(make_profile())
    world.api.refuse["POST", "Job"] = {"code": 422, "reason": "Invalid", "message": "spec.template.volumes[0]: wrong"}
    await world.look()
    assert world.condition("Failed") == ("True", "InvalidSpec")
    messages = {each["message"] for each in world.profile()["status"]["conditions"]}
    assert any("volumes[0]: wrong" in message for message in messages)


async def test_a_deleted_profile_is_no_work() -> None:
    world = World()
    await world.look("unknown")
    gone = make_profile()
    gone["metadata"]["deletionTimestamp"] = timestamp(BEGIN)
    world.put(gone)
    await world.look()
    assert world.api.writes() == 0
