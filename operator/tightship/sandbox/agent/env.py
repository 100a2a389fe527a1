"""The environment and command of a container: references resolved, `$(NAME)` expanded. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tightship.api.units import exact_quantity

Object = Mapping[str, Any]
Lookup = Callable[[str, str], "dict[str, str] | None"]
"""(kind, name) -> data of a ConfigMap or Secret of the pod's namespace, or None when it does not exist."""

_REFERENCE = re.compile(r"\$\$|\$\(([^()\s]+)\)")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class ConfigError(Exception):
    """A reference of the container cannot be resolved; the kubelet calls it CreateContainerConfigError."""


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by its value where there is one; `$$` stands for `$`."""

    def one(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        return values.get(match.group(1), match.group(0))

    return _REFERENCE.sub(one, text)


def field_value(pod: Object, path: str) -> str:
    """A downward API field of a pod.

    Raises:
        ConfigError: the path is not one of the downward API's.
    """
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    if match := _SUBSCRIPT.fullmatch(path):
        return str((metadata.get(match.group(1)) or {}).get(match.group(2), ""))
    if path in ("metadata.labels", "metadata.annotations"):
        entries = metadata.get(path.split(".")[1]) or {}
        return "\n".join(f'{key}="{_escape(value)}"' for key, value in sorted(entries.items()))
    simple = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.hostIP": status.get("hostIP", ""),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": ",".join(entry["ip"] for entry in status.get("podIPs") or []),
    }
    if path not in simple:
        raise ConfigError(f"unsupported fieldPath: {path}")
    return str(simple[path])


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def resource_value(pod: Object, container: Object, reference: Object, allocatable: Mapping[str, str]) -> str:
    """A resourceFieldRef's value; a limit that is not set is what the node can give, as in the kubelet."""
    if name := reference.get("containerName"):
        container = next(c for c in pod["spec"]["containers"] if c["name"] == name)
    section, _, resource = reference["resource"].partition(".")
    resources = container.get("resources") or {}
    value = (resources.get(section) or {}).get(resource)
    if value is None:
        value = allocatable.get(resource, "0") if section == "limits" else "0"
    unit = exact_quantity(reference.get("divisor") or "1") or 1  # "0" means 1
    return str(math.ceil(exact_quantity(value) / unit))


@dataclass(frozen=True)
class Scope:
    """Where the references of a container point: its pod, itself, ConfigMaps and Secrets, what the node can give."""

    pod: Object
    container: Object
    lookup: Lookup
    allocatable: Mapping[str, str]


def resolve(scope: Scope, base: Mapping[str, str]) -> dict[str, str]:
    """All variables of a container: `base`, then envFrom, then env in order.

    Raises:
        ConfigError: a ConfigMap, Secret or key that is not optional is missing.
    """
    values = dict(base)
    for source in scope.container.get("envFrom") or []:
        kind = "configmap" if "configMapRef" in source else "secret"
        data = _data(scope.lookup, kind, source["configMapRef" if kind == "configmap" else "secretRef"])
        values.update({str(source.get("prefix", "")) + key: value for key, value in data.items()})
    for entry in scope.container.get("env") or []:
        value = _entry(scope, entry, values)
        if value is not None:
            values[entry["name"]] = value
    return values


def _data(lookup: Lookup, kind: str, reference: Object) -> dict[str, str]:
    data = lookup(kind, reference["name"])
    if data is None and not reference.get("optional"):
        raise ConfigError(f'{kind} "{reference["name"]}" not found')
    return data or {}


def _entry(scope: Scope, entry: Object, values: Mapping[str, str]) -> str | None:
    source = entry.get("valueFrom")
    if source is None:
        return expand(str(entry.get("value") or ""), values)
    if "fieldRef" in source:
        return field_value(scope.pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource_value(scope.pod, scope.container, source["resourceFieldRef"], scope.allocatable)
    kind = "configmap" if "configMapKeyRef" in source else "secret"
    reference = source["configMapKeyRef" if kind == "configmap" else "secretKeyRef"]
    data = _data(scope.lookup, kind, reference)
    if reference["key"] not in data:
        if reference.get("optional"):
            return None
        raise ConfigError(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
    return data[reference["key"]]


def service_variables(services: Mapping[str, Object], namespace: str, links: bool) -> dict[str, str]:
    """The variables a kubelet sets for Services: `kubernetes` always, those of the namespace with service links."""
    values: dict[str, str] = {}
    for key, service in services.items():
        place, name = key.split("/")
        if key != "default/kubernetes" and not (links and place == namespace):
            continue
        address = service["spec"].get("clusterIP")
        ports = service["spec"].get("ports") or []
        if not address or address == "None" or not ports:
            continue
        prefix = name.upper().replace("-", "_")
        values[f"{prefix}_SERVICE_HOST"] = address
        values[f"{prefix}_SERVICE_PORT"] = str(ports[0]["port"])
        values[f"{prefix}_PORT"] = f"tcp://{address}:{ports[0]['port']}"
        for port in ports:
            if port.get("name"):
                values[f"{prefix}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
    return values
