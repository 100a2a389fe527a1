"""What the suite needs of the Kubernetes API: plain requests that outlast an API server's restart."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

Object = dict[str, Any]
OUTAGE_SECONDS = 60.0
_RETRIED = {429, 500, 502, 503, 504}

PATHS = {
    "LLMService": "/apis/tightship.dev/v1alpha1/llmservices",
    "BatchProfile": "/apis/tightship.dev/v1alpha1/batchprofiles",
    "GPUPack": "/apis/tightship.dev/v1alpha1/gpupacks",
    "Pod": "/api/v1/pods",
    "Node": "/api/v1/nodes",
    "StatefulSet": "/apis/apps/v1/statefulsets",
    "Job": "/apis/batch/v1/jobs",
    "Service": "/api/v1/services",
    "ServiceAccount": "/api/v1/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/rolebindings",
    "Namespace": "/api/v1/namespaces",
}


class ApiError(Exception):
    """The API server refused; `status` is the HTTP code."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


class Client:
    """Requests to the cluster that a kubeconfig of the sandbox names."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        token = user.get("token")
        self._http = httpx.Client(
            base_url=cluster["server"],
            verify=ssl.create_default_context(cafile=cluster["certificate-authority"]),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=20,
            trust_env=False,
        )

    def request(
        self, method: str, path: str, body: Object | None = None, media: str = "application/json", **query: str
    ) -> Object:
        """One request; tried again while nobody answers, for as long as an outage may take. Raises ApiError."""
        deadline = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                answer = self._http.request(
                    method, path, json=body, params=query, headers={"Content-Type": media} if body is not None else {}
                )
                if not _is_passing(answer) or time.monotonic() > deadline:
                    break
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)
        if answer.status_code >= 400:
            raise ApiError(answer.status_code, answer.text)
        return dict(answer.json())

    def list(self, kind: str, namespace: str = "", label: str = "") -> list[Object]:
        """All objects of a kind, in order of namespace and name."""
        found = self.request("GET", path(kind, namespace), **({"labelSelector": label} if label else {}))
        items = [{**item, "kind": kind} for item in found["items"]]
        return sorted(items, key=lambda item: (item["metadata"].get("namespace", ""), item["metadata"]["name"]))

    def create(self, kind: str, body: Object) -> None:
        """POST an object; one that is there already is left as it is."""
        try:
            self.request("POST", path(kind, body["metadata"].get("namespace", "")), body)
        except ApiError as error:
            if error.status != 409:
                raise

    def merge(self, kind: str, namespace: str, name: str, patch: Object) -> None:
        """JSON merge patch; an object that is gone is no error."""
        self._unless_gone("PATCH", f"{path(kind, namespace)}/{name}", patch, "application/merge-patch+json")

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """DELETE; an object that is gone is no error."""
        self._unless_gone("DELETE", f"{path(kind, namespace)}/{name}")

    def evict(self, namespace: str, name: str) -> None:
        """Ask for an eviction, as `kubectl drain` does; a pod that a budget protects stays (429 is tried again for a while)."""
        metadata = {"name": name, "namespace": namespace}
        for version in ("policy/v1", "policy/v1beta1"):
            body = {"apiVersion": version, "kind": "Eviction", "metadata": metadata}
            try:
                self.request("POST", f"{path('Pod', namespace)}/{name}/eviction", body)
            except ApiError as error:
                if error.status in (400, 404, 422) and version == "policy/v1":
                    continue
                if error.status not in (404, 429):
                    raise
            return

    def _unless_gone(
        self, method: str, where: str, body: Object | None = None, media: str = "application/json"
    ) -> None:
        try:
            self.request(method, where, body, media)
        except ApiError as error:
            if error.status != 404:
                raise

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _is_passing(answer: httpx.Response) -> bool:
    """Whether a server that has just started answers so: kinds of CRDs it doesn't know at first, and says so without a Status."""
    unknown = answer.status_code == 404 and "json" not in answer.headers.get("Content-Type", "")
    return unknown or answer.status_code in _RETRIED


def path(kind: str, namespace: str = "") -> str:
    """The path of a kind's collection, of all namespaces where none is given."""
    whole = PATHS[kind]
    if not namespace:
        return whole
    head, _, plural = whole.rpartition("/")
    return f"{head}/namespaces/{namespace}/{plural}"
