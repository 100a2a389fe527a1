"""Namespaces that refuse the pods of a pack: nothing is half-made, and the server's words reach the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fake_api import FakeApi
from pack_world import World, complete
from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.kube.cluster import Cluster
from tightship.kube.errors import Forbidden, NamespaceTerminating
from tightship.kube.store import Store
from tightship.reconcile import admission, gpupack
from tightship.reconcile.queue import Key

NS, PACK, SYSTEM = "default", "default-opt-0", "tightship-system"
CPU = {"device": "cpu", "cores": 2, "coresPerReplica": 1, "memory": "60Gi"}
POD_SECURITY = 'violates PodSecurity "baseline:latest": hostPath volumes (volume "pack")'
QUOTA = "exceeded quota: few, requested: pods=1, used: pods=1, limited: pods=1"


async def measure(world: World, **changes: Any) -> World:
    """A service with a complete profile, and everything that follows from it."""
    world.put(make_service(**{"replicas": 2, **changes}))
    await world.settle()
    world.change("BatchProfile", NS, world.all("BatchProfile")[0]["metadata"]["name"], complete)
    await world.run()
    return world


def refuse(component: str, words: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda pod: words if pod["metadata"]["labels"][labels.COMPONENT] == component else None


def pods_of(world: World, component: str) -> list[dict[str, Any]]:
    return [pod for pod in world.all("Pod") if pod["metadata"]["labels"][labels.COMPONENT] == component]


def dry_runs(world: World) -> int:
    return world.api.requests["DRYRUN", "Pod"]


async def look_again(world: World, seconds: float = 16) -> None:
    await world.clock.advance(seconds)
    await world.look_at_everything()
    await world.run()


@pytest.mark.parametrize(("component", "namespace"), [("holder", SYSTEM), ("replica", NS)])
async def test_no_gpu_is_taken_where_pods_are_refused_and_all_goes_well_once_they_are_not(
    component: str, namespace: str
) -> None:
    world = World()
    world.api.refuses = refuse(component, POD_SECURITY)
    await measure(world)
    for kind in ("Pod", "StatefulSet", "ServiceAccount", "Role", "RoleBinding"):
        assert world.all(kind) == []
    pack, service = ("GPUPack", "", PACK), ("LLMService", NS, "opt")
    for target in ((*pack, "Held"), (*pack, "Ready"), (*service, "Packed"), (*service, "Ready")):
        status, reason, said = world.condition(*target)
        assert (status, reason) == ("False", "SharingUnavailable")
        assert POD_SECURITY in said
        assert f"kubectl label --overwrite namespace {namespace} pod-security.kubernetes.io/enforce=privileged" in said
    assert world.get("GPUPack", "", PACK)["status"]["phase"] == "Holding"

    before = world.api.writes()
    await look_again(world)
    assert world.api.writes() == before

    world.api.refuses = lambda pod: None
    await look_again(world)
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_core_set_makes_no_statefulset_whose_pods_are_refused() -> None:
    world = World()
    world.api.refuses = refuse("replica", POD_SECURITY)
    await measure(world, accelerator=CPU)
    assert world.all("StatefulSet") == []
    assert world.condition("GPUPack", "", PACK, "ReplicasReady")[:2] == ("False", "SharingUnavailable")
    status, reason, text = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "SharingUnavailable")
    assert POD_SECURITY in text
    world.api.refuses = lambda pod: None
    await look_again(world)
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_pack_at_rest_asks_nothing() -> None:
    world = await measure(World())
    asked, written = dry_runs(world), world.api.writes()
    assert asked == 3  # the holder, a replica before the GPU is taken, a replica of the StatefulSet
    await look_again(world, 60)
    assert (dry_runs(world), world.api.writes()) == (asked, written)
    world.change("LLMService", NS, "opt", lambda obj: obj["spec"].update(replicas=1))
    await world.run()
    assert dry_runs(world) == asked


async def test_a_quota_that_lets_only_some_pods_in_is_quoted_after_a_while() -> None:
    world = World()

    def quota(pod: dict[str, Any]) -> str | None:
        if pod["metadata"]["labels"][labels.COMPONENT] == "replica" and pods_of(world, "replica"):
            return QUOTA
        return None

    world.api.refuses = quota
    await measure(world)
    assert len(pods_of(world, "replica")) == 1
    assert world.condition("GPUPack", "", PACK, "ReplicasReady")[:2] == ("False", "ReplicasStarting")
    asked = dry_runs(world)
    await look_again(world)
    assert dry_runs(world) > asked
    for target in (("GPUPack", "", PACK, "ReplicasReady"), ("LLMService", NS, "opt", "Packed")):
        status, reason, text = world.condition(*target)
        assert (status, reason) == ("False", "SharingUnavailable")
        assert QUOTA in text
        assert "Raise that quota of namespace default" in text
    # One replica is all that may be missing of two.
    assert world.condition("LLMService", NS, "opt", "Available")[0] == "True"
    world.api.refuses = lambda pod: None
    await look_again(world)
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_pack_looks_again_by_itself_while_pods_are_missing() -> None:
    world = await measure(World())
    world.api.refuses = refuse("replica", POD_SECURITY)
    gone = pods_of(world, "replica")[0]
    world.remove("Pod", NS, gone["metadata"]["name"])
    await world.run()
    asked, key = dry_runs(world), Key("GPUPack", "", PACK)
    wait = (await gpupack.reconcile(world.ctx, key)).requeue_after
    assert wait is not None
    assert admission.MISSING_SECONDS < wait + 1 < admission.MISSING_SECONDS + 3
    assert dry_runs(world) == asked
    await world.clock.advance(wait)
    wait = (await gpupack.reconcile(world.ctx, key)).requeue_after
    assert (dry_runs(world), wait) == (asked + 1, world.ctx.settings.retry_seconds)
    assert world.condition("GPUPack", "", PACK, "Ready")[:2] == ("False", "SharingUnavailable")


async def test_a_changed_template_that_is_refused_leaves_what_runs() -> None:
    world = await measure(World())
    made = world.all("StatefulSet")[0]["spec"]["template"]
    world.api.refuses = refuse("replica", "maximum memory usage per Container is 1Gi, but limit is 2Gi")
    world.change(
        "LLMService",
        NS,
        "opt",
        lambda obj: obj["spec"].update(template={"metadata": {"labels": {"team": "a"}}}, replicas=1),
    )
    await world.run()
    assert world.all("StatefulSet")[0]["spec"]["template"] == made
    assert [len(pods_of(world, "replica")), world.all("StatefulSet")[0]["spec"]["replicas"]] == [1, 1]
    status, reason, text = world.condition("LLMService", NS, "opt", "Packed")
    assert (status, reason) == ("False", "SharingUnavailable")
    assert "maximum memory usage" in text
    assert "Change what refuses it in namespace default" in text
    assert world.condition("LLMService", NS, "opt", "Available")[0] == "True"
    world.api.refuses = lambda pod: None
    await look_again(world)
    assert world.all("StatefulSet")[0]["spec"]["template"] != made
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_roll_out_is_not_held_up_by_the_quota_its_own_pods_use_up() -> None:
    world = await measure(World())
    world.api.refuses = lambda pod: QUOTA if len(pods_of(world, "replica")) == 2 else None
    world.change(
        "LLMService", NS, "opt", lambda obj: obj["spec"].update(template={"metadata": {"labels": {"team": "a"}}})
    )
    await world.run(rounds=20)
    assert all(pod["metadata"]["labels"].get("team") == "a" for pod in pods_of(world, "replica"))
    assert world.condition("LLMService", NS, "opt", "Ready")[:2] == ("True", "FullyRealised")


async def test_a_holder_made_anew_is_not_held_up_by_its_own_replicas() -> None:
    world = await measure(World())
    world.api.refuses = refuse("replica", QUOTA)
    world.remove("Pod", SYSTEM, f"holder-{PACK}")
    await world.run()
    assert len(pods_of(world, "holder")) == 1


POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a-0", "namespace": NS}, "spec": {}}


@pytest.mark.parametrize(
    ("code", "reason", "message", "quoted", "advice"),
    [
        (403, "Forbidden", f'pods "a-0" is forbidden: {POD_SECURITY}', True, "enforce=privileged"),
        (403, "Forbidden", f'pods "a-0" is forbidden: {QUOTA}', True, "Raise that quota"),
        (403, "Forbidden", 'pods is forbidden: User "op" cannot create resource "pods"', True, "Grant the operator"),
        (
            400,
            "",
            'admission webhook "v.example" denied the request: no host paths here.',
            True,
            "Change what refuses it",
        ),
        (422, "Invalid", 'Pod "a-0" is invalid: spec.containers: Required value', True, "spec.template"),
        (400, "BadRequest", 'admission webhook "v.example" does not support dry run', False, ""),
        (409, "AlreadyExists", 'pods "a-0" already exists', False, ""),
    ],
)
async def test_what_the_server_says_and_what_to_do(
    code: int, reason: str, message: str, quoted: bool, advice: str
) -> None:
    api = FakeApi()
    api.refuse["POST", "Pod"] = {"kind": "Status", "code": code, "reason": reason, "message": message}
    words = await admission.refusal(Cluster(api, Store()), POD)
    if quoted:
        assert words is not None
        assert words.startswith(message.rstrip("."))
        assert advice in words
    else:
        assert words is None


@pytest.mark.parametrize(
    ("code", "details", "error"),
    [(401, {}, Forbidden), (403, {"causes": [{"reason": "NamespaceTerminating"}]}, NamespaceTerminating)],
)
async def test_what_is_no_word_on_the_pod_is_raised(code: int, details: dict[str, Any], error: type[Exception]) -> None:
    api = FakeApi()
    api.refuse["POST", "Pod"] = {"kind": "Status", "code": code, "message": "no", "details": details}
    with pytest.raises(error):
        await admission.refusal(Cluster(api, Store()), POD)
