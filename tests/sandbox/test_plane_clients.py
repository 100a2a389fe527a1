"""The clients that operators are made of, unmodified, against the plane: the Kubernetes client and kopf."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml
from kubernetes.aio import client, config, watch

from plane_world import APPLY, WIDGETS, Client, eventually, make_widget
from tightship.sandbox.plane import Plane
from tightship.sandbox.plane.values import dig

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
THINGS = "/apis/example.dev/v1/namespaces/default/widgets"
OPERATOR = """
import kopf

@kopf.on.create("example.dev", "v1", "widgets")
def created(body, patch, **_):
    kopf.info(body, reason="Seen", message="hello")
    patch.status["replicas"] = 7

@kopf.on.event("example.dev", "v1", "widgets")
def seen(type, name, **_):
    print("SEEN", type, name, flush=True)
"""


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with Plane() as made:
        requests = Client(made.url)
        await requests.good("POST", CRDS, WIDGETS)
        await requests.close()
        yield made


async def test_kubernetes_client(plane: Plane) -> None:
    await config.load_kube_config_from_dict(yaml.safe_load(plane.kubeconfig()))
    async with client.ApiClient() as api:
        core, custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        body = client.V1ConfigMap(metadata=client.V1ObjectMeta(name="c"), data={"a": "1"})
        made = await core.create_namespaced_config_map("default", body)
        assert made.metadata.creation_timestamp.tzinfo is not None
        where = ("example.dev", "v1", "default", "widgets", "a")
        options = {"field_manager": "t", "force": True, "_content_type": APPLY}
        # The client reads no body of a 201, so what the first apply created is seen by the second.
        await custom.patch_namespaced_custom_object(*where, make_widget(), **options)
        applied = await custom.patch_namespaced_custom_object(*where, make_widget(), **options)
        assert applied["spec"]["color"] == "red"
        renewed = datetime.now(timezone.utc)
        lease = client.V1Lease(metadata=client.V1ObjectMeta(name="l"), spec=client.V1LeaseSpec(renew_time=renewed))
        leases = client.CoordinationV1Api(api)
        assert (await leases.create_namespaced_lease("default", lease)).spec.renew_time == renewed
        with pytest.raises(client.ApiException) as refusal:
            await client.AppsV1Api(api).read_namespaced_stateful_set("ghost", "default")
        assert refusal.value.status == 404
        names = []
        async for event in watch.Watch().stream(core.list_namespaced_config_map, "default", timeout_seconds=1):
            names.append(event["object"].metadata.name)
        assert sorted(names) == ["c", "kube-root-ca.crt"]


async def test_kopf_operator(plane: Plane, tmp_path: Path) -> None:
    script, kubeconfig = tmp_path / "operator.py", tmp_path / "kubeconfig"
    script.write_text(OPERATOR)
    kubeconfig.write_text(plane.kubeconfig())
    environment = {"KUBECONFIG": str(kubeconfig), "PATH": str(Path(sys.executable).parent), "HOME": str(tmp_path)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kopf", "run", "--standalone", "--all-namespaces", str(script)),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        requests = Client(plane.url)
        await requests.good("POST", THINGS, make_widget())
        storage = ("example.dev", "widgets")
        await eventually(lambda: dig(plane.store.get(storage, "default", "a"), "status", "replicas") == 7, 30)
        await eventually(lambda: [e for e in plane.store.all(("", "events")) if e["reason"] == "Seen"], 10)
        await requests.good("DELETE", f"{THINGS}/a")
        await eventually(lambda: plane.store.get(storage, "default", "a") is None, 10)
        await requests.close()
    finally:
        process.terminate()
        out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert b"SEEN DELETED a" in out or b"SEEN MODIFIED a" in out
