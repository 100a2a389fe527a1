"""Writing: never over what isn't ours, nothing when nothing changed, and the cache knows at once."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from fake_api import FakeApi, FakeClock
from tightship.api.v1alpha1 import labels
from tightship.kube.cluster import Cluster, check_ours
from tightship.kube.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    NameConflict,
    NamespaceTerminating,
    NotFound,
    NotServed,
    OutlivedOwner,
    Unavailable,
    Unreachable,
    from_response,
)
from tightship.kube.kinds import KINDS, Ref
from tightship.kube.store import Store, lean

OWNER = {"apiVersion": labels.API_VERSION, "kind": "LLMService", "name": "opt", "uid": "owner-1", "controller": True}


def make_service(port: int = 80, owner: dict[str, Any] | None = OWNER, name: str = "opt") -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "a", "labels": labels.common(name, labels.COMPONENT_SERVICE)}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": port}]}}


def make_role() -> dict[str, Any]:
    metadata = {"name": "r", "namespace": "a", "labels": labels.common("r", labels.COMPONENT_HOLDER)}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": []}


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cluster(api: FakeApi, store: Store, clock: FakeClock) -> Cluster:
    return Cluster(api, store, clock=clock)


async def test_applying_twice_writes_once(cluster: Cluster, api: FakeApi, store: Store) -> None:
    first = await cluster.apply(make_service())
    before = api.requests.total()
    second = await cluster.apply(make_service())
    assert api.requests.total() == before
    assert second == first
    assert store.get("Service", "a", "opt") == first


async def test_what_is_kept_of_an_object_is_without_its_managed_fields(
    cluster: Cluster, api: FakeApi, store: Store
) -> None:
    made = make_service()
    made["metadata"]["managedFields"] = [{"manager": "kubectl", "operation": "Update"}]
    found = api.put(made)
    await cluster.get(Ref.of(found))
    assert "managedFields" not in store.get("Service", "a", "opt")["metadata"]  # type: ignore[index]
    (listed,) = (await cluster.list("Service")).items
    assert "managedFields" not in listed["metadata"]
    assert "managedFields" in api.objects[KINDS["Service"].path("a", "opt")]["metadata"]


def test_objects_that_are_kept_share_their_strings() -> None:
    text = json.dumps(make_service() | {"spec": {"words": ["a word", "m" * 200]}})
    one, other = lean(json.loads(text)), lean(json.loads(text))
    assert one == other == json.loads(text)
    assert one["metadata"]["name"] is other["metadata"]["name"]
    assert one["spec"]["words"][0] is other["spec"]["words"][0]
    assert [id(key) for key in one] == [id(key) for key in other]


async def test_what_the_server_serves_is_asked_of_its_discovery(cluster: Cluster, api: FakeApi) -> None:
    assert await cluster.serves("PodDisruptionBudget")
    assert await cluster.serves("Pod")
    api.lacks.add("policy/v1")
    assert not await cluster.serves("PodDisruptionBudget")
    api.broken = True
    with pytest.raises(Unreachable):
        await cluster.serves("PodDisruptionBudget")


async def test_a_changed_wish_is_written(cluster: Cluster, api: FakeApi) -> None:
    await cluster.apply(make_service(80))
    applied = await cluster.apply(make_service(81))
    assert applied["spec"]["ports"] == [{"port": 81}]


async def test_a_field_that_somebody_else_changed_is_written_again(
    cluster: Cluster, api: FakeApi, store: Store
) -> None:
    made = await cluster.apply(make_service())
    made["spec"]["ports"] = [{"port": 99}]
    store.observe(api.put(made))
    healed = await cluster.apply(make_service())
    assert healed["spec"]["ports"] == [{"port": 80}]


async def test_what_others_add_beside_our_fields_is_no_reason_to_write(
    cluster: Cluster, api: FakeApi, store: Store
) -> None:
    made = await cluster.apply(make_service())
    made["spec"]["clusterIP"] = "10.96.0.7"
    made["status"] = {"loadBalancer": {}}
    store.observe(api.put(made))
    before = api.requests.total()
    await cluster.apply(make_service())
    assert api.requests.total() == before


async def test_after_a_restart_one_write_settles_the_doubt_and_changes_nothing(api: FakeApi, store: Store) -> None:
    made = await Cluster(api, store).apply(make_service())
    again = await Cluster(api, store).apply(make_service())
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


@pytest.mark.parametrize("watched", [True, False], ids=["seen", "unseen"])
@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (None, "nothing of Tightship's controls it"),
        ({**OWNER, "kind": "Deployment", "name": "web", "uid": "x"}, "controlled by Deployment web"),
    ],
)
async def test_what_is_not_ours_is_never_applied_over(
    api: FakeApi, store: Store, owner: dict[str, Any] | None, words: str, watched: bool
) -> None:
    foreign = make_service(7, owner)
    del foreign["metadata"]["labels"]
    theirs = api.put(foreign)
    if watched:
        store.observe(theirs)
    with pytest.raises(NameConflict, match=words):
        await Cluster(api, store).apply(make_service())
    assert api.writes() == 0
    assert api.find("Service", "a", "opt") == theirs


async def test_a_name_taken_behind_the_caches_back_is_noticed_by_the_write(
    cluster: Cluster, api: FakeApi, store: Store
) -> None:
    ours = await cluster.apply(make_service())
    del api.objects["/api/v1/namespaces/a/services/opt"]
    foreign = make_service(7, None)
    foreign["metadata"].pop("labels")
    theirs = api.put(foreign)
    assert store.get("Service", "a", "opt") == ours
    with pytest.raises(Conflict):
        await cluster.apply(make_service(81))
    assert api.find("Service", "a", "opt") == theirs


@pytest.mark.parametrize(
    ("live_owner", "carried", "expected"),
    [
        (OWNER, {}, None),
        ({**OWNER, "uid": "earlier"}, {}, OutlivedOwner),
        ({**OWNER, "name": "other", "uid": "other"}, {}, NameConflict),
        (None, {labels.MANAGED_BY: labels.PRODUCT}, NameConflict),
    ],
)
def test_whose_an_object_is(
    live_owner: dict[str, Any] | None, carried: dict[str, str], expected: type[Exception] | None
) -> None:
    live = make_service(80, live_owner)
    live["metadata"]["labels"] = carried
    if expected is None:
        check_ours(make_service(), live)
    else:
        with pytest.raises(expected):
            check_ours(make_service(), live)


def test_unowned_kinds_are_told_by_the_managed_by_label() -> None:
    wanted = make_service(80, None)
    check_ours(wanted, wanted)
    bare = copy.deepcopy(wanted)
    del bare["metadata"]["labels"]
    with pytest.raises(NameConflict):
        check_ours(wanted, bare)


async def test_kinds_that_are_not_watched_are_looked_at_again_after_a_while(
    cluster: Cluster, api: FakeApi, clock: FakeClock
) -> None:
    await cluster.apply(make_role())
    before = api.requests.total()
    await cluster.apply(make_role())
    assert api.requests.total() == before
    api.objects.clear()
    await clock.advance(600)
    await cluster.apply(make_role())
    assert api.find("Role", "a", "r") is not None


async def test_status_is_written_once_and_apart_from_the_rest(cluster: Cluster, api: FakeApi, store: Store) -> None:
    profile = api.put(
        {"apiVersion": labels.API_VERSION, "kind": "BatchProfile", "metadata": {"name": "p", "namespace": "a"}}
    )
    store.observe(profile)
    body = {
        **profile,
        "metadata": {"name": "p", "namespace": "a", "uid": profile["metadata"]["uid"]},
        "status": {"phase": "x"},
    }
    await cluster.apply_status(body)
    assert api.queries[-1] == {"fieldManager": "tightship-status", "force": "true"}
    before = api.requests.total()
    await cluster.apply_status(body)
    assert api.requests.total() == before
    with pytest.raises(Conflict):
        await cluster.apply_status(
            {**body, "metadata": {**body["metadata"], "uid": "earlier"}, "status": {"phase": "y"}}
        )


async def test_deleting(cluster: Cluster, api: FakeApi, store: Store) -> None:
    made = await cluster.apply(make_service())
    with pytest.raises(Conflict):
        await cluster.delete(Ref.of(made), uid="another")
    assert store.get("Service", "a", "opt") is not None
    await cluster.delete(Ref.of(made), uid=made["metadata"]["uid"])
    assert store.get("Service", "a", "opt") is None
    await cluster.delete(Ref.of(made))  # gone already: no error


async def test_replacing_needs_the_version_that_was_read(cluster: Cluster, api: FakeApi) -> None:
    made = await cluster.create(make_service())
    await cluster.replace({**made, "spec": {"ports": []}})
    with pytest.raises(Conflict):
        await cluster.replace({**made, "spec": {"ports": [{"port": 1}]}})
    with pytest.raises(ValueError, match="resourceVersion"):
        await cluster.replace(make_service())
    with pytest.raises(AlreadyExists):
        await cluster.create(make_service())


async def test_a_server_that_does_not_know_the_kind_yet_says_nothing_of_its_objects(
    api: FakeApi, store: Store, cluster: Cluster
) -> None:
    """Else what is to be deleted would count as gone, though it is there again as soon as the server has read its CRDs."""
    await cluster.create(make_service())
    api.refuse["DELETE", "Service"] = {"code": 404, "message": "404 page not found"}
    with pytest.raises(Unavailable):
        await cluster.delete(Ref("Service", "a", "opt"))
    assert store.get("Service", "a", "opt") is not None


async def test_every_request_is_counted_also_those_without_an_answer(api: FakeApi, store: Store) -> None:
    counted: list[tuple[str, str, int]] = []
    cluster = Cluster(api, store, on_request=lambda verb, kind, status, seconds: counted.append((verb, kind, status)))
    await cluster.create(make_service())
    api.broken = True
    with pytest.raises(Unreachable):
        await cluster.get(Ref("Service", "a", "opt"))
    assert counted == [("create", "Service", 201), ("get", "Service", 0)]


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, {"reason": "NotFound"}, NotFound),
        (404, {"message": "404 page not found"}, NotServed),
        (409, {"reason": "AlreadyExists"}, AlreadyExists),
        (409, {"reason": "Conflict"}, Conflict),
        (422, {"reason": "Invalid"}, Invalid),
        (422, {"details": {"causes": [{"field": "metadata.uid"}]}}, Conflict),
        (403, {"reason": "Forbidden"}, Forbidden),
        (403, {"details": {"causes": [{"reason": "NamespaceTerminating"}]}}, NamespaceTerminating),
        (401, {}, Forbidden),
        (429, {}, Unavailable),
        (500, {}, Unavailable),
        (500, {"message": "failed to create typed patch object: .spec.x: field not declared in schema"}, Invalid),
        (503, {"message": "<html>"}, Unavailable),
    ],
)
def test_failures_by_status(status: int, body: dict[str, Any], expected: type[Exception]) -> None:
    error = from_response("get Pod a/p", status, body)
    assert type(error) is expected
    assert "get Pod a/p" in str(error)
    assert str(status) in str(error)
