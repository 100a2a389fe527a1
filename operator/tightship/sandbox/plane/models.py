"""Schemas of the built-in kinds, derived from the models of the ``kubernetes`` package.

The package generates its classes from the Kubernetes OpenAPI document, so field names, types, required fields and
descriptions come from there. What the classes do not carry is added from tables here: how lists merge, which maps are
atomic, which strings are quantities, and the few defaults that take part in list keys.
"""

from __future__ import annotations

import datetime
import types
import typing
from typing import Any

from kubernetes.client import models

from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.schema import reference

# Lists that merge by key: (model, field) -> keys. The first key is the key of strategic merge patches.
LIST_KEYS: dict[tuple[str, str], tuple[str, ...]] = {
    ("V1PodSpec", "containers"): ("name",),
    ("V1PodSpec", "initContainers"): ("name",),
    ("V1PodSpec", "ephemeralContainers"): ("name",),
    ("V1PodSpec", "volumes"): ("name",),
    ("V1PodSpec", "imagePullSecrets"): ("name",),
    ("V1PodSpec", "hostAliases"): ("ip",),
    ("V1PodSpec", "topologySpreadConstraints"): ("topologyKey", "whenUnsatisfiable"),
    ("V1PodSpec", "schedulingGates"): ("name",),
    ("V1PodSpec", "resourceClaims"): ("name",),
    ("V1PodStatus", "podIPs"): ("ip",),
    ("V1Container", "env"): ("name",),
    ("V1Container", "ports"): ("containerPort", "protocol"),
    ("V1Container", "volumeMounts"): ("mountPath",),
    ("V1Container", "volumeDevices"): ("devicePath",),
    ("V1EphemeralContainer", "env"): ("name",),
    ("V1EphemeralContainer", "ports"): ("containerPort", "protocol"),
    ("V1EphemeralContainer", "volumeMounts"): ("mountPath",),
    ("V1EphemeralContainer", "volumeDevices"): ("devicePath",),
    ("V1ResourceRequirements", "claims"): ("name",),
    ("V1ContainerStatus", "volumeMounts"): ("mountPath",),
    ("V1ServiceSpec", "ports"): ("port", "protocol"),
    ("V1ServiceAccount", "secrets"): ("name",),
    ("V1NodeStatus", "addresses"): ("type",),
    ("V1ObjectMeta", "ownerReferences"): ("uid",),
}
SETS = {
    ("V1ObjectMeta", "finalizers"),
    ("V1NodeSpec", "podCIDRs"),
    ("V1Endpoint", "addresses"),
}
# Strategic merge knows these although server-side apply replaces them whole.
MERGE_ONLY = {("V1NodeSpec", "taints"): "key"}
RETAIN_KEYS = {("V1PodSpec", "volumes"), ("V1DeploymentSpec", "strategy")}
ATOMIC = {
    "V1LabelSelector",
    "V1SecretKeySelector",
    "V1ConfigMapKeySelector",
    "V1ObjectFieldSelector",
    "V1ResourceFieldSelector",
    "V1ObjectReference",
    "V1LocalObjectReference",
    "V1TypedLocalObjectReference",
    "V1OwnerReference",
    "V1NodeSelector",
    "V1NodeSelectorTerm",
    "V1SecretReference",
    "RbacV1Subject",
    "V1RoleRef",
}
ATOMIC_FIELDS = {
    ("V1ServiceSpec", "selector"),
    ("V1PodSpec", "nodeSelector"),
    ("V1PersistentVolumeClaimSpec", "dataSource"),
}
QUANTITY_FIELDS = {
    "limits",
    "requests",
    "capacity",
    "allocatable",
    "hard",
    "used",
    "overhead",
    "allocatedResources",
    "sizeLimit",
    "divisor",
    "averageValue",
}
DEFAULTS: dict[tuple[str, str], Any] = {
    ("V1ContainerPort", "protocol"): "TCP",
    ("V1ServicePort", "protocol"): "TCP",
}
# What the package's generator cannot express: a schema inside a schema is kept as it is written.
FREE_FORM = {("V1CustomResourceValidation", "openAPIV3Schema")}


def definition_name(model: str) -> str:
    """The name of a model's definition, e.g. ``V1PodSpec`` -> ``io.k8s.api.v1.PodSpec``."""
    for prefix, group in (
        ("CoreV1", "core.v1"),
        ("EventsV1", "events.v1"),
        ("RbacV1", "rbac.v1"),
        ("DiscoveryV1", "discovery.v1"),
        ("AuthenticationV1", "authentication.v1"),
        ("StorageV1", "storage.v1"),
        ("ResourceV1", "resource.v1"),
        ("V1", "v1"),
        ("V2", "v2"),
    ):
        if model.startswith(prefix):
            return f"io.k8s.api.{group}.{model[len(prefix) :]}"
    return f"io.k8s.api.{model}"


class Definitions(dict[str, Obj]):
    """Named OpenAPI definitions; ``add`` brings in a model and everything it refers to."""

    def add(self, model: str) -> str:
        """Adds a model by class name and returns the name of its definition."""
        name = definition_name(model)
        if name in self:
            return name
        self[name] = {}
        cls = getattr(models, model)
        properties: Obj = {}
        required = []
        for attribute, info in cls.model_fields.items():
            field = info.serialization_alias or info.alias or attribute
            properties[field] = self._property(model, field, cls, info)
            if info.is_required():
                required.append(field)
        description = (cls.__doc__ or "").split("Attributes:")[0].strip()
        schema: Obj = {"type": "object", "description": description, "properties": properties}
        if required:
            schema["required"] = required
        if model in ATOMIC:
            schema["x-kubernetes-map-type"] = "atomic"
        self[name].update(schema)
        return name

    def _property(self, model: str, field: str, cls: Any, info: Any) -> Obj:
        where = (model, field)
        raw: Obj = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        if where not in FREE_FORM:
            raw = self._type(info.annotation, field)
        if "$ref" in raw and info.description:
            raw = {"allOf": [raw]}
        if info.description:
            raw["description"] = info.description
        if where in DEFAULTS:
            raw["default"] = DEFAULTS[where]
        _annotate_lists(raw, where)
        if where in ATOMIC_FIELDS:
            raw["x-kubernetes-map-type"] = "atomic"
        if cls is models.V1LeaseSpec or field == "eventTime":
            _mark_micro(raw)
        return raw

    def _type(self, hint: Any, field: str) -> Obj:
        origin = typing.get_origin(hint)
        arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        if origin is typing.Annotated:
            return self._type(arguments[0], field)
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments, field)
        if origin is list:
            return {"type": "array", "items": self._type(arguments[0], "")}
        if origin is dict:
            if arguments[1] is Any:
                return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
            return {"type": "object", "additionalProperties": self._type(arguments[1], field)}
        if isinstance(hint, type):
            return self._scalar(hint, field)
        return {"x-kubernetes-preserve-unknown-fields": True}

    def _union(self, arguments: list[Any], field: str) -> Obj:
        if len(arguments) == 1:
            return self._type(arguments[0], field)
        kinds = {self._type(argument, field).get("type") for argument in arguments}
        if kinds == {"integer", "string"}:
            return {"format": "int-or-string", "x-kubernetes-int-or-string": True}
        if kinds == {"string"}:
            return {"type": "string"}
        if kinds <= {"integer", "number"}:
            return {"type": "number"}
        return {"x-kubernetes-preserve-unknown-fields": True}

    def _scalar(self, hint: type, field: str) -> Obj:
        if hint is bool:
            return {"type": "boolean"}
        if issubclass(hint, datetime.datetime):
            return {"type": "string", "format": "date-time"}
        if issubclass(hint, int):
            return {"type": "integer"}
        if issubclass(hint, float):
            return {"type": "number"}
        if issubclass(hint, (str, bytes)):
            return {"type": "string", "format": "quantity"} if field in QUANTITY_FIELDS else {"type": "string"}
        if hasattr(hint, "model_fields"):
            return reference(self.add(hint.__name__))
        return {"x-kubernetes-preserve-unknown-fields": True}


def _mark_micro(raw: Obj) -> None:
    if raw.get("format") == "date-time":
        raw["format"] = "micro-time"


def _annotate_lists(raw: Obj, where: tuple[str, str]) -> None:
    if raw.get("type") == "array":
        keys = LIST_KEYS.get(where)
        if keys is None and where[1] == "conditions":
            keys = ("type",)
        if keys:
            raw["x-kubernetes-list-type"] = "map"
            raw["x-kubernetes-list-map-keys"] = list(keys)
            raw["x-kubernetes-patch-merge-key"] = keys[0]
            raw["x-kubernetes-patch-strategy"] = "merge"
        elif where in SETS:
            raw["x-kubernetes-list-type"] = "set"
            raw["x-kubernetes-patch-strategy"] = "merge"
        else:
            raw["x-kubernetes-list-type"] = "atomic"
        if where in MERGE_ONLY:
            raw["x-kubernetes-patch-merge-key"] = MERGE_ONLY[where]
            raw["x-kubernetes-patch-strategy"] = "merge"
    if where in RETAIN_KEYS:
        current = raw.get("x-kubernetes-patch-strategy")
        raw["x-kubernetes-patch-strategy"] = f"{current},retainKeys" if current else "retainKeys"
