"""Unmodified kubectl against the plane: each test is a session as a user types it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from plane_world import (
    WIDGETS,
    Kubectl,
    Kubelets,
    eventually,
    make_certificate,
    make_job,
    make_pod,
    make_set,
    make_widget,
)
from tightship.sandbox.plane import Plane
from tightship.sandbox.plane.values import dig

pytestmark = pytest.mark.needs("kubectl")


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with Plane() as made:
        kubelets = Kubelets(made)
        kubelets.add_node("node-0")
        yield made
        kubelets.stop()


@pytest.fixture
def tls(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for loopback, and its key."""
    return make_certificate(tmp_path)


@pytest.fixture
async def run(plane: Plane, tmp_path: Path) -> Kubectl:
    made = Kubectl(plane, tmp_path)
    await made("create", "--save-config", "-f", "-", stdin=WIDGETS)
    return made


async def test_finding_out_what_there_is(run: Kubectl) -> None:
    assert "Server Version: v1.36" in await run("version")
    kinds = await run("api-resources", "-o", "wide")
    assert re.search(r"^widgets\s+wd\s+example.dev/v1\s+true\s+Widget\s+create,", kinds, re.M)
    assert re.search(r"^pods\s+po\s+v1\s+true\s+Pod", kinds, re.M)
    assert "apps/v1" in await run("api-versions")
    explained = await run("explain", "widget.spec")
    assert "What is wanted." in explained
    assert re.search(r"size\s+<integer> -required-\s+How big", explained)
    assert "Container image name" in await run("explain", "pods.spec.containers.image")
    assert "FIELDS:" in await run("explain", "statefulset.spec", "--recursive")
    assert "yes" in await run("auth", "can-i", "create", "pods")


async def test_apply_twice_then_change_and_diff(run: Kubectl) -> None:
    assert "widget.example.dev/a created" in await run("apply", "-f", "-", stdin=make_widget())
    assert "widget.example.dev/a unchanged" in await run("apply", "-f", "-", stdin=make_widget())
    code, diff = await run.run("diff", "-f", "-", stdin=make_widget(size=4))
    assert code == 1
    assert "+  size: 4" in diff
    assert "configured" in await run("apply", "-f", "-", stdin=make_widget(size=4))
    assert await run("get", "wd", "a", "-o", "jsonpath={.spec.size}") == "4"
    assert "created" in await run("apply", "-f", "-", stdin=make_set("s"))
    changed = make_set("s", 3)
    del changed["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert "configured" in await run("apply", "-f", "-", stdin=changed)
    assert "unchanged" in await run("apply", "-f", "-", stdin=changed)
    assert await run("get", "sts", "s", "-o", "jsonpath={.spec.template.spec.containers[0].ports}") == ""


async def test_server_side_apply_and_its_conflicts(run: Kubectl) -> None:
    words = ("apply", "--server-side", "-f", "-")
    assert "serverside-applied" in await run(*words, stdin=make_widget())
    version = await run("get", "wd", "a", "-o", "jsonpath={.metadata.resourceVersion}")
    await run(*words, stdin=make_widget())
    assert await run("get", "wd", "a", "-o", "jsonpath={.metadata.resourceVersion}") == version
    code, out = await run.run(*words, "--field-manager=other", stdin=make_widget(size=5))
    assert code == 1
    assert 'Apply failed with 1 conflict: conflict with "kubectl": .spec.size' in out
    await run(*words, "--field-manager=other", "--force-conflicts", stdin=make_widget(size=5))
    assert "serverside-applied" in await run(*words, stdin=make_set("s"))


async def test_tables(run: Kubectl) -> None:
    await run("apply", "-f", "-", stdin=make_widget())
    status = {"conditions": [{"type": "Ready", "status": "True", "message": "all well"}]}
    await run("patch", "wd", "a", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    lines = (await run("get", "widgets")).splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "READY", "AGE"]
    assert lines[1].split()[:3] == ["a", "3", "True"]
    assert "all well" in await run("get", "wd", "-o", "wide")
    await run("apply", "-f", "-", stdin=make_set("s"))
    await run("wait", "--for=condition=Ready", "pod", "-l", "app=s", "--timeout=10s")
    pods = await run("get", "pods", "-o", "wide")
    assert re.search(r"^s-0\s+1/1\s+Running\s+0\s+\d+s\s+10\.244\.1\.\d+\s+node-0", pods, re.M)
    assert re.search(r"^node-0\s+Ready\s+<none>", await run("get", "nodes"), re.M)
    everything = await run("get", "all")
    assert "statefulset.apps/s" in everything
    assert "widget.example.dev/a" in everything
    assert "pod/s-1" in everything


async def test_disruption_budgets(run: Kubectl) -> None:
    await run("create", "poddisruptionbudget", "s", "--max-unavailable=25%", "--selector=app=s")
    await run("apply", "-f", "-", stdin=make_set("s", 3))
    await run("wait", "pdb/s", "--for=jsonpath={.status.disruptionsAllowed}=1", "--timeout=10s")
    assert re.search(r"^s\s+N/A\s+25%\s+1\s+\d+s", await run("get", "pdb"), re.M)
    described = await run("describe", "pdb", "s")
    assert re.search(r"Desired:\s+2\n", described)
    assert re.search(r"Total:\s+3\n", described)
    assert "maxUnavailable" in await run("explain", "pdb.spec")
    code, refused = await run.run("create", "pdb", "none", "--max-unavailable=101%", "--selector=app=s")
    assert code == 1
    assert "must not be greater than 100%" in refused


async def test_labels_select(run: Kubectl) -> None:
    for name in ("a", "b"):
        await run("apply", "-f", "-", stdin=make_widget(name))
    await run("label", "wd", "a", "tier=gold")
    await run("annotate", "wd", "a", "note=x")
    assert (await run("get", "wd", "-l", "tier=gold", "-o", "name")).split() == ["widget.example.dev/a"]
    await run("label", "wd", "a", "tier-")
    assert "No resources found" in await run("get", "wd", "-l", "tier=gold")


async def test_scale_patch_wait_and_watch(plane: Plane, run: Kubectl) -> None:
    await run("apply", "-f", "-", stdin=make_widget())
    watching = asyncio.ensure_future(run.run("get", "wd", "-w", "--request-timeout=4s"))
    waiting = asyncio.ensure_future(run("wait", "--for=condition=Ready", "wd/a", "--timeout=10s"))
    await asyncio.sleep(1)
    assert "scaled" in await run("scale", "wd", "a", "--replicas=2")
    assert await run("get", "wd", "a", "-o", "jsonpath={.spec.replicas}") == "2"
    assert "patched" in await run(
        "patch", "wd", "a", "--type=json", "-p", '[{"op":"replace","path":"/spec/size","value":7}]'
    )
    status = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    await run("patch", "wd", "a", "--subresource=status", "--type=merge", "-p", json.dumps(status))
    assert "condition met" in await waiting
    _, seen = await watching
    assert [line.split()[1] for line in seen.splitlines()[1:] if line.startswith("a ")][:2] == ["3", "3"]
    assert "True" in seen
    code, out = await run.run("wait", "--for=condition=Gone", "wd/a", "--timeout=1s")
    assert code == 1
    assert "timed out" in out


async def test_describe_and_events(run: Kubectl) -> None:
    await run("apply", "-f", "-", stdin=make_pod("hungry", gpus=9))
    await eventually(lambda: run.run("get", "events", "-o", "name"))
    await asyncio.sleep(0.3)
    described = await run("describe", "pod", "hungry")
    assert "0/1 nodes are available: 1 Insufficient nvidia.com/gpu." in described
    assert "FailedScheduling" in await run("get", "events")
    assert "FailedScheduling" in await run("events", "--for", "pod/hungry")
    assert "nvidia.com/gpu" in await run("describe", "node", "node-0")
    await run("apply", "-f", "-", stdin=make_set("s"))
    assert "SuccessfulCreate" in await run("describe", "sts", "s")
    await run("apply", "-f", "-", stdin=make_job("j"))
    assert "Pods Statuses" in await run("describe", "job", "j")
    await run("apply", "-f", "-", stdin=make_widget())
    assert re.search(r"Size:\s+3", await run("describe", "wd", "a"))
    assert "Established" in await run("describe", "crd", "widgets.example.dev")


async def test_refusals_reach_the_user(run: Kubectl) -> None:
    code, out = await run.run("apply", "-f", "-", stdin=make_widget(size=99))
    assert code == 1
    assert (
        'The Widget "a" is invalid: spec.size: Invalid value: 99: spec.size in body should be less than or equal to 10'
        in out
    )
    code, out = await run.run("apply", "-f", "-", stdin=make_widget(colour="red"))
    assert code == 1
    assert 'unknown field "spec.colour"' in out
    code, out = await run.run("get", "wd", "ghost")
    assert 'Error from server (NotFound): widgets.example.dev "ghost" not found' in out
    code, out = await run.run("get", "ghosts")
    assert "the server doesn't have a resource type" in out


async def test_delete_waits_for_the_end(plane: Plane, run: Kubectl) -> None:
    await run("apply", "-f", "-", stdin=make_set("s"))
    await eventually(lambda: len(plane.store.all(("", "pods"))) == 2)
    assert "deleted" in await run("delete", "sts", "s", "--cascade=foreground")
    assert plane.store.all(("", "pods")) == []
    await run("apply", "-f", "-", stdin=[make_widget("a"), make_widget("b")])
    assert (await run("delete", "wd", "--all")).count("deleted") == 2
    await run("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    await run("delete", "ns", "team", "--timeout=10s")


async def test_rollout_of_a_deployment(plane: Plane, run: Kubectl) -> None:
    spec = make_set("d")["spec"]
    body = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d"},
        "spec": {"replicas": 2, "selector": spec["selector"], "template": spec["template"]},
    }
    await run("apply", "-f", "-", stdin=body)
    assert "successfully rolled out" in await run("rollout", "status", "deploy/d", "--timeout=10s")
    await run("set", "image", "deploy/d", "main=engine:2")
    assert "successfully rolled out" in await run("rollout", "status", "deploy/d", "--timeout=10s")
    assert "revision" in (await run("rollout", "history", "deploy/d")).lower()
    await run("scale", "deploy", "d", "--replicas=1")
    await eventually(
        lambda: dig(plane.store.get(("apps", "deployments"), "default", "d"), "status", "readyReplicas") == 1
    )


async def test_logs_come_from_the_nodes_kubelet(plane: Plane, run: Kubectl, tls: tuple[Path, Path]) -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.path_qs)
        return web.Response(text="hello from the engine\n")

    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls)
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
    }
    await run("patch", "node", "node-0", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    await run("apply", "-f", "-", stdin=make_pod("p"))
    await run("wait", "--for=condition=Ready", "pod/p", "--timeout=10s")
    with contextlib.suppress(asyncio.TimeoutError):
        assert await run("logs", "p", "--tail=5") == "hello from the engine\n"
    assert seen == ["/containerLogs/default/p/main?tailLines=5"]
    await runner.cleanup()


async def test_get_as_yaml_is_what_was_applied(run: Kubectl) -> None:
    await run("apply", "-f", "-", stdin=make_widget(tags=["b", "a"]))
    read = yaml.safe_load(await run("get", "wd", "a", "-o", "yaml"))
    assert read["spec"] == {"size": 3, "tags": ["b", "a"], "color": "red", "replicas": 1}
    assert "managedFields" not in read["metadata"]


async def test_tls_plane(tls: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = (str(path) for path in tls)
    async with Plane(tls_cert=cert, tls_key=key, ca_cert=cert) as plane:
        run = Kubectl(plane, tmp_path)
        assert "default" in await run("get", "ns")
        ca = await run("get", "cm", "kube-root-ca.crt", "-o", r"jsonpath={.data.ca\.crt}")
        assert ca.startswith("-----BEGIN CERTIFICATE-----")


async def test_imperative_commands(plane: Plane, run: Kubectl) -> None:
    await run("create", "namespace", "team")
    await run("create", "configmap", "c", "-n", "team", "--from-literal=a=1")
    assert await run("get", "cm", "c", "-n", "team", "-o", "jsonpath={.data.a}") == "1"
    await run("create", "secret", "generic", "s", "--from-literal=token=abc")
    assert await run("get", "secret", "s", "-o", "jsonpath={.data.token}") == "YWJj"
    await run("create", "serviceaccount", "robot")
    token = (await run("create", "token", "robot")).strip()
    user = plane.tokens.verify(token)
    assert user is not None
    assert user.name == "system:serviceaccount:default:robot"
    await run("create", "deployment", "d", "--image=engine:1", "--replicas=2", "--port=8000")
    assert "successfully rolled out" in await run("rollout", "status", "deploy/d", "--timeout=10s")
    await run("expose", "deployment", "d", "--port=80", "--target-port=8000")
    assert re.search(r"^d\s+ClusterIP\s+10\.96\.\d+\.\d+\s+<none>\s+80/TCP", await run("get", "svc", "d"), re.M)
    await run("create", "role", "r", "--verb=get,list", "--resource=pods")
    await run("create", "rolebinding", "rb", "--role=r", "--serviceaccount=default:robot")
    assert "Role/r" in await run("get", "rolebinding", "rb")
    await run("run", "once", "--image=engine:1", "--restart=Never")
    await run("cordon", "node-0")
    assert "SchedulingDisabled" in await run("get", "nodes")
    await run("drain", "node-0", "--force", "--timeout=15s")
    left = [pod for pod in plane.store.all(("", "pods")) if pod["spec"].get("nodeName")]
    assert left == []
