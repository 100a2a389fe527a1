"""What a fresh sandbox's API contains: the kinds, the operator's namespace, and a volume with models."""

from __future__ import annotations

import asyncio
from pathlib import Path

import yaml

from tightship.api import crds
from tightship.sandbox.agent.api import Api, ApiError, Object
from tightship.sandbox.agent.dra import device_class
from tightship.sandbox.settings import Settings

SYSTEM_NAMESPACE = "tightship-system"
CLAIM = "models"
SERVICE_ADDRESS = "10.96.0.1"
_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


async def install(api: Api, settings: Settings) -> None:
    """Create all of it; what is there already stays, but definitions are brought up to date."""
    for definition in definitions(settings):
        await _put_definition(api, definition)
    await _create(
        api, "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM_NAMESPACE}}
    )
    if settings.dra:
        await _create(api, "/apis/resource.k8s.io/v1/deviceclasses", device_class())
    await _api_service(api)
    if settings.models is not None:
        await _models(api, settings.models)


def definitions(settings: Settings) -> list[Object]:
    """The CustomResourceDefinitions as the models give them, or those of the folder that the settings name."""
    if settings.crds is None:
        return list(crds.definitions().values())
    paths = sorted(Path(settings.crds).glob("*.yaml"))
    found = [document for path in paths for document in yaml.safe_load_all(path.read_text())]
    return [document for document in found if document]


async def wait_for_accounts(api: Api, namespaces: list[str], with_secret: bool) -> None:
    """Return when pods can be created: admission refuses them without their namespace's ServiceAccount `default`.

    Before Kubernetes 1.24 it also wants the account's token Secret (`with_secret`).
    """
    waiting = list(namespaces)
    while True:
        waiting = [name for name in waiting if not await _has_account(api, name, with_secret)]
        if not waiting:
            return
        await asyncio.sleep(0.1)


async def _has_account(api: Api, namespace: str, with_secret: bool) -> bool:
    try:
        account = await api.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return bool(account.get("secrets")) or not with_secret


async def wait_for_nodes(api: Api, names: list[str]) -> None:
    """Return when all nodes are Ready and can be scheduled to."""
    while True:
        nodes = {node["metadata"]["name"]: node for node in (await api.get("/api/v1/nodes"))["items"]}
        if all(name in nodes and _ready(nodes[name]) for name in names):
            return
        await asyncio.sleep(0.1)


def _ready(node: Object) -> bool:
    conditions = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or []}
    return conditions.get("Ready") == "True" and not node["spec"].get("taints")


async def _api_service(api: Api) -> None:
    """Return when the Service `kubernetes` is there: each control plane makes its own, the real one a moment after it is ready."""
    while True:
        try:
            await api.get("/api/v1/namespaces/default/services/kubernetes")
            return
        except ApiError as error:
            if error.status != 404:
                raise
        await asyncio.sleep(0.2)


async def _create(api: Api, path: str, body: Object) -> None:
    try:
        await api.create(path, body)
    except ApiError as error:
        if error.status != 409:
            raise


async def _put_definition(api: Api, definition: Object) -> None:
    path = f"{_DEFINITIONS}/{definition['metadata']['name']}"
    try:
        await api.create(_DEFINITIONS, definition)
    except ApiError as error:
        if error.status != 409:
            raise
        await api.merge(path, {"spec": definition["spec"]})
    while True:
        conditions = ((await api.get(path)).get("status") or {}).get("conditions") or []
        if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
            return
        await asyncio.sleep(0.05)


async def _models(api: Api, directory: str) -> None:
    """A PersistentVolume that is a directory of this machine, and the claim `models` in `default` bound to it."""
    modes, size = ["ReadWriteMany"], {"storage": "100Gi"}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": CLAIM},
        "spec": {
            "capacity": size,
            "accessModes": modes,
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "hostPath": {"path": directory},
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": "default", "name": CLAIM},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": "default"},
        "spec": {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": CLAIM},
    }
    await _create(api, "/api/v1/persistentvolumes", volume)
    await _create(api, "/api/v1/namespaces/default/persistentvolumeclaims", claim)
