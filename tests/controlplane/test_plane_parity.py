"""The embedded plane and the real control plane answer the same requests alike.

One story of requests is told to both: the status, the reason, and what a user wrote must agree, and where the two versions word a
refusal alike, the message too. What one of them only adds (newer defaults, identities, times) is left out of the comparison.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from plane_world import (
    APPLY,
    JSON_PATCH,
    MERGE,
    STRATEGIC,
    WIDGETS,
    eventually,
    make_job,
    make_pod,
    make_set,
    make_template,
    make_widget,
)
from tightship.sandbox.plane import Plane

MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
SERVICES = "/api/v1/namespaces/default/services"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
SETS = "/apis/apps/v1/namespaces/default/statefulsets"
JOBS = "/apis/batch/v1/namespaces/default/jobs"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
THINGS = "/apis/example.dev/v1/namespaces/default/widgets"
ONE, TWO, THREE = ({"fieldManager": name} for name in ("one", "two", "three"))


class Step(NamedTuple):
    """A request; ``text`` says whether the message of a refusal is compared too."""

    method: str
    path: str
    body: Any = None
    media: str = "application/json"
    query: Mapping[str, str] = MappingProxyType({})
    text: bool = True


def a_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def a_deployment(**spec: Any) -> dict[str, Any]:
    body = {"selector": {"matchLabels": {"app": "d"}}, "template": make_template("d"), **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": body}


def a_status(kind: str) -> dict[str, Any]:
    body = make_widget()
    del body["spec"]
    return {**body, "status": {"conditions": [{"type": kind, "status": "True"}]}}


def with_side() -> dict[str, Any]:
    containers = [{"name": "side", "image": "side:1"}]
    return {**a_deployment(), "spec": {"template": {"spec": {"containers": containers}}}}


def with_probe() -> dict[str, Any]:
    body = a_deployment(replicas=2)
    probe = {"httpGet": {"path": "/health", "port": "http"}}
    body["spec"]["template"]["spec"]["containers"][0]["livenessProbe"] = probe
    return body


def a_container(**fields: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a", "image": "x", **fields}]}}


def environment(*entries: dict[str, str]) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"containers": [{"name": "main", "env": list(entries)}]}}}}


STORY = [
    Step("POST", MAPS, a_map("c", a="1")),
    Step("POST", MAPS, a_map("c")),
    Step("GET", f"{MAPS}/nope"),
    Step("PUT", f"{MAPS}/c", {**a_map("c"), "metadata": {"name": "c", "resourceVersion": "1"}}),
    Step("PUT", f"{MAPS}/c", a_map("other")),
    Step("PATCH", f"{MAPS}/c", {"data": {"a": None, "b": "2"}}, MERGE),
    Step("PATCH", f"{MAPS}/c", [{"op": "test", "path": "/data/b", "value": "9"}], JSON_PATCH, text=False),
    Step("PATCH", f"{MAPS}/c", [{"op": "add", "path": "/data/x~1y", "value": "9"}], JSON_PATCH),
    Step("PATCH", f"{MAPS}/c", {}, "text/plain", text=False),
    Step("DELETE", f"{MAPS}/c", {"preconditions": {"uid": "x"}}, text=False),
    Step("PATCH", f"{MAPS}/m", a_map("m", a="1", b="2"), APPLY, ONE),
    Step("PATCH", f"{MAPS}/m", {"data": {"k": "v"}}, MERGE, TWO),
    Step("PATCH", f"{MAPS}/m", a_map("m", a="1"), APPLY, ONE),
    Step("POST", PODS, make_pod("Bad_Name")),
    Step("POST", PODS, {"metadata": {"name": "p"}, "spec": {"containers": []}}),
    Step("POST", PODS, {"metadata": {"name": "p"}, "spec": {"containers": "x"}}, text=False),
    Step("POST", PODS, a_container(image="")),
    Step("POST", PODS, a_container(volumeMounts=[{"name": "v", "mountPath": "/v"}])),
    Step("POST", PODS, a_container(resources={"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}), text=False),
    Step("POST", PODS, a_container(resources={"requests": {"nvidia.com/gpu": "2"}})),
    Step("POST", PODS, a_container(resources={"limits": {"cpu": "x1"}}), text=False),
    Step("POST", "/api/v1/namespaces/ghost/pods", make_pod("p")),
    Step("POST", PODS, make_pod("p", gpus=1)),
    Step("PATCH", f"{PODS}/p", {"spec": {"hostname": "x"}}, MERGE, text=False),
    Step("POST", f"{PODS}/p/binding", {"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n"}}),
    Step("POST", f"{PODS}/p/binding", {"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n"}}),
    Step("DELETE", f"{PODS}/p"),
    Step("GET", f"{PODS}/p"),
    Step("DELETE", f"{PODS}/p", query={"gracePeriodSeconds": "0"}),
    Step("GET", f"{PODS}/p"),
    Step("POST", DEPLOYMENTS, a_deployment(replicas=-1)),
    Step("POST", DEPLOYMENTS, a_deployment(selector={"matchLabels": {"app": "o"}}), text=False),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(replicas=2), APPLY, ONE),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(replicas=2), APPLY, ONE),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(replicas=3), APPLY, TWO),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(replicas=3), APPLY, {**TWO, "force": "true"}),
    Step("PATCH", f"{DEPLOYMENTS}/d", {"spec": {"replicas": 5}}, MERGE, {"fieldManager": "scaler"}),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(replicas=2), APPLY, ONE),
    Step("PATCH", f"{DEPLOYMENTS}/d", with_side(), APPLY, THREE),
    Step("PATCH", f"{DEPLOYMENTS}/d", {**a_deployment(), "spec": {}}, APPLY, THREE),
    Step("PATCH", f"{DEPLOYMENTS}/d", with_probe(), APPLY, {**ONE, "force": "true"}),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(replicas=2), APPLY, {**ONE, "force": "true"}, text=False),
    Step("PATCH", f"{DEPLOYMENTS}/d", environment({"name": "A", "value": "1"}, {"name": "B", "value": "2"}), STRATEGIC),
    Step("PATCH", f"{DEPLOYMENTS}/d", environment({"name": "A", "$patch": "delete"}), STRATEGIC),
    Step("PATCH", f"{DEPLOYMENTS}/d", a_deployment(), APPLY),
    Step("PATCH", f"{DEPLOYMENTS}/d", {**a_deployment(), "foo": 1}, APPLY, ONE, text=False),
    Step("GET", f"{DEPLOYMENTS}/d"),
    Step("POST", SETS, make_set("s")),
    Step("PATCH", f"{SETS}/s", {"spec": {"serviceName": "x"}}, MERGE, text=False),
    Step("POST", JOBS, make_job("j")),
    Step("PATCH", f"{JOBS}/j", {"spec": {"template": {"spec": {"restartPolicy": "OnFailure"}}}}, MERGE, text=False),
    Step("POST", SERVICES, {"metadata": {"name": "s"}, "spec": {}}),
    Step("POST", SERVICES, {"metadata": {"name": "s"}, "spec": {"selector": {"a": "b"}, "ports": [{"port": 80}]}}),
    Step("POST", THINGS, make_widget()),
    Step("POST", THINGS, make_widget("b", size=0)),
    Step("POST", THINGS, make_widget("b", size="x")),
    Step("POST", THINGS, make_widget("b", color="blue")),
    Step("POST", THINGS, make_widget("b", name="UP")),
    Step("POST", THINGS, make_widget("b", name="toolong"), text=False),
    Step("POST", THINGS, make_widget("b", tags=["a", "a"])),
    Step("POST", THINGS, make_widget("b", tags=["a", "b", "c", "d"]), text=False),
    Step("POST", THINGS, {**make_widget("b"), "spec": {}}),
    Step("POST", THINGS, {**make_widget("b"), "apiVersion": "example.dev/v2"}),
    Step("PUT", f"{THINGS}/a", make_widget()),
    Step("PATCH", f"{THINGS}/a", {"spec": {"size": 4}}, STRATEGIC, text=False),
    Step("PATCH", f"{THINGS}/a", {"spec": {"size": 4}, "status": {"replicas": 9}}, MERGE),
    Step("PATCH", f"{THINGS}/a/status", {"spec": {"size": 5}, "status": {"replicas": 2}}, MERGE),
    Step("PATCH", f"{THINGS}/a/status", a_status("Ready"), APPLY, ONE),
    Step("PATCH", f"{THINGS}/a/status", a_status("Complete"), APPLY, TWO),
    Step("PATCH", f"{THINGS}/a/status", a_status("Complete"), APPLY, TWO),
    Step("PATCH", f"{THINGS}/a/scale", {"spec": {"replicas": -1}}, MERGE, text=False),
    Step("PATCH", f"{THINGS}/a/scale", {"spec": {"replicas": 3}}, MERGE),
    Step("PATCH", f"{THINGS}/c", make_widget("c", tags=["x", "y"]), APPLY, ONE),
    Step("PATCH", f"{THINGS}/c", make_widget("c", tags=["z"]), APPLY, TWO),
    Step("PATCH", f"{THINGS}/c", make_widget("c", tags=["y"]), APPLY, ONE),
    Step("PATCH", f"{THINGS}/c", {"spec": {"size": 8}}, MERGE, {"fieldManager": "updater"}),
    Step("PATCH", f"{THINGS}/c", make_widget("c"), APPLY, ONE),
    Step("DELETE", f"{THINGS}/a"),
    Step("GET", f"{THINGS}/a"),
    Step("GET", MAPS, query={"fieldSelector": "data.x=1"}, text=False),
    Step("GET", MAPS, query={"labelSelector": "a in ("}, text=False),
    Step("GET", "/api/v1/ghosts", text=False),
]


def essence(answer: Any, text: bool) -> dict[str, Any]:
    """What must agree between the two."""
    if answer.get("kind") == "Status":
        kept = {key: answer.get(key) for key in ("status", "reason", "code")}
        # The real server leaves the reason of a 500 out.
        kept["reason"] = kept["reason"] if kept["code"] != 500 else None
        return {**kept, "message": answer.get("message")} if text else kept
    meta = answer.get("metadata") or {}
    spec = answer.get("spec") or {}
    template = (spec.get("template") or {}).get("spec")
    found = {
        "kind": answer.get("kind"),
        "data": answer.get("data"),
        "labels": sorted(key for key in meta.get("labels") or {} if "/" not in key),
        "going": "deletionTimestamp" in meta,
        "grace": meta.get("deletionGracePeriodSeconds"),
        "replicas": spec.get("replicas"),
        "containers": (template or spec).get("containers"),
        "status": answer.get("status") if answer.get("kind") == "Widget" else None,
    }
    if answer.get("kind") == "Widget":
        found |= {"spec": spec, "generation": meta.get("generation")}
    if answer.get("kind") in ("Deployment", "Widget", "ConfigMap"):
        found["owners"] = owners(meta)
    return found


def owners(meta: dict[str, Any]) -> list[Any]:
    """Who owns what by apply; of an updater only that it is there."""
    found = []
    for entry in meta.get("managedFields") or []:
        fields = plain(entry["fieldsV1"]) if entry["operation"] == "Apply" else None
        # An empty struct in a configuration is owned in one version and not in the other.
        if fields != {"f:spec": {}}:
            found.append((entry["manager"], entry["operation"], json.dumps(fields, sort_keys=True)))
    # 1.20 does not tell the endpoints apart through which one manager wrote.
    return sorted(set(found))


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in fields.items() if key != "."}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(kube_assets: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of an etcd and a kube-apiserver of their own, on loopback."""
    client_port, peer_port, port = free_port(), free_port(), free_port()
    (tmp_path / "tokens").write_text("token,admin,1,system:masters\n")
    key = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    (tmp_path / "sa.key").write_bytes(key.private_bytes(*form))
    etcd = f"http://127.0.0.1:{client_port}"
    settings = {
        "etcd": {
            "data-dir": tmp_path / "etcd",
            "listen-client-urls": etcd,
            "advertise-client-urls": etcd,
            "listen-peer-urls": f"http://127.0.0.1:{peer_port}",
        },
        "kube-apiserver": {
            "etcd-servers": etcd,
            "token-auth-file": tmp_path / "tokens",
            "secure-port": port,
            "bind-address": "127.0.0.1",
            "cert-dir": tmp_path / "certs",
            "service-account-key-file": tmp_path / "sa.key",
            "service-account-signing-key-file": tmp_path / "sa.key",
            "service-account-issuer": "https://test",
            "service-cluster-ip-range": "10.96.0.0/16",
            "disable-admission-plugins": "ServiceAccount",
        },
    }
    running = []
    with contextlib.ExitStack() as stack:
        for name, flags in settings.items():
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            words = [f"--{flag}={value}" for flag, value in flags.items()]
            running.append(subprocess.Popen([str(kube_assets / name), *words], stdout=log, stderr=log))
        try:
            yield f"https://127.0.0.1:{port}"
        finally:
            for process in reversed(running):
                process.terminate()
                process.wait(20)


@pytest.fixture
async def real(served: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the real control plane, once it is ready."""
    headers = {"Authorization": "Bearer token"}
    async with httpx.AsyncClient(base_url=served, verify=False, timeout=10, trust_env=False, headers=headers) as client:
        await eventually(lambda: _exists(client, "/readyz"), 60)
        await eventually(lambda: _exists(client, "/api/v1/namespaces/default"), 30)
        yield client


async def _exists(client: httpx.AsyncClient, path: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return (await client.get(path)).status_code == 200
    return False


def without_rules(value: Any) -> Any:
    """The definition without CEL, which 1.20 doesn't know."""
    if isinstance(value, dict):
        return {key: without_rules(item) for key, item in value.items() if key != "x-kubernetes-validations"}
    return [without_rules(item) for item in value] if isinstance(value, list) else value


async def send(client: httpx.AsyncClient, step: Step) -> tuple[int, Any]:
    content = None if step.body is None else json.dumps(step.body)
    headers = {"Content-Type": step.media, "User-Agent": "tester/1"}
    response = await client.request(step.method, step.path, content=content, headers=headers, params=step.query)
    try:
        return response.status_code, response.json()
    except json.JSONDecodeError:
        return response.status_code, {"kind": "Status", "code": response.status_code}


async def test_both_planes_tell_the_same_story(real: httpx.AsyncClient) -> None:
    async with Plane(controllers=False) as plane:
        ours = httpx.AsyncClient(base_url=plane.url, timeout=10, trust_env=False)
        definition = Step("POST", CRDS, without_rules(copy.deepcopy(WIDGETS)))
        for client in (ours, real):
            assert (await send(client, definition))[0] == 201
            await eventually(lambda client=client: _exists(client, THINGS), 30)
        # A definition that was just established may still be served without its schema for a moment.
        await asyncio.sleep(1)
        different = []
        for number, step in enumerate(STORY):
            (code, mine), (real_code, theirs) = await send(ours, step), await send(real, step)
            mine, theirs = essence(mine, step.text), essence(theirs, step.text)
            if (code, mine) != (real_code, theirs):
                wrong = {
                    key: (mine.get(key), theirs.get(key))
                    for key in {*mine, *theirs}
                    if mine.get(key) != theirs.get(key)
                }
                different.append(f"{number}: {step.method} {step.path}: {code} and {real_code}; (ours, real): {wrong}")
        await ours.aclose()
    assert not different, "\n".join(different)
