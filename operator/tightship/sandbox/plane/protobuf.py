"""Reading the protobuf bodies that kubectl's imperative commands send (``create namespace``, ``auth can-i``, ``drain``).

Answers are always JSON, which every client accepts; requests in protobuf are read for the messages in the table below, whose
field numbers are those of Kubernetes' ``generated.proto`` files. Any other kind is refused with 415.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from tightship.sandbox.plane.errors import Obj, bad_request, unsupported_media
from tightship.sandbox.plane.values import stamp

MEDIA = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"

# Message -> field number -> "name:type". A type is string, bytes, int, bool, time, quantity, port (int or string), a
# message, or one of these in a list ("*type") or as values of a map with string keys ("{type").
_MESSAGES: dict[str, dict[int, str]] = {
    "ObjectMeta": {
        1: "name:string",
        2: "generateName:string",
        3: "namespace:string",
        5: "uid:string",
        6: "resourceVersion:string",
        7: "generation:int",
        8: "creationTimestamp:time",
        11: "labels:{string",
        12: "annotations:{string",
        13: "ownerReferences:*OwnerReference",
        14: "finalizers:*string",
    },
    "OwnerReference": {
        1: "kind:string",
        3: "name:string",
        4: "uid:string",
        5: "apiVersion:string",
        6: "controller:bool",
    },
    "LabelSelector": {1: "matchLabels:{string"},
    "Namespace": {1: "metadata:ObjectMeta"},
    "ServiceAccount": {1: "metadata:ObjectMeta"},
    "ConfigMap": {1: "metadata:ObjectMeta", 2: "data:{string", 3: "binaryData:{bytes", 4: "immutable:bool"},
    "Secret": {
        1: "metadata:ObjectMeta",
        2: "data:{bytes",
        3: "type:string",
        4: "stringData:{string",
        5: "immutable:bool",
    },
    "Eviction": {1: "metadata:ObjectMeta", 2: "deleteOptions:DeleteOptions"},
    "DeleteOptions": {
        1: "gracePeriodSeconds:int",
        2: "preconditions:Preconditions",
        3: "orphanDependents:bool",
        4: "propagationPolicy:string",
        5: "dryRun:*string",
    },
    "Preconditions": {1: "uid:string", 2: "resourceVersion:string"},
    "SelfSubjectAccessReview": {1: "metadata:ObjectMeta", 2: "spec:AccessSpec"},
    "AccessSpec": {1: "resourceAttributes:ResourceAttributes", 2: "nonResourceAttributes:PathAttributes"},
    "ResourceAttributes": {
        1: "namespace:string",
        2: "verb:string",
        3: "group:string",
        4: "version:string",
        5: "resource:string",
        6: "subresource:string",
        7: "name:string",
    },
    "PathAttributes": {1: "path:string", 2: "verb:string"},
    "SelfSubjectRulesReview": {1: "metadata:ObjectMeta", 2: "spec:RulesSpec"},
    "RulesSpec": {1: "namespace:string"},
    "SelfSubjectReview": {1: "metadata:ObjectMeta"},
    "TokenRequest": {1: "metadata:ObjectMeta", 2: "spec:TokenSpec"},
    "TokenSpec": {1: "audiences:*string", 3: "boundObjectRef:BoundReference", 4: "expirationSeconds:int"},
    "BoundReference": {1: "kind:string", 2: "apiVersion:string", 3: "name:string", 4: "uid:string"},
    "Deployment": {1: "metadata:ObjectMeta", 2: "spec:DeploymentSpec"},
    "DeploymentSpec": {1: "replicas:int", 2: "selector:LabelSelector", 3: "template:PodTemplateSpec"},
    "Job": {1: "metadata:ObjectMeta", 2: "spec:JobSpec"},
    "JobSpec": {
        1: "parallelism:int",
        2: "completions:int",
        3: "activeDeadlineSeconds:int",
        6: "template:PodTemplateSpec",
    },
    "PodTemplateSpec": {1: "metadata:ObjectMeta", 2: "spec:PodSpec"},
    "PodSpec": {2: "containers:*Container", 3: "restartPolicy:string"},
    "Container": {
        1: "name:string",
        2: "image:string",
        3: "command:*string",
        4: "args:*string",
        5: "workingDir:string",
        6: "ports:*ContainerPort",
        7: "env:*EnvVar",
    },
    "ContainerPort": {1: "name:string", 2: "hostPort:int", 3: "containerPort:int", 4: "protocol:string"},
    "EnvVar": {1: "name:string", 2: "value:string"},
    "Service": {1: "metadata:ObjectMeta", 2: "spec:ServiceSpec"},
    "ServiceSpec": {
        1: "ports:*ServicePort",
        2: "selector:{string",
        3: "clusterIP:string",
        4: "type:string",
        10: "externalName:string",
    },
    "ServicePort": {1: "name:string", 2: "protocol:string", 3: "port:int", 4: "targetPort:port", 5: "nodePort:int"},
    "PodDisruptionBudget": {1: "metadata:ObjectMeta", 2: "spec:PodDisruptionBudgetSpec"},
    "PodDisruptionBudgetSpec": {1: "minAvailable:port", 2: "selector:LabelSelector", 3: "maxUnavailable:port"},
    "PriorityClass": {1: "metadata:ObjectMeta", 2: "value:int", 3: "globalDefault:bool", 4: "description:string"},
    "Role": {1: "metadata:ObjectMeta", 2: "rules:*PolicyRule"},
    "ClusterRole": {1: "metadata:ObjectMeta", 2: "rules:*PolicyRule"},
    "PolicyRule": {
        1: "verbs:*string",
        2: "apiGroups:*string",
        3: "resources:*string",
        4: "resourceNames:*string",
        5: "nonResourceURLs:*string",
    },
    "RoleBinding": {1: "metadata:ObjectMeta", 2: "subjects:*Subject", 3: "roleRef:RoleRef"},
    "ClusterRoleBinding": {1: "metadata:ObjectMeta", 2: "subjects:*Subject", 3: "roleRef:RoleRef"},
    "Subject": {1: "kind:string", 2: "apiGroup:string", 3: "name:string", 4: "namespace:string"},
    "RoleRef": {1: "apiGroup:string", 2: "kind:string", 3: "name:string"},
    "Time": {1: "seconds:int", 2: "nanos:int"},
    "IntOrString": {1: "type:int", 2: "intVal:int", 3: "strVal:string"},
    "TypeMeta": {1: "apiVersion:string", 2: "kind:string"},
}


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
        elif wire == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("a field is cut off")
            yield tag >> 3, data[position : position + length]
            position += length
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield tag >> 3, data[position : position + size]
            position += size
        else:
            raise ValueError(f"unknown wire type {wire}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _value(kind: str, value: Any) -> Any:
    if kind == "string":
        return value.decode()
    if kind == "bytes":
        return base64.b64encode(value).decode()
    if kind == "int":
        return _signed(value)
    if kind == "bool":
        return bool(value)
    if kind == "time":
        seconds = _message("Time", value).get("seconds")
        return None if seconds is None else stamp(datetime.fromtimestamp(seconds, timezone.utc))
    if kind == "port":
        found = _message("IntOrString", value)
        return found.get("strVal", "") if found.get("type") == 1 else found.get("intVal", 0)
    return _message(kind, value)


def _message(kind: str, data: bytes) -> Obj:
    out: Obj = {}
    for number, value in _fields(data):
        name, _, form = _MESSAGES[kind].get(number, "").partition(":")
        if not name:
            continue
        if form.startswith("*"):
            out.setdefault(name, []).append(_value(form[1:], value))
        elif form.startswith("{"):
            entry = dict(_fields(value if isinstance(value, bytes) else b""))
            key = entry.get(1, b"")
            out.setdefault(name, {})[_value("string", key)] = _value(form[1:], entry.get(2, b""))
        else:
            out[name] = _value(form, value)
    return _without_empty(out)


def _without_empty(message: Obj) -> Obj:
    # Go writes empty strings of required fields; in JSON they would be left out.
    return {name: value for name, value in message.items() if value not in ("", None)}


def decode(body: bytes) -> Obj:
    """The object in a protobuf body. Raises ApiError 415 for a kind without a table, 400 for a broken body."""
    if not body.startswith(_MAGIC):
        raise bad_request("a protobuf body must begin with the Kubernetes magic number")
    try:
        envelope = dict(_fields(body[len(_MAGIC) :]))
        head = _message("TypeMeta", bytes(envelope.get(1, b"")))
        kind = head.get("kind", "")
        if kind not in _MESSAGES:
            raise unsupported_media(f"{MEDIA} of kind {kind}", "application/json, application/yaml")
        return {**head, **_message(kind, bytes(envelope.get(2, b"")))}
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise bad_request(f"the protobuf body can't be read: {error}") from error
