"""Which resources the plane serves, and under which schemas.

The built-in kinds are a table; custom resources come and go with their CustomResourceDefinitions. A resource is found by
(group, version, plural). Versions of one custom resource share their storage; ``events`` of the core group and of
``events.k8s.io`` do too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.models import Definitions, definition_name
from tightship.sandbox.plane.schema import Node, reference

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(eq=False)
class Resource:
    """One served resource in one version.

    Attributes:
        node: the schema of a whole object.
        storage: (group, plural) under which objects are kept.
        generation: whether ``metadata.generation`` counts changes of what the user wrote.
        columns: ``additionalPrinterColumns`` of a custom resource.
        scale: the ``scale`` subresource's paths (a custom resource's), or empty.
        custom: whether a CustomResourceDefinition made it.
    """

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool
    node: Node
    definition: str
    singular: str = ""
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    status: bool = False
    scale: Obj = field(default_factory=dict)
    generation: bool = False
    columns: list[Obj] = field(default_factory=list)
    custom: bool = False
    storage_version: str = ""
    storage: tuple[str, str] = ("", "")
    virtual: bool = False
    selectable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.singular = self.singular or self.kind.lower()
        self.storage_version = self.storage_version or self.version
        if self.storage == ("", ""):
            self.storage = (self.group, self.plural)

    @property
    def api_version(self) -> str:
        """``v1`` or ``apps/v1``."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def path(self) -> str:
        """The URL path of the group and version."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


@dataclass(frozen=True)
class _Row:
    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    status: bool = False
    scale: bool = False
    generation: bool = False
    model: str = ""
    virtual: bool = False


_ALL = ("all",)
_TABLE = (
    _Row("", "v1", "Namespace", "namespaces", False, ("ns",), status=True),
    _Row("", "v1", "Node", "nodes", False, ("no",), status=True),
    _Row("", "v1", "Pod", "pods", True, ("po",), _ALL, True, generation=True),
    _Row("", "v1", "Service", "services", True, ("svc",), _ALL, True),
    _Row("", "v1", "Endpoints", "endpoints", True, ("ep",)),
    _Row("", "v1", "ConfigMap", "configmaps", True, ("cm",)),
    _Row("", "v1", "Secret", "secrets"),
    _Row("", "v1", "Event", "events", True, ("ev",), model="CoreV1Event"),
    _Row("", "v1", "ServiceAccount", "serviceaccounts", True, ("sa",)),
    _Row("", "v1", "PersistentVolume", "persistentvolumes", False, ("pv",), status=True),
    _Row("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", True, ("pvc",), status=True),
    _Row("", "v1", "LimitRange", "limitranges", True, ("limits",)),
    _Row("", "v1", "ResourceQuota", "resourcequotas", True, ("quota",), status=True),
    _Row("", "v1", "PodTemplate", "podtemplates"),
    _Row("", "v1", "ReplicationController", "replicationcontrollers", True, ("rc",), _ALL, True, True, generation=True),
    _Row("apps", "v1", "StatefulSet", "statefulsets", True, ("sts",), _ALL, True, True, True),
    _Row("apps", "v1", "Deployment", "deployments", True, ("deploy",), _ALL, True, True, True),
    _Row("apps", "v1", "ReplicaSet", "replicasets", True, ("rs",), _ALL, True, True, True),
    _Row("apps", "v1", "DaemonSet", "daemonsets", True, ("ds",), _ALL, True, generation=True),
    _Row("apps", "v1", "ControllerRevision", "controllerrevisions"),
    _Row("batch", "v1", "Job", "jobs", True, (), _ALL, True, generation=True),
    _Row("batch", "v1", "CronJob", "cronjobs", True, ("cj",), _ALL, True, generation=True),
    _Row("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", generation=True),
    _Row("coordination.k8s.io", "v1", "Lease", "leases"),
    _Row("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", True, ("pdb",), status=True, generation=True),
    _Row("resource.k8s.io", "v1", "ResourceClaim", "resourceclaims", status=True, model="ResourceV1ResourceClaim"),
    _Row("resource.k8s.io", "v1", "ResourceSlice", "resourceslices", False, generation=True),
    _Row("resource.k8s.io", "v1", "DeviceClass", "deviceclasses", False, generation=True),
    _Row("rbac.authorization.k8s.io", "v1", "Role", "roles"),
    _Row("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings"),
    _Row("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", False),
    _Row("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings", False),
    _Row("scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", False, ("pc",), generation=True),
    _Row("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses", False),
    _Row("storage.k8s.io", "v1", "StorageClass", "storageclasses", False, ("sc",)),
    _Row("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", True, ("netpol",), generation=True),
    _Row("networking.k8s.io", "v1", "Ingress", "ingresses", True, ("ing",), status=True, generation=True),
    _Row("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", True, ("hpa",), _ALL, True),
    _Row("events.k8s.io", "v1", "Event", "events", True, ("ev",), model="EventsV1Event"),
    _Row(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        False,
        ("crd", "crds"),
        ("api-extensions",),
        True,
        generation=True,
    ),
    _Row("authentication.k8s.io", "v1", "TokenReview", "tokenreviews", False, virtual=True),
    _Row("authentication.k8s.io", "v1", "SelfSubjectReview", "selfsubjectreviews", False, virtual=True),
    _Row("authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews", False, virtual=True),
    _Row("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", False, virtual=True),
    _Row("authorization.k8s.io", "v1", "SelfSubjectRulesReview", "selfsubjectrulesreviews", False, virtual=True),
)
_EXTRA_MODELS = ("V1DeleteOptions", "V1Status", "V1Scale", "V1Eviction", "V1Binding", "AuthenticationV1TokenRequest")


def _model(row: _Row) -> str:
    return row.model or row.version.upper() + row.kind


@functools.cache
def _builtin_definitions() -> Definitions:
    """The definitions of all built-in kinds: made once a process, shared, and not changed afterwards."""
    definitions = Definitions()
    for row in _TABLE:
        gvk = {"group": row.group, "version": row.version, "kind": row.kind}
        definitions[definitions.add(_model(row))]["x-kubernetes-group-version-kind"] = [gvk]
    for model in _EXTRA_MODELS:
        definitions.add(model)
    return definitions


class Registry:
    """The served resources, and the definitions of their schemas."""

    def __init__(self) -> None:
        self.definitions = Definitions(_builtin_definitions())
        self.revision = 0
        self._served: dict[tuple[str, str, str], Resource] = {}
        for row in _TABLE:
            self._add_row(row)
        self.meta = Node(reference(definition_name("V1ObjectMeta")), self.definitions)

    def _add_row(self, row: _Row) -> None:
        name = definition_name(_model(row))
        scale = {}
        if row.scale:
            scale = {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"}
        resource = Resource(
            row.group,
            row.version,
            row.kind,
            row.plural,
            row.namespaced,
            Node(reference(name), self.definitions),
            name,
            short=row.short,
            categories=row.categories,
            status=row.status,
            scale=scale,
            generation=row.generation,
            virtual=row.virtual,
            storage=("", "events") if row.plural == "events" else ("", ""),
        )
        self._served[(row.group, row.version, row.plural)] = resource

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        """The resource at a path, or None."""
        return self._served.get((group, version, plural))

    def get(self, group: str, plural: str) -> Resource:
        """A built-in resource by group and plural, whatever its version. Raises KeyError."""
        for resource in self._served.values():
            if (resource.group, resource.plural) == (group, plural):
                return resource
        raise KeyError(f"no resource {plural} in group {group!r}")

    def by_kind(self, api_version: str, kind: str) -> Resource | None:
        """The resource of a kind, or None where the plane doesn't serve it."""
        for resource in self._served.values():
            if resource.kind == kind and resource.api_version == api_version:
                return resource
        return None

    def by_group_kind(self, group: str, kind: str) -> Resource | None:
        """The resource of a kind in any version."""
        for resource in self._served.values():
            if resource.kind == kind and resource.group == group:
                return resource
        return None

    def stored_as(self, storage: tuple[str, str]) -> Resource | None:
        """The resource in whose version objects of this storage are kept."""
        for resource in self._served.values():
            if resource.storage == storage and resource.version == resource.storage_version:
                return resource
        return None

    def __iter__(self) -> Iterator[Resource]:
        return iter(list(self._served.values()))

    def groups(self) -> dict[str, list[str]]:
        """Group -> its versions, preferred first."""
        found: dict[str, list[str]] = {}
        for resource in self._served.values():
            versions = found.setdefault(resource.group, [])
            if resource.version not in versions:
                versions.append(resource.version)
        return {group: sorted(versions, key=version_order) for group, versions in found.items()}

    def replace(self, group: str, plural: str, resources: list[Resource]) -> None:
        """Serves these versions of a custom resource, and no others."""
        for key, resource in list(self._served.items()):
            if (resource.group, resource.plural, resource.custom) == (group, plural, True):
                del self._served[key]
                self.definitions.pop(resource.definition, None)
        for resource in resources:
            self._served[(resource.group, resource.version, resource.plural)] = resource
        self.revision += 1


def version_order(version: str) -> tuple[int, int, int]:
    """Sorts versions as Kubernetes does: v2, v1, v1beta2, v1beta1, v1alpha1."""
    match = re.match(r"^v(\d+)(?:(alpha|beta)(\d+))?$", version)
    if not match:
        return (3, 0, 0)
    stage = {None: 0, "beta": 1, "alpha": 2}[match.group(2)]
    return (stage, -int(match.group(1)), -int(match.group(3) or 0))
