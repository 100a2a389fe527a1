"""The plane's API over HTTP: verbs, patches, apply, watches, custom resources, and its refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from plane_world import (
    APPLY,
    JSON_PATCH,
    MERGE,
    STRATEGIC,
    WIDGETS,
    Client,
    make_pod,
    make_set,
    make_template,
    make_widget,
)
from tightship.sandbox.plane import Plane
from tightship.sandbox.plane.values import canonical_quantity, dig

MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
THINGS = "/apis/example.dev/v1/namespaces/default/widgets"


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with Plane(controllers=False) as made:
        yield made


@pytest.fixture
async def api(plane: Plane) -> AsyncIterator[Client]:
    client = Client(plane.url)
    await client.good("POST", CRDS, WIDGETS)
    yield client
    await client.close()


def config(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def deployment(**spec: Any) -> dict[str, Any]:
    body = {"selector": {"matchLabels": {"app": "d"}}, "template": make_template("d"), **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": body}


# Verbs


async def test_life_of_an_object(api: Client) -> None:
    made = await api.good("POST", MAPS, config("c", a="1"))
    assert made["metadata"]["uid"]
    assert made["metadata"]["creationTimestamp"]
    assert (await api("POST", MAPS, config("c")))[1]["reason"] == "AlreadyExists"
    read = await api.good("GET", f"{MAPS}/c")
    assert read == made
    changed = await api.good("PUT", f"{MAPS}/c", {**read, "data": {"a": "2"}})
    assert changed["metadata"]["resourceVersion"] != read["metadata"]["resourceVersion"]
    code, stale = await api("PUT", f"{MAPS}/c", {**read, "data": {"a": "3"}})
    assert (code, stale["reason"]) == (409, "Conflict")
    assert stale["message"] == (
        'Operation cannot be fulfilled on configmaps "c": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    gone = await api.good("DELETE", f"{MAPS}/c")
    assert gone["status"] == "Success"
    code, missing = await api("GET", f"{MAPS}/c")
    assert (code, missing["message"]) == (404, 'configmaps "c" not found')


async def test_generated_names_and_dry_runs(api: Client) -> None:
    made = await api.good("POST", MAPS, {"metadata": {"generateName": "x-"}})
    assert made["metadata"]["name"].startswith("x-")
    assert len(made["metadata"]["name"]) == 7
    await api.good("POST", MAPS, config("dry"), dryRun="All")
    assert (await api("GET", f"{MAPS}/dry"))[0] == 404


async def test_a_write_that_changes_nothing_keeps_the_version(api: Client) -> None:
    made = await api.good("POST", MAPS, config("c", a="1"))
    same = await api.good("PATCH", f"{MAPS}/c", {"data": {"a": "1"}}, MERGE)
    assert same["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


async def test_finalizers_hold_an_object(api: Client) -> None:
    body = config("c")
    body["metadata"]["finalizers"] = ["example.dev/hold"]
    await api.good("POST", MAPS, body)
    held = await api.good("DELETE", f"{MAPS}/c")
    assert held["metadata"]["deletionTimestamp"]
    await api.good("PATCH", f"{MAPS}/c", {"metadata": {"finalizers": None}}, MERGE)
    assert (await api("GET", f"{MAPS}/c"))[0] == 404


async def test_preconditions_of_a_deletion(api: Client) -> None:
    await api.good("POST", MAPS, config("c"))
    code, answer = await api("DELETE", f"{MAPS}/c", {"preconditions": {"uid": "other"}})
    assert (code, answer["reason"]) == (409, "Conflict")


async def test_bound_pods_leave_in_two_steps(api: Client) -> None:
    await api.good("POST", PODS, {**make_pod("p"), "spec": {**make_pod("p")["spec"], "nodeName": "n"}})
    first = await api.good("DELETE", f"{PODS}/p")
    assert first["metadata"]["deletionGracePeriodSeconds"] == 30
    assert (await api.good("GET", f"{PODS}/p"))["metadata"]["deletionTimestamp"]
    await api.good("DELETE", f"{PODS}/p", gracePeriodSeconds="0")
    assert (await api("GET", f"{PODS}/p"))[0] == 404
    await api.good("POST", PODS, make_pod("q"))
    await api.good("DELETE", f"{PODS}/q")
    assert (await api("GET", f"{PODS}/q"))[0] == 404


async def test_lists_select_and_page(api: Client) -> None:
    for index in range(5):
        body = config(f"c{index}")
        body["metadata"]["labels"] = {"parity": "even" if index % 2 == 0 else "odd"}
        await api.good("POST", MAPS, body)

    async def names(**query: str) -> list[str]:
        page = await api.good("GET", MAPS, **query)
        return [item["metadata"]["name"] for item in page["items"] if item["metadata"]["name"].startswith("c")]

    assert await names(labelSelector="parity=even") == ["c0", "c2", "c4"]
    assert await names(labelSelector="parity in (odd)") == ["c1", "c3"]
    assert await names(labelSelector="parity!=odd,parity") == ["c0", "c2", "c4"]
    assert await names(fieldSelector="metadata.name=c3") == ["c3"]
    assert (await api("GET", MAPS, fieldSelector="data.x=1"))[0] == 400
    first = await api.good("GET", MAPS, limit="2", labelSelector="parity")
    assert first["metadata"]["remainingItemCount"] == 3
    rest = await api.good(
        "GET", MAPS, **{"limit": "9", "labelSelector": "parity", "continue": first["metadata"]["continue"]}
    )
    assert [item["metadata"]["name"] for item in first["items"] + rest["items"]] == ["c0", "c1", "c2", "c3", "c4"]
    await api.good("DELETE", MAPS, labelSelector="parity=odd")
    assert await names(labelSelector="parity") == ["c0", "c2", "c4"]


async def test_status_endpoint_and_generation(api: Client) -> None:
    made = await api.good("POST", THINGS, {**make_widget(), "status": {"replicas": 9}})
    assert "status" not in made
    assert made["metadata"]["generation"] == 1
    labelled = await api.good(
        "PATCH", f"{THINGS}/a", {"metadata": {"labels": {"x": "y"}}, "status": {"replicas": 9}}, MERGE
    )
    assert "status" not in labelled
    assert labelled["metadata"]["generation"] == 1
    reported = await api.good("PATCH", f"{THINGS}/a/status", {"spec": {"size": 5}, "status": {"replicas": 2}}, MERGE)
    assert reported["status"] == {"replicas": 2}
    assert reported["spec"]["size"] == 3
    assert reported["metadata"]["generation"] == 1
    grown = await api.good("PATCH", f"{THINGS}/a", {"spec": {"size": 5}}, MERGE)
    assert grown["metadata"]["generation"] == 2
    assert grown["status"] == {"replicas": 2}


async def test_scale_of_a_custom_resource(api: Client) -> None:
    await api.good("POST", THINGS, make_widget())
    await api.good("PATCH", f"{THINGS}/a/status", {"status": {"replicas": 1, "selector": "app=a"}}, MERGE)
    scale = await api.good("GET", f"{THINGS}/a/scale")
    assert (scale["kind"], scale["spec"], scale["status"]) == (
        "Scale",
        {"replicas": 1},
        {"replicas": 1, "selector": "app=a"},
    )
    scale["spec"]["replicas"] = 4
    assert (await api.good("PUT", f"{THINGS}/a/scale", scale))["spec"]["replicas"] == 4
    assert (await api.good("GET", f"{THINGS}/a"))["spec"]["replicas"] == 4
    code, answer = await api("PATCH", f"{THINGS}/a/scale", {"spec": {"replicas": -1}}, MERGE)
    assert code == 422
    assert "greater than or equal to 0" in answer["message"]


# Patches


@pytest.mark.parametrize(
    ("media", "patch", "expected"),
    [
        (MERGE, {"data": {"a": None, "b": "2"}}, {"b": "2", "k": "v"}),
        (STRATEGIC, {"data": {"$patch": "replace", "z": "1"}}, {"z": "1"}),
        (
            JSON_PATCH,
            [{"op": "add", "path": "/data/x", "value": "1"}, {"op": "remove", "path": "/data/a"}],
            {"k": "v", "x": "1"},
        ),
        (
            JSON_PATCH,
            [{"op": "test", "path": "/data/a", "value": "1"}, {"op": "move", "from": "/data/a", "path": "/data/c"}],
            {"k": "v", "c": "1"},
        ),
    ],
)
async def test_patches(api: Client, media: str, patch: Any, expected: dict[str, str]) -> None:
    await api.good("POST", MAPS, config("c", a="1", k="v"))
    assert (await api.good("PATCH", f"{MAPS}/c", patch, media))["data"] == expected


async def test_json_patch_that_does_not_apply(api: Client) -> None:
    await api.good("POST", MAPS, config("c", a="1"))
    code, _ = await api("PATCH", f"{MAPS}/c", [{"op": "test", "path": "/data/a", "value": "9"}], JSON_PATCH)
    assert code == 422


async def test_strategic_patch_merges_lists_by_key(api: Client) -> None:
    body = deployment()
    body["spec"]["template"]["spec"]["containers"][0]["env"] = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "2"},
    ]
    await api.good("POST", DEPLOYMENTS, body)
    environment = [{"name": "B", "$patch": "delete"}, {"name": "C", "value": "3"}]
    containers = [{"name": "main", "env": environment}, {"name": "side", "image": "side:1"}]
    patch = {"spec": {"template": {"spec": {"containers": containers}}}}
    changed = await api.good("PATCH", f"{DEPLOYMENTS}/d", patch, STRATEGIC)
    main, side = changed["spec"]["template"]["spec"]["containers"]
    assert (main["name"], side["name"]) == ("main", "side")
    assert main["image"] == "engine:1"
    assert [entry["name"] for entry in main["env"]] == ["A", "C"]
    assert (await api("PATCH", f"{THINGS}/a", {}, STRATEGIC))[0] in (404, 415)


# Server-side apply


async def test_apply_creates_and_repeats_without_a_trace(api: Client) -> None:
    body = deployment(replicas=2)
    code, first = await api("PATCH", f"{DEPLOYMENTS}/d", body, APPLY, fieldManager="tightship")
    assert code == 201
    owner = first["metadata"]["managedFields"]
    assert [(entry["manager"], entry["operation"]) for entry in owner] == [("tightship", "Apply")]
    assert owner[0]["fieldsV1"]["f:spec"]["f:template"]["f:spec"]["f:containers"]['k:{"name":"main"}']["f:ports"] == {
        'k:{"containerPort":8000,"protocol":"TCP"}': {".": {}, "f:containerPort": {}, "f:name": {}}
    }
    code, second = await api("PATCH", f"{DEPLOYMENTS}/d", body, APPLY, fieldManager="tightship")
    assert (code, second) == (200, first)


async def test_apply_conflicts_name_manager_and_field(api: Client) -> None:
    await api.good("PATCH", f"{DEPLOYMENTS}/d", deployment(replicas=2), APPLY, fieldManager="one")
    code, answer = await api("PATCH", f"{DEPLOYMENTS}/d", deployment(replicas=3), APPLY, fieldManager="two")
    assert (code, answer["reason"]) == (409, "Conflict")
    assert answer["message"] == 'Apply failed with 1 conflict: conflict with "one": .spec.replicas'
    assert answer["details"]["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "one"', "field": ".spec.replicas"}
    ]
    forced = await api.good(
        "PATCH", f"{DEPLOYMENTS}/d", deployment(replicas=3), APPLY, fieldManager="two", force="true"
    )
    assert forced["spec"]["replicas"] == 3
    fields = {entry["manager"]: entry["fieldsV1"]["f:spec"] for entry in forced["metadata"]["managedFields"]}
    assert "f:replicas" not in fields["one"]
    assert "f:replicas" in fields["two"]
    # The same value is no conflict: both own it then.
    await api.good("PATCH", f"{DEPLOYMENTS}/d", deployment(replicas=3), APPLY, fieldManager="one")


async def test_apply_conflicts_with_an_updater(api: Client) -> None:
    await api.good("PATCH", f"{DEPLOYMENTS}/d", deployment(replicas=2), APPLY, fieldManager="one")
    await api.good("PATCH", f"{DEPLOYMENTS}/d", {"spec": {"replicas": 5}}, MERGE, fieldManager="scaler")
    code, answer = await api("PATCH", f"{DEPLOYMENTS}/d", deployment(replicas=2), APPLY, fieldManager="one")
    assert code == 409
    assert answer["message"] == 'Apply failed with 1 conflict: conflict with "scaler" using apps/v1: .spec.replicas'


async def test_apply_removes_what_it_no_longer_says(api: Client) -> None:
    full = config("c", a="1", b="2")
    full["metadata"]["labels"] = {"x": "y"}
    await api.good("PATCH", f"{MAPS}/c", full, APPLY, fieldManager="one")
    await api.good("PATCH", f"{MAPS}/c", {"data": {"k": "v"}}, MERGE, fieldManager="two")
    less = await api.good("PATCH", f"{MAPS}/c", config("c", a="1"), APPLY, fieldManager="one")
    assert less["data"] == {"a": "1", "k": "v"}
    assert "labels" not in less["metadata"]


async def test_apply_merges_keyed_lists_and_replaces_atomic_ones(api: Client) -> None:
    body = deployment()
    body["spec"]["template"]["spec"]["tolerations"] = [{"key": "a", "operator": "Exists"}]
    await api.good("PATCH", f"{DEPLOYMENTS}/d", body, APPLY, fieldManager="one")
    side = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}}
    side["spec"] = {"template": {"spec": {"containers": [{"name": "side", "image": "side:1"}]}}}
    both = await api.good("PATCH", f"{DEPLOYMENTS}/d", side, APPLY, fieldManager="two")
    assert [entry["name"] for entry in both["spec"]["template"]["spec"]["containers"]] == ["main", "side"]
    body["spec"]["template"]["spec"]["tolerations"] = [{"key": "b", "operator": "Exists"}]
    again = await api.good("PATCH", f"{DEPLOYMENTS}/d", body, APPLY, fieldManager="one")
    spec = again["spec"]["template"]["spec"]
    assert [entry["key"] for entry in spec["tolerations"]] == ["b"]
    assert len(spec["containers"]) == 2
    side["spec"] = {}
    alone = await api.good("PATCH", f"{DEPLOYMENTS}/d", side, APPLY, fieldManager="two")
    assert [entry["name"] for entry in alone["spec"]["template"]["spec"]["containers"]] == ["main"]


async def test_apply_to_status_keeps_other_conditions_and_is_idempotent(api: Client) -> None:
    await api.good("POST", THINGS, make_widget())

    def status(kind: str) -> dict[str, Any]:
        made = make_widget()
        del made["spec"]
        return {**made, "status": {"conditions": [{"type": kind, "status": "True"}]}}

    await api.good("PATCH", f"{THINGS}/a/status", status("Ready"), APPLY, fieldManager="one")
    both = await api.good("PATCH", f"{THINGS}/a/status", status("Complete"), APPLY, fieldManager="two")
    assert [entry["type"] for entry in both["status"]["conditions"]] == ["Ready", "Complete"]
    again = await api.good("PATCH", f"{THINGS}/a/status", status("Complete"), APPLY, fieldManager="two")
    assert again == both
    assert {
        entry.get("subresource") for entry in both["metadata"]["managedFields"] if entry["operation"] == "Apply"
    } == {"status"}
    assert both["metadata"]["generation"] == 1


async def test_apply_needs_a_manager_and_known_fields(api: Client) -> None:
    code, answer = await api("PATCH", f"{MAPS}/c", config("c"), APPLY)
    assert code == 422
    assert "fieldManager: Required value: is required for apply patch" in answer["message"]
    code, answer = await api("PATCH", f"{MAPS}/c", {**config("c"), "dat": {}}, APPLY, fieldManager="one")
    assert code == 500
    assert ".dat: field not declared in schema" in answer["message"]


# Watches


async def test_watch_sends_what_is_and_what_becomes(api: Client) -> None:
    await api.good("POST", MAPS, config("c", a="1"))
    watching = asyncio.ensure_future(api.watch(MAPS, timeoutSeconds="1", fieldSelector="metadata.name=c"))
    await asyncio.sleep(0.2)
    await api.good("PATCH", f"{MAPS}/c", {"data": {"a": "2"}}, MERGE)
    await api.good("DELETE", f"{MAPS}/c")
    assert [event["type"] for event in await watching] == ["ADDED", "MODIFIED", "DELETED"]


async def test_watch_resumes_and_follows_selectors(api: Client) -> None:
    start = (await api.good("GET", MAPS))["metadata"]["resourceVersion"]
    body = config("c")
    await api.good("POST", MAPS, body)
    await api.good("PATCH", f"{MAPS}/c", {"metadata": {"labels": {"on": "yes"}}}, MERGE)
    await api.good("PATCH", f"{MAPS}/c", {"data": {"a": "1"}}, MERGE)
    await api.good("PATCH", f"{MAPS}/c", {"metadata": {"labels": {"on": None}}}, MERGE)
    events = await api.watch(MAPS, resourceVersion=start, timeoutSeconds="1", labelSelector="on=yes")
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]


async def test_watch_list_ends_its_beginning_with_a_bookmark(api: Client) -> None:
    await api.good("POST", MAPS, config("c"))
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    events = await api.watch(MAPS, timeoutSeconds="1", fieldSelector="metadata.name=c", **query)
    assert [event["type"] for event in events] == ["ADDED", "BOOKMARK"]
    assert events[1]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


async def test_watch_from_a_forgotten_version_is_gone(plane: Plane, api: Client) -> None:
    await api.good("POST", MAPS, config("c"))
    plane.store.compact()
    await api.good("POST", MAPS, config("d"))
    code, answer = await api("GET", MAPS, watch="1", resourceVersion="2")
    assert (code, answer["reason"]) == (410, "Expired")


# Custom resources


async def test_custom_resource_defaults_and_pruning(api: Client) -> None:
    made = await api.good("POST", THINGS, make_widget(unknown=1))
    assert made["spec"] == {"size": 3, "color": "red", "replicas": 1}
    code, answer = await api("POST", THINGS, make_widget("b", unknown=1), fieldValidation="Strict")
    assert code == 400
    assert 'strict decoding error: unknown field "spec.unknown"' in answer["message"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"size": 0}, "spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1"),
        ({"size": 11}, "spec.size: Invalid value: 11: spec.size in body should be less than or equal to 10"),
        ({"size": "x"}, 'spec.size: Invalid value: "string": spec.size in body must be of type integer: "string"'),
        ({"size": None}, "spec.size: Required value"),
        ({"color": "blue"}, 'spec.color: Unsupported value: "blue": supported values: "red", "green"'),
        ({"name": "UP"}, "spec.name: Invalid value: \"UP\": spec.name in body should match '^[a-z]+$'"),
        ({"name": "toolong"}, "spec.name: Too long: may not be more than 5 bytes"),
        ({"tags": ["a", "b", "c", "d"]}, "spec.tags: Too many: 4: must have at most 3 items"),
        ({"tags": ["a", "a"]}, 'spec.tags[1]: Duplicate value: "a"'),
        ({"size": 9}, 'spec: Invalid value: "object": big ones are green'),
    ],
)
async def test_custom_resource_refusals(api: Client, spec: dict[str, Any], message: str) -> None:
    body = make_widget(**spec)
    body["spec"] = {key: value for key, value in body["spec"].items() if value is not None}
    code, answer = await api("POST", THINGS, body)
    assert (code, answer["reason"]) == (422, "Invalid")
    assert answer["message"] == f'Widget.example.dev "a" is invalid: {message}'


async def test_transition_rules_run_on_updates_only(api: Client) -> None:
    await api.good("POST", THINGS, make_widget(name="one"))
    await api.good("PATCH", f"{THINGS}/a", {"spec": {"size": 4}}, MERGE)
    code, answer = await api("PATCH", f"{THINGS}/a", {"spec": {"name": "two"}}, MERGE)
    assert code == 422
    assert 'spec.name: Invalid value: "two": name is immutable' in answer["message"]


async def test_definition_comes_and_goes(api: Client) -> None:
    ready = {
        entry["type"]: entry["status"]
        for entry in (await api.good("GET", f"{CRDS}/widgets.example.dev"))["status"]["conditions"]
    }
    assert ready == {"NamesAccepted": "True", "Established": "True"}
    await api.good("POST", THINGS, make_widget())
    await api.good("DELETE", f"{CRDS}/widgets.example.dev")
    assert (await api("GET", THINGS))[0] == 404
    assert (await api("GET", "/apis/example.dev/v1"))[0] == 404


async def test_update_of_a_custom_resource_needs_a_version(api: Client) -> None:
    await api.good("POST", THINGS, make_widget())
    code, answer = await api("PUT", f"{THINGS}/a", make_widget())
    assert code == 422
    assert "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update" in answer["message"]


# Built-in kinds


@pytest.mark.parametrize(
    ("path", "body", "code", "message"),
    [
        (PODS, make_pod("Bad_Name"), 422, "metadata.name: Invalid value"),
        (PODS, {"metadata": {"name": "p"}, "spec": {"containers": []}}, 422, "spec.containers: Required value"),
        (PODS, {"metadata": {"name": "p"}, "spec": {"containers": "x"}}, 400, "cannot unmarshal string"),
        (PODS, make_pod("p", serviceAccountName="ghost"), 403, 'serviceaccount "ghost" not found'),
        ("/api/v1/namespaces/ghost/pods", make_pod("p"), 404, 'namespaces "ghost" not found'),
        (
            DEPLOYMENTS,
            deployment(replicas=-1),
            422,
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
        ),
        (
            DEPLOYMENTS,
            deployment(selector={"matchLabels": {"app": "other"}}),
            422,
            "`selector` does not match template `labels`",
        ),
        (
            "/api/v1/namespaces/default/services",
            {"metadata": {"name": "s"}, "spec": {}},
            422,
            "spec.ports: Required value",
        ),
    ],
)
async def test_refusals_of_built_in_kinds(
    api: Client, path: str, body: dict[str, Any], code: int, message: str
) -> None:
    found, answer = await api("POST", path, body)
    assert found == code
    assert message in answer["message"]


async def test_quantities_are_canonical_and_limits_become_requests(api: Client) -> None:
    pod = make_pod("p")
    pod["spec"]["containers"][0]["resources"] = {"limits": {"cpu": 1, "memory": "1024Mi", "nvidia.com/gpu": "1"}}
    made = await api.good("POST", PODS, pod)
    assert made["spec"]["containers"][0]["resources"]["requests"] == {
        "cpu": "1",
        "memory": "1Gi",
        "nvidia.com/gpu": "1",
    }
    assert made["status"]["qosClass"] == "Guaranteed"


async def test_immutable_parts(api: Client) -> None:
    await api.good("POST", PODS, make_pod("p"))
    assert (await api("PATCH", f"{PODS}/p", {"spec": {"hostname": "x"}}, MERGE))[0] == 422
    await api.good("POST", "/apis/apps/v1/namespaces/default/statefulsets", make_set("s"))
    code, answer = await api(
        "PATCH", "/apis/apps/v1/namespaces/default/statefulsets/s", {"spec": {"serviceName": "x"}}, MERGE
    )
    assert code == 422
    assert "updates to statefulset spec for fields other than" in answer["message"]


async def test_events_of_both_groups_are_the_same(api: Client) -> None:
    body = {
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"},
        "reason": "Because",
        "message": "text",
        "type": "Normal",
    }
    await api.good("POST", "/api/v1/namespaces/default/events", body)
    other = await api.good("GET", "/apis/events.k8s.io/v1/namespaces/default/events/e")
    assert (other["note"], other["regarding"]["name"]) == ("text", "p")
    found = await api.good(
        "GET", "/api/v1/namespaces/default/events", fieldSelector="involvedObject.name=p,reason=Because"
    )
    assert len(found["items"]) == 1
    new = {
        "metadata": {"name": "n"},
        "note": "hello",
        "regarding": body["involvedObject"],
        "action": "A",
        "reason": "R",
        "type": "Normal",
        "eventTime": "2026-01-01T00:00:00.000001Z",
        "reportingController": "t",
        "reportingInstance": "t",
    }
    await api.good("POST", "/apis/events.k8s.io/v1/namespaces/default/events", new)
    assert (await api.good("GET", "/api/v1/namespaces/default/events/n"))["message"] == "hello"


async def test_tokens_name_their_account_and_die_with_it(plane: Plane, api: Client) -> None:
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    await api.good("POST", accounts, {"metadata": {"name": "robot"}})
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    made = await api.good("POST", f"{accounts}/robot/token", request)
    token = dig(made, "status", "token")
    reviews = "/apis/authentication.k8s.io/v1/tokenreviews"
    review = await api.good("POST", reviews, {"spec": {"token": token}})
    assert review["status"]["user"]["username"] == "system:serviceaccount:default:robot"
    await api.good("DELETE", f"{accounts}/robot")
    review = await api.good("POST", reviews, {"spec": {"token": token}})
    assert review["status"]["authenticated"] is False


async def test_proxy_says_what_is_missing(api: Client) -> None:
    await api.good("POST", PODS, make_pod("p"))
    code, answer = await api("GET", f"{PODS}/p/log")
    assert code == 400
    assert "does not have a host assigned" in answer["message"]
    service = {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}}
    await api.good("POST", "/api/v1/namespaces/default/services", service)
    code, answer = await api("GET", "/api/v1/namespaces/default/services/s:80/proxy/x")
    assert (code, answer["message"]) == (503, 'no endpoints available for service "s:80"')


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/apis/none",
        "/apis/apps/v9",
        "/api/v1/ghosts",
        "/api/v1/namespaces/default/ghosts/x",
        "/api/v1/pods/x",
    ],
)
async def test_paths_that_lead_nowhere(api: Client, path: str) -> None:
    code, answer = await api("GET", path)
    assert (code, answer["kind"], answer["reason"]) == (404, "Status", "NotFound")


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("1000m", "1"), ("1500m", "1500m"), ("0.5", "500m"), ("1024Mi", "1Gi"), ("1536Mi", "1536Mi"), ("0.5Gi", "512Mi"),
        ("1000", "1k"), ("1e3", "1k"), (2, "2"), ("0", "0"), ("0Gi", "0"), ("1025", "1025"), ("-2000m", "-2"), ("1n", "1n"),
        ("0.5n", "1n"), ("1.5Ki", "1536"), ("12E", "12E"),
    ],
)  # fmt: skip
def test_a_quantity_is_stored_in_the_form_that_a_real_server_gives_it(written: str | int, stored: str) -> None:
    assert canonical_quantity(written) == stored
