"""The kinds the operator reads and writes, and where the API serves them.

A table instead of discovery: the operator touches a fixed set of kinds, its RBAC names the same set, and a start that
needs no discovery is fast and fails for clear reasons. Only for `OPTIONAL` kinds is the server asked at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightship.api.v1alpha1 import labels


@dataclass(frozen=True)
class Kind:
    """One kind: its `api_version` ("v1", "apps/v1"), `name`, `plural` in paths, and whether it lives in namespaces."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """The API group; "" for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """The version inside the group."""
        return self.api_version.rpartition("/")[2]

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The request path of a collection (no `name`), an object, or its subresource."""
        root = "/apis/" if "/" in self.api_version else "/api/"
        parts = [root + self.api_version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/".join(parts)


_TABLE = (
    Kind(labels.API_VERSION, "LLMService", "llmservices"),
    Kind(labels.API_VERSION, "BatchProfile", "batchprofiles"),
    Kind(labels.API_VERSION, "GPUPack", "gpupacks", namespaced=False),
    Kind("v1", "Node", "nodes", namespaced=False),
    Kind("v1", "Pod", "pods"),
    Kind("v1", "Service", "services"),
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "Event", "events"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("batch/v1", "Job", "jobs"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("inference.networking.k8s.io/v1", "InferencePool", "inferencepools"),
    Kind("resource.k8s.io/v1", "ResourceClaim", "resourceclaims"),
    Kind("resource.k8s.io/v1", "ResourceSlice", "resourceslices", namespaced=False),
    Kind("resource.k8s.io/v1", "DeviceClass", "deviceclasses", namespaced=False),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    Kind("coordination.k8s.io/v1", "Lease", "leases"),
)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _TABLE}

WATCHED_OWN = ("LLMService", "BatchProfile", "GPUPack")
WATCHED_BY_LABEL: Mapping[str, str] = {
    **dict.fromkeys(
        ("Pod", "StatefulSet", "Job", "Service", "PodDisruptionBudget", "InferencePool"), labels.PART_OF_SELECTOR
    ),
    "ConfigMap": labels.LENGTHS,
}
"""Of the busy kinds only what carries a label is watched, by this selector: what we made, and ConfigMaps that hold lengths."""
DRA_KINDS = ("ResourceClaim", "ResourceSlice", "DeviceClass")
"""What GPUs are handed out by: of claims everybody's are watched, since each takes GPUs that packs cannot have."""
WATCHED = (*WATCHED_OWN, "Node", *WATCHED_BY_LABEL, *DRA_KINDS)
"""The kinds kept in the watch cache, as far as the server has them."""

OPTIONAL: Mapping[str, str] = {
    "PodDisruptionBudget": "evictions of replicas are not limited",
    "InferencePool": "requests find replicas by the Service alone",
    **dict.fromkeys(DRA_KINDS, "packing.mode DRA can't be had, and Auto is Reservation"),
}
"""Kinds that a server may lack, each with what is so then."""


@dataclass(frozen=True)
class Ref:
    """Names one object. `namespace` is "" for cluster-scoped kinds."""

    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, obj: Mapping[str, Any]) -> Ref:
        """The reference of an object; its kind must be in the table."""
        metadata = obj["metadata"]
        kind = KINDS[obj["kind"]]
        return cls(kind.name, metadata.get("namespace", "") if kind.namespaced else "", metadata["name"])

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"
