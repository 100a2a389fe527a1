"""Validation of built-in kinds, as far as users and controllers meet it.

One function a kind yields field errors; the wording follows the real server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from tightship.api.units import exact_quantity
from tightship.sandbox.plane.errors import Cause, Obj
from tightship.sandbox.plane.schema import Node
from tightship.sandbox.plane.selectors import matches
from tightship.sandbox.plane.values import dig

_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_LABEL_1123 = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
_LABEL_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_QUALIFIED = re.compile(r"^([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$")
_VALUE = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_TEXT = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_SERVICE_TEXT = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_VALUE_TEXT = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_TEXT = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_DATA_KEY = re.compile(r"^[-._a-zA-Z0-9]+$")
_DATA_TEXT = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or "
    "'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
)
_FREE_NAMES = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}

Causes = Iterator[Cause]


def check_metadata(obj: Obj) -> Causes:
    """Errors in name, labels, annotations and owner references."""
    meta = obj["metadata"]
    yield from _name(obj["kind"], meta.get("name", ""))
    for key, value in (meta.get("labels") or {}).items():
        yield from _label(key, value, "metadata.labels")
    for key in meta.get("annotations") or {}:
        if not _is_qualified(key.lower()):
            yield Cause("invalid", "metadata.annotations", _KEY_TEXT, key)
    for index, owner in enumerate(meta.get("ownerReferences") or []):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                yield Cause(
                    "invalid", f"metadata.ownerReferences[{index}].{field}", "must not be empty", owner.get(field)
                )
    controllers = [owner for owner in meta.get("ownerReferences") or [] if owner.get("controller")]
    if len(controllers) > 1:
        yield Cause(
            "invalid",
            "metadata.ownerReferences",
            "Only one reference can have Controller set to true",
            len(controllers),
        )


def _name(kind: str, name: str) -> Causes:
    if kind in _FREE_NAMES:
        if "/" in name or "%" in name or name in (".", ".."):
            yield Cause("invalid", "metadata.name", "may not contain '/' or '%'", name)
        return
    if kind == "Service":
        if not _LABEL_1035.match(name) or len(name) > 63:
            yield Cause("invalid", "metadata.name", _SERVICE_TEXT, name)
    elif kind == "Namespace":
        if not _LABEL_1123.match(name) or len(name) > 63:
            yield Cause("invalid", "metadata.name", _LABEL_TEXT, name)
    elif not _SUBDOMAIN.match(name):
        yield Cause("invalid", "metadata.name", _SUBDOMAIN_TEXT, name)
    elif len(name) > 253:
        yield Cause("invalid", "metadata.name", "must be no more than 253 characters", name)


def _is_qualified(key: str) -> bool:
    prefix, _, name = key.rpartition("/")
    if "/" in key and (not prefix or not _SUBDOMAIN.match(prefix) or len(prefix) > 253):
        return False
    return bool(_QUALIFIED.match(name)) and len(name) <= 63


def _label(key: str, value: str, where: str) -> Causes:
    if not _is_qualified(key):
        yield Cause("invalid", where, _KEY_TEXT, key)
    if len(value) > 63:
        yield Cause("invalid", where, "must be no more than 63 characters", value)
    elif not _VALUE.match(value):
        yield Cause("invalid", where, _VALUE_TEXT, value)


def check_required(node: Node, value: object, path: str = "") -> Causes:
    """Missing required fields, and list items with the same key."""
    if isinstance(value, dict):
        for name in node.required:
            child = node.child(name)
            missing = name not in value or (value[name] in ("", []) and child.type in ("string", "array"))
            if missing and not (path.startswith("status") or path == ""):
                yield Cause("required", f"{path}.{name}")
        for name, item in value.items():
            if name not in ("managedFields", "status"):
                yield from check_required(node.child(name), item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        seen: set[str] = set()
        for index, item in enumerate(value):
            yield from check_required(node.item(), item, f"{path}[{index}]")
            if node.keys == ("name",) and isinstance(item, dict):
                name = str(item.get("name"))
                # Environment variables may repeat: the last one wins.
                if name in seen and not path.endswith(".env"):
                    yield Cause("duplicate", f"{path}[{index}].name", "", name)
                seen.add(name)


def _one_of(obj: Obj, allowed: tuple[str, ...], *path: str) -> Causes:
    value = dig(obj, *path)
    if value is not None and value not in allowed:
        listed = ", ".join(f'"{option}"' for option in allowed)
        yield Cause("unsupported", ".".join(path), f"supported values: {listed}", value)


def _not_negative(obj: Obj, *path: str) -> Causes:
    value = dig(obj, *path)
    if value is not None and value < 0:
        yield Cause("invalid", ".".join(path), "must be greater than or equal to 0", value)


def _pod_spec(spec: Obj, path: str) -> Causes:
    volumes = {volume.get("name") for volume in spec.get("volumes") or []}
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind) or []):
            yield from _container(container, f"{path}.{kind}[{index}]", volumes)
    policies = ("Always", "OnFailure", "Never")
    if spec.get("restartPolicy") not in policies:
        listed = ", ".join(f'"{policy}"' for policy in policies)
        yield Cause("unsupported", f"{path}.restartPolicy", f"supported values: {listed}", spec.get("restartPolicy"))


def _container(container: Obj, path: str, volumes: set[str | None]) -> Causes:
    if container.get("name") and not _LABEL_1123.match(container["name"]):
        yield Cause("invalid", f"{path}.name", _LABEL_TEXT, container["name"])
    if not container.get("image"):
        yield Cause("required", f"{path}.image")
    for index, mount in enumerate(container.get("volumeMounts") or []):
        if mount.get("name") not in volumes:
            where = f"{path}.volumeMounts[{index}].name"
            yield Cause("notfound", where, "", mount.get("name"))
    limits = dig(container, "resources", "limits", default={})
    requests = dig(container, "resources", "requests", default={})
    for name, amount in requests.items():
        limit = limits.get(name)
        if limit is not None and exact_quantity(amount) > exact_quantity(limit):
            yield Cause(
                "invalid",
                f"{path}.resources.requests",
                f"must be less than or equal to {name} limit of {limit}",
                amount,
            )
        if _is_extended(name) and limit is None:
            yield Cause("required", f"{path}.resources.limits", "Limit must be set for non overcommitable resources")
        if _is_extended(name) and limit is not None and exact_quantity(amount) != exact_quantity(limit):
            yield Cause("invalid", f"{path}.resources.requests", f"must be equal to {name} limit of {limit}", amount)
    for index, port in enumerate(container.get("ports") or []):
        if not 0 < (port.get("containerPort") or 0) < 65536:
            where = f"{path}.ports[{index}].containerPort"
            yield Cause("invalid", where, "must be between 1 and 65535, inclusive", port.get("containerPort"))


def _is_extended(name: str) -> bool:
    return "/" in name and not name.startswith(("kubernetes.io/", "requests."))


def _pod(obj: Obj) -> Causes:
    yield from _pod_spec(obj["spec"], "spec")


def _workload(obj: Obj) -> Causes:
    spec = obj["spec"]
    yield from _not_negative(obj, "spec", "replicas")
    selector, labels = spec.get("selector"), dig(spec, "template", "metadata", "labels", default={})
    if not selector or not (selector.get("matchLabels") or selector.get("matchExpressions")):
        if obj["kind"] != "ReplicationController":
            yield Cause("required", "spec.selector")
    elif not matches(selector, labels):
        yield Cause("invalid", "spec.template.metadata.labels", "`selector` does not match template `labels`", labels)
    yield from _pod_spec(spec["template"]["spec"], "spec.template.spec")
    if spec["template"]["spec"].get("restartPolicy") != "Always":
        yield Cause(
            "unsupported",
            "spec.template.spec.restartPolicy",
            'supported values: "Always"',
            spec["template"]["spec"].get("restartPolicy"),
        )


def _stateful_set(obj: Obj) -> Causes:
    yield from _workload(obj)
    yield from _one_of(obj, ("OrderedReady", "Parallel"), "spec", "podManagementPolicy")
    yield from _one_of(obj, ("RollingUpdate", "OnDelete"), "spec", "updateStrategy", "type")


def _job(obj: Obj) -> Causes:
    for field in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds"):
        yield from _not_negative(obj, "spec", field)
    spec = obj["spec"]["template"]["spec"]
    yield from _pod_spec(spec, "spec.template.spec")
    if spec.get("restartPolicy") not in ("OnFailure", "Never"):
        detail = 'supported values: "OnFailure", "Never"'
        yield Cause("unsupported", "spec.template.spec.restartPolicy", detail, spec.get("restartPolicy"))


def _service(obj: Obj) -> Causes:
    spec = obj["spec"]
    if not spec.get("ports") and spec.get("clusterIP") != "None" and spec["type"] != "ExternalName":
        yield Cause("required", "spec.ports")
    for index, port in enumerate(spec.get("ports") or []):
        if not 0 < (port.get("port") or 0) < 65536:
            yield Cause(
                "invalid", f"spec.ports[{index}].port", "must be between 1 and 65535, inclusive", port.get("port")
            )
        if len(spec["ports"]) > 1 and not port.get("name"):
            yield Cause("required", f"spec.ports[{index}].name")
    yield from _one_of(obj, ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort"), "spec", "type")
    address = spec.get("clusterIP")
    if address and address != "None":
        try:
            ipaddress.ip_address(address)
        except ValueError:
            yield Cause("invalid", "spec.clusterIPs[0]", "must be a valid IP address, (e.g. 10.9.8.7)", address)


def _custom_resource_definition(obj: Obj) -> Causes:
    spec = obj["spec"]
    names, group = spec.get("names") or {}, spec.get("group", "")
    expected = f"{names.get('plural', '')}.{group}"
    if obj["metadata"]["name"] != expected:
        yield Cause("invalid", "metadata.name", 'must be spec.names.plural+"."+spec.group', obj["metadata"]["name"])
    yield from _one_of(obj, ("Cluster", "Namespaced"), "spec", "scope")
    versions = spec.get("versions") or []
    if sum(bool(version.get("storage")) for version in versions) != 1:
        yield Cause(
            "invalid", "spec.versions", "must have exactly one version marked as storage version", len(versions)
        )
    for index, version in enumerate(versions):
        schema = dig(version, "schema", "openAPIV3Schema")
        path = f"spec.versions[{index}].schema.openAPIV3Schema"
        if schema is None:
            yield Cause("required", path, "schemas are required")
            continue
        if schema.get("type") != "object":
            yield Cause("invalid", f"{path}.type", "must be object at the root", schema.get("type"))
        yield from _structural(schema, path)


def _structural(schema: Obj, path: str) -> Causes:
    free = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string")
    if not schema.get("type") and not free:
        yield Cause("required", f"{path}.type", "must not be empty for specified object fields")
    if schema.get("type") == "array" and "items" not in schema:
        yield Cause("required", f"{path}.items", "must be specified")
    if schema.get("properties") and isinstance(schema.get("additionalProperties"), dict):
        yield Cause(
            "forbidden", f"{path}.additionalProperties", "additionalProperties and properties are mutual exclusive"
        )
    if "$ref" in schema:
        yield Cause("forbidden", f"{path}.$ref", "$ref is not supported")
    for name, child in (schema.get("properties") or {}).items():
        yield from _structural(child, f"{path}.properties[{name}]")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from _structural(schema[name], f"{path}.{name}")
    keys = schema.get("x-kubernetes-list-map-keys") or []
    if schema.get("x-kubernetes-list-type") == "map":
        item = schema.get("items") or {}
        for index, key in enumerate(keys):
            prop = dig(item, "properties", key)
            if prop is None:
                yield Cause(
                    "invalid",
                    f"{path}.x-kubernetes-list-map-keys[{index}]",
                    "entries must all be names of item properties",
                    key,
                )
            elif key not in (item.get("required") or []) and "default" not in prop:
                where = f"{path}.items.properties[{key}].default"
                yield Cause(
                    "required",
                    where,
                    "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
                )


def _data(obj: Obj) -> Causes:
    for field in ("data", "binaryData"):
        for key in obj.get(field) or {}:
            if not _DATA_KEY.match(key) or key in (".", ".."):
                yield Cause("invalid", f"{field}[{key}]", _DATA_TEXT, key)


def _limits(obj: Obj) -> Causes:
    capacity = obj["spec"].get("capacity") or {}
    if not capacity.get("storage"):
        yield Cause("required", "spec.capacity")
    if not obj["spec"].get("accessModes"):
        yield Cause("required", "spec.accessModes")


_BY_KIND: dict[str, Callable[[Obj], Causes]] = {
    "Pod": _pod,
    "StatefulSet": _stateful_set,
    "Deployment": _workload,
    "ReplicaSet": _workload,
    "Job": _job,
    "Service": _service,
    "PersistentVolume": _limits,
    "ConfigMap": _data,
    "Secret": _data,
    "CustomResourceDefinition": _custom_resource_definition,
}

# What must not change once written: kind -> (path of what may change below spec, or None for nothing at all).
_STATEFUL_SET_MAY = {
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
}
_JOB_MUST_NOT = ("selector", "template", "completionMode", "completions")
_POD_TEXT = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
_STATEFUL_SET_TEXT = (
    "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', "
    "'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
)


def check(node: Node, obj: Obj) -> list[Cause]:
    """All field errors of a built-in object."""
    causes = [*check_metadata(obj), *check_required(node, obj)]
    checker = _BY_KIND.get(obj["kind"])
    if checker:
        causes += checker(obj)
    return causes


def check_update(old: Obj, new: Obj) -> list[Cause]:
    """Changes of what is immutable in a built-in object."""
    return list(_changes(old, new))


def _changes(old: Obj, new: Obj) -> Causes:
    kind = new["kind"]
    before, after = old.get("spec") or {}, new.get("spec") or {}
    if kind == "Pod" and _pod_core(before) != _pod_core(after):
        yield Cause("forbidden", "spec", _POD_TEXT)
    if kind == "StatefulSet":
        changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        if changed - _STATEFUL_SET_MAY:
            yield Cause("forbidden", "spec", _STATEFUL_SET_TEXT)
    if kind in ("Deployment", "ReplicaSet") and before.get("selector") != after.get("selector"):
        yield Cause("invalid", "spec.selector", "field is immutable", after.get("selector"))
    if kind == "Job":
        for field in _JOB_MUST_NOT:
            if before.get(field) != after.get(field):
                yield Cause("invalid", f"spec.{field}", "field is immutable", after.get(field))
    if kind == "Service" and before.get("clusterIP") and after.get("clusterIP") != before["clusterIP"]:
        yield Cause("invalid", "spec.clusterIPs[0]", "may not change once set", after.get("clusterIP"))
    if kind in ("RoleBinding", "ClusterRoleBinding") and old.get("roleRef") != new.get("roleRef"):
        yield Cause("invalid", "roleRef", "cannot change roleRef", new.get("roleRef"))
    if kind in ("ConfigMap", "Secret") and old.get("immutable") and old.get("data") != new.get("data"):
        yield Cause("forbidden", "data", "field is immutable when `immutable` is set")


def _pod_core(spec: Obj) -> Obj:
    loose = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "nodeName", "schedulingGates")
    core = {key: value for key, value in spec.items() if key not in loose}
    for kind in ("containers", "initContainers"):
        core[kind] = [{**container, "image": ""} for container in spec.get(kind) or []]
    return core
