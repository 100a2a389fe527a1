"""Who owns what of a BatchProfile's status while it is measured again: operator and profiler on the same API, by server-side apply."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from pack_world import curve
from plane_world import APPLY, MERGE, Client
from story import make_service
from tightship.api import crds
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import profile_key
from tightship.kube.clock import SystemClock
from tightship.manifests.packs import batch_profile
from tightship.profiler.__main__ import kept
from tightship.profiler.report import FIELD_MANAGER, Report
from tightship.reconcile.batchprofile import Observed, beside, decide, read, status
from tightship.sandbox.plane import Plane

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PROFILES = f"/apis/{labels.API_VERSION}/namespaces/default/{api.PLURAL}"


class Shared:
    """One profile on a plane, and its two writers. It is the profiler's sink too: without a token, which this plane would not know."""

    def __init__(self, client: Client, name: str) -> None:
        self.client, self.name = client, name

    async def read(self) -> api.BatchProfile:
        return api.BatchProfile.model_validate(await self.get())

    async def write(self, told: Mapping[str, Any]) -> None:
        await self.apply(told, FIELD_MANAGER)

    async def close(self) -> None:
        """Nothing to let go of between two attempts."""

    async def apply(self, told: Mapping[str, Any], manager: str) -> None:
        """Server-side apply of one writer's part of the status."""
        body = {
            "apiVersion": labels.API_VERSION,
            "kind": api.KIND,
            "metadata": {"name": self.name},
            "status": dict(told),
        }
        query = {"fieldManager": manager, "force": "true"}
        await self.client.good("PATCH", f"{PROFILES}/{self.name}/status", body, APPLY, **query)

    async def get(self) -> dict[str, Any]:
        return await self.client.good("GET", f"{PROFILES}/{self.name}")

    async def ask(self, rerun: str) -> None:
        patch = {"spec": {"measurement": {"rerun": rerun}}}
        await self.client.good("PATCH", f"{PROFILES}/{self.name}", patch, MERGE)

    async def profiler(self, *batches: int, outcome: api.Outcome | None = None) -> None:
        """An attempt that finds some points and then ends, or is stopped."""
        subject = await self.read()
        found = kept(subject)
        assert found is not None
        report = Report(self, found, standing=subject if subject.standing else None)
        report.points |= {batch: api.Point(batch=batch, total_tokens_per_second="1000") for batch in batches}
        report.outcome = outcome or report.outcome
        report.save()
        assert await report.flush(10)
        await report.close()

    async def operator(self, jobs: tuple[Any, ...] = ()) -> None:
        """One look; `jobs` are those for what is asked now."""
        obj = await self.get()
        profile, problems = read(obj)
        assert profile is not None
        outcome = profile.status.outcome
        answers = outcome is not None and profile.spec.measurement.is_answered_by(outcome.rerun)
        seen = Observed(
            obj=obj,
            profile=profile,
            problems=problems,
            outcome=outcome if answers else None,
            jobs=jobs,
            superseded=(),
            pods=(),
            wanted=True,
            busy=0,
            slots=1,
            products=(),
            now=SystemClock().now(),
        )
        await self.apply(status(seen, beside(seen, decide(seen))), labels.STATUS_FIELD_MANAGER)

    async def told(self) -> tuple[list[int], dict[str, Any], str]:
        """The batches that stand, the outcome, and whether the profile is complete."""
        found = (await self.get())["status"]
        conditions = {each["type"]: each["status"] for each in found["conditions"]}
        outcome = {name: value for name, value in found["outcome"].items() if value != []}
        return sorted(point["batch"] for point in found["points"]), outcome, conditions["Complete"]


@pytest.fixture
async def shared() -> AsyncIterator[Shared]:
    service = LLMService.model_validate(make_service())
    made = batch_profile(service, profile_key(service.spec))
    async with Plane(controllers=False) as plane:
        client = Client(plane.url)
        await client.good("POST", DEFINITIONS, crds.definitions()["batchprofiles"])
        await client.good("POST", PROFILES, made)
        yield Shared(client, made["metadata"]["name"])
        await client.close()


def ended(name: str) -> dict[str, Any]:
    condition = {"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"metadata": {"name": name, "annotations": {}}, "status": {"conditions": [condition]}}


async def test_what_stands_is_never_lost_between_two_writers(shared: Shared) -> None:
    first = [point["batch"] for point in curve()]
    await shared.profiler(*first, outcome=api.Outcome(state="Completed", message="T no longer rises"))
    await shared.operator()
    assert await shared.told() == (first, {"state": "Completed", "message": "T no longer rises"}, "True")

    await shared.ask("2")
    await shared.operator()
    await shared.profiler(1, 2)  # and its Job breaks
    batches, outcome, complete = await shared.told()
    assert (batches, outcome["state"], complete) == (first, "Completed", "True")
    assert [point["batch"] for point in (await shared.get())["status"]["rerun"]["points"]] == [1, 2]
    for _ in range(2):
        await shared.operator((ended(f"{shared.name}-2"),))
        batches, outcome, complete = await shared.told()
        assert (batches, outcome["reason"], outcome["rerun"], complete) == (first, "JobFailed", "2", "True")

    await shared.ask("3")
    await shared.operator()
    await shared.profiler(4)
    await shared.operator()
    batches, outcome, complete = await shared.told()
    # The operator's word is taken back, so that the operator doesn't write it over the end.
    assert (batches, outcome["reason"], complete) == (first, "Completed", "True")
    assert [point["batch"] for point in (await shared.get())["status"]["rerun"]["points"]] == [4]

    await shared.profiler(8, outcome=api.Outcome(state="Failed", reason="EngineFailed", message="no", rerun="3"))
    await shared.operator()
    batches, outcome, complete = await shared.told()
    assert (batches, outcome["state"], outcome["rerun"], complete) == (first, "Completed", "3", "True")
    assert "rerun" not in (await shared.get())["status"]

    await shared.ask("4")
    await shared.operator()
    await shared.profiler(16, 32)
    await shared.profiler(64, outcome=api.Outcome(state="Completed", rerun="4"))
    await shared.operator()
    assert await shared.told() == ([16, 32, 64], {"state": "Completed", "rerun": "4"}, "True")
    assert "rerun" not in (await shared.get())["status"]
