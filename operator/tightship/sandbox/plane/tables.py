"""Tables: what ``kubectl get`` prints.

A kind has columns (name, format, priority) and a function from an object to its cells. Custom resources use their
printer columns, everything else without columns of its own shows Name and Age.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from tightship.sandbox.plane import jsonpath
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.registry import Resource
from tightship.sandbox.plane.selectors import selector_text
from tightship.sandbox.plane.values import dig, now, parse_time

Cells = list[Any]
_NONE = "<none>"


def duration(seconds: float) -> str:
    """A length of time as kubectl prints ages: at most two units."""
    seconds = int(max(0, seconds))
    if seconds < 120:
        return f"{seconds}s"
    minutes = seconds // 60
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    hours = minutes // 60
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    days = hours // 24
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    if days < 365 * 2:
        return f"{days}d"
    years, rest = divmod(days, 365)
    return f"{years}y{rest}d" if years < 8 and rest else f"{years}y"


def age(text: str | None, at: datetime | None = None) -> str:
    """How long ago a time was, as kubectl prints it."""
    if not text:
        return "<unknown>"
    return duration(((at or now()) - parse_time(text)).total_seconds())


def _created(obj: Obj) -> str:
    return age(obj["metadata"].get("creationTimestamp"))


def _join(values: Any) -> str:
    return ",".join(str(value) for value in values) or _NONE


def _pod(pod: Obj) -> Cells:
    statuses = dig(pod, "status", "containerStatuses", default=[])
    restarts = sum(status.get("restartCount", 0) for status in statuses)
    ready = sum(bool(status.get("ready")) for status in statuses)
    total = len(pod["spec"].get("containers") or [])
    last = [at for status in statuses if (at := dig(status, "lastState", "terminated", "finishedAt"))]
    shown = f"{restarts} ({age(max(last))} ago)" if restarts and last else str(restarts)
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    status = pod.get("status") or {}
    return [
        pod["metadata"]["name"],
        f"{ready}/{total}",
        _pod_reason(pod),
        shown,
        _created(pod),
        status.get("podIP") or _NONE,
        pod["spec"].get("nodeName") or _NONE,
        status.get("nominatedNodeName") or _NONE,
        _join(gates),
    ]


def _pod_reason(pod: Obj) -> str:
    status = pod.get("status") or {}
    reason = str(status.get("reason") or status.get("phase") or "Unknown")
    initial = status.get("initContainerStatuses") or []
    for index, container in enumerate(initial):
        state = container.get("state") or {}
        ended = state.get("terminated")
        if ended and ended.get("exitCode") == 0:
            continue
        if ended:
            return _deleted(pod, f"Init:{ended.get('reason') or 'ExitCode:' + str(ended.get('exitCode'))}")
        waiting = dig(state, "waiting", "reason", default="")
        if waiting and waiting != "PodInitializing":
            return _deleted(pod, f"Init:{waiting}")
        return _deleted(pod, f"Init:{index}/{len(pod['spec'].get('initContainers') or [])}")
    running = False
    for container in reversed(status.get("containerStatuses") or []):
        state = container.get("state") or {}
        if dig(state, "waiting", "reason"):
            reason = state["waiting"]["reason"]
        elif dig(state, "terminated") is not None:
            ended = state["terminated"]
            reason = ended.get("reason") or (
                f"Signal:{ended['signal']}" if ended.get("signal") else f"ExitCode:{ended.get('exitCode')}"
            )
        elif container.get("ready") and "running" in state:
            running = True
    if reason == "Completed" and running:
        reason = "Running" if _true(pod, "Ready") else "NotReady"
    return _deleted(pod, reason)


def _deleted(pod: Obj, reason: str) -> str:
    if not pod["metadata"].get("deletionTimestamp"):
        return reason
    return "Unknown" if dig(pod, "status", "reason") == "NodeLost" else "Terminating"


def _true(obj: Obj, kind: str) -> bool:
    conditions = dig(obj, "status", "conditions", default=[])
    return any(entry["type"] == kind and entry["status"] == "True" for entry in conditions)


def _node(node: Obj) -> Cells:
    state = "Ready" if _true(node, "Ready") else "NotReady"
    if not any(entry["type"] == "Ready" for entry in dig(node, "status", "conditions", default=[])):
        state = "Unknown"
    if node["spec"].get("unschedulable"):
        state += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = [key[len(prefix) :] for key in node["metadata"].get("labels") or {} if key.startswith(prefix)]
    info = dig(node, "status", "nodeInfo", default={})
    addresses = {entry["type"]: entry["address"] for entry in dig(node, "status", "addresses", default=[])}
    return [
        node["metadata"]["name"],
        state,
        _join(sorted(roles)),
        _created(node),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP", _NONE),
        addresses.get("ExternalIP", _NONE),
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


def _service(service: Obj) -> Cells:
    spec = service["spec"]
    ports = [
        f"{port['port']}:{port['nodePort']}/{port['protocol']}"
        if port.get("nodePort")
        else f"{port['port']}/{port['protocol']}"
        for port in spec.get("ports") or []
    ]
    external = spec.get("externalName") or _join(spec.get("externalIPs") or [])
    return [
        service["metadata"]["name"],
        spec["type"],
        spec.get("clusterIP") or _NONE,
        external,
        _join(ports),
        _created(service),
        selector_text({"matchLabels": spec.get("selector") or {}}) or _NONE,
    ]


def _containers(obj: Obj) -> tuple[str, str]:
    containers = dig(obj, "spec", "template", "spec", "containers", default=[])
    return _join(c["name"] for c in containers), _join(c.get("image", "") for c in containers)


def _stateful_set(obj: Obj) -> Cells:
    names, images = _containers(obj)
    ready = dig(obj, "status", "readyReplicas", default=0)
    return [obj["metadata"]["name"], f"{ready}/{obj['spec']['replicas']}", _created(obj), names, images]


def _deployment(obj: Obj) -> Cells:
    names, images = _containers(obj)
    status = obj.get("status") or {}
    return [
        obj["metadata"]["name"],
        f"{status.get('readyReplicas', 0)}/{obj['spec']['replicas']}",
        status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0),
        _created(obj),
        names,
        images,
        selector_text(obj["spec"].get("selector")),
    ]


def _replica_set(obj: Obj) -> Cells:
    names, images = _containers(obj)
    status = obj.get("status") or {}
    return [
        obj["metadata"]["name"],
        obj["spec"]["replicas"],
        status.get("replicas", 0),
        status.get("readyReplicas", 0),
        _created(obj),
        names,
        images,
        selector_text(obj["spec"].get("selector")),
    ]


def _job(job: Obj) -> Cells:
    spec, status = job["spec"], job.get("status") or {}
    wanted = spec.get("completions")
    done = status.get("succeeded", 0)
    completions = f"{done}/{wanted}" if wanted is not None else f"{done}/1 of {spec.get('parallelism', 1)}"
    state = "Running"
    for kind, label in (("Complete", "Complete"), ("Failed", "Failed"), ("Suspended", "Suspended")):
        if _true(job, kind):
            state = label
    if job["metadata"].get("deletionTimestamp"):
        state = "Terminating"
    length = ""
    if status.get("startTime"):
        end = status.get("completionTime")
        length = age(status["startTime"], parse_time(end) if end else None)
    names, images = _containers(job)
    return [
        job["metadata"]["name"],
        state,
        completions,
        length,
        _created(job),
        names,
        images,
        selector_text(spec.get("selector")),
    ]


def _event(event: Obj) -> Cells:
    involved = event.get("involvedObject") or event.get("regarding") or {}
    last = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp")
    first = event.get("firstTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp")
    source = dig(event, "source", "component") or event.get("reportingComponent") or ""
    name = f"{str(involved.get('kind', '')).lower()}/{involved.get('name', '')}"
    return [
        age(last),
        event.get("type", ""),
        event.get("reason", ""),
        name,
        involved.get("fieldPath", ""),
        source,
        str(event.get("message") or event.get("note") or "").strip(),
        age(first),
        event.get("count") or 1,
        event["metadata"]["name"],
    ]


def _endpoints(obj: Obj) -> Cells:
    shown = [
        f"{address['ip']}:{port['port']}"
        for subset in obj.get("subsets") or []
        for port in subset.get("ports") or []
        for address in subset.get("addresses") or []
    ]
    more = f" + {len(shown) - 3} more..." if len(shown) > 3 else ""
    return [obj["metadata"]["name"], (_join(shown[:3]) + more), _created(obj)]


def _slice(obj: Obj) -> Cells:
    addresses = [address for endpoint in obj.get("endpoints") or [] for address in endpoint["addresses"]]
    more = f" + {len(addresses) - 3} more..." if len(addresses) > 3 else ""
    ports = _join(port.get("port", "*") for port in obj.get("ports") or [])
    return [obj["metadata"]["name"], obj["addressType"], ports, _join(addresses[:3]) + more, _created(obj)]


def _claim(obj: Obj) -> Cells:
    status, spec = obj.get("status") or {}, obj["spec"]
    phase = "Terminating" if obj["metadata"].get("deletionTimestamp") else status.get("phase", "")
    bound = bool(spec.get("volumeName"))
    return [
        obj["metadata"]["name"],
        phase,
        spec.get("volumeName", ""),
        dig(status, "capacity", "storage", default="") if bound else "",
        _modes(status.get("accessModes") or []) if bound else "",
        spec.get("storageClassName", ""),
        spec.get("volumeAttributesClassName") or "<unset>",
        _created(obj),
        spec.get("volumeMode", ""),
    ]


def _volume(obj: Obj) -> Cells:
    spec, claim = obj["spec"], obj["spec"].get("claimRef")
    phase = "Terminating" if obj["metadata"].get("deletionTimestamp") else dig(obj, "status", "phase", default="")
    return [
        obj["metadata"]["name"],
        dig(spec, "capacity", "storage", default=""),
        _modes(spec.get("accessModes") or []),
        spec.get("persistentVolumeReclaimPolicy", ""),
        phase,
        f"{claim['namespace']}/{claim['name']}" if claim else "",
        spec.get("storageClassName", ""),
        spec.get("volumeAttributesClassName") or "<unset>",
        dig(obj, "status", "reason", default=""),
        _created(obj),
        spec.get("volumeMode", ""),
    ]


def _modes(modes: list[str]) -> str:
    short = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}
    return ",".join(short.get(mode, mode) for mode in modes)


def _simple(*paths: str) -> Callable[[Obj], Cells]:
    def cells(obj: Obj) -> Cells:
        return [obj["metadata"]["name"], *(dig(obj, *path.split("."), default="") for path in paths), _created(obj)]

    return cells


def _counted(field: str) -> Callable[[Obj], Cells]:
    return lambda obj: [obj["metadata"]["name"], len(obj.get(field) or {}), _created(obj)]


def _binding(obj: Obj) -> Cells:
    return [obj["metadata"]["name"], f"{obj['roleRef']['kind']}/{obj['roleRef']['name']}", _created(obj)]


def _autoscaler(obj: Obj) -> Cells:
    spec, target = obj["spec"], obj["spec"]["scaleTargetRef"]
    return [
        obj["metadata"]["name"],
        f"{target['kind']}/{target['name']}",
        "<unknown>",
        spec.get("minReplicas", 1),
        spec["maxReplicas"],
        dig(obj, "status", "currentReplicas", default=0),
        _created(obj),
    ]


def _crd(obj: Obj) -> Cells:
    return [obj["metadata"]["name"], obj["metadata"]["creationTimestamp"]]


def _budget(obj: Obj) -> Cells:
    spec = obj["spec"]
    allowed = dig(obj, "status", "disruptionsAllowed", default=0)
    return [
        obj["metadata"]["name"],
        spec.get("minAvailable", "N/A"),
        spec.get("maxUnavailable", "N/A"),
        allowed,
        _created(obj),
    ]


# Columns: a leading "+" marks what only -o wide shows.
_TABLES: dict[str, tuple[str, Callable[[Obj], Cells]]] = {
    "Pod": ("Name|Ready|Status|Restarts|Age|+IP|+Node|+Nominated Node|+Readiness Gates", _pod),
    "Node": (
        "Name|Status|Roles|Age|Version|+Internal-IP|+External-IP|+OS-Image|+Kernel-Version|+Container-Runtime",
        _node,
    ),
    "Namespace": ("Name|Status|Age", _simple("status.phase")),
    "Service": ("Name|Type|Cluster-IP|External-IP|Port(s)|Age|+Selector", _service),
    "Endpoints": ("Name|Endpoints|Age", _endpoints),
    "EndpointSlice": ("Name|AddressType|Ports|Endpoints|Age", _slice),
    "ConfigMap": ("Name|Data|Age", _counted("data")),
    "Secret": (
        "Name|Type|Data|Age",
        lambda obj: [obj["metadata"]["name"], obj.get("type", ""), len(obj.get("data") or {}), _created(obj)],
    ),
    "ServiceAccount": ("Name|Age", _simple()),
    "Event": (
        "Last Seen|Type|Reason|Object|+Subobject|+Source|Message|+First Seen|+Count|+Name",
        _event,
    ),
    "PersistentVolumeClaim": (
        "Name|Status|Volume|Capacity|Access Modes|StorageClass|VolumeAttributesClass|Age|+VolumeMode",
        _claim,
    ),
    "PersistentVolume": (
        "Name|Capacity|Access Modes|Reclaim Policy|Status|Claim|StorageClass|VolumeAttributesClass|Reason|Age|+VolumeMode",
        _volume,
    ),
    "StatefulSet": ("Name|Ready|Age|+Containers|+Images", _stateful_set),
    "Deployment": ("Name|Ready|Up-to-date|Available|Age|+Containers|+Images|+Selector", _deployment),
    "ReplicaSet": ("Name|Desired|Current|Ready|Age|+Containers|+Images|+Selector", _replica_set),
    "ControllerRevision": (
        "Name|Controller|Revision|Age",
        lambda obj: [
            obj["metadata"]["name"],
            next(
                (f"{ref['kind'].lower()}.apps/{ref['name']}" for ref in obj["metadata"].get("ownerReferences") or []),
                _NONE,
            ),
            obj.get("revision", 0),
            _created(obj),
        ],
    ),
    "Job": ("Name|Status|Completions|Duration|Age|+Containers|+Images|+Selector", _job),
    "Lease": ("Name|Holder|Age", _simple("spec.holderIdentity")),
    "PodDisruptionBudget": ("Name|Min Available|Max Unavailable|Allowed Disruptions|Age", _budget),
    "Role": ("Name|Created At", _crd),
    "ClusterRole": ("Name|Created At", _crd),
    "RoleBinding": ("Name|Role|Age", _binding),
    "ClusterRoleBinding": ("Name|Role|Age", _binding),
    "PriorityClass": (
        "Name|Value|Global-Default|Age",
        lambda obj: [obj["metadata"]["name"], obj.get("value", 0), bool(obj.get("globalDefault")), _created(obj)],
    ),
    "RuntimeClass": ("Name|Handler|Age", _simple("handler")),
    "HorizontalPodAutoscaler": ("Name|Reference|Targets|MinPods|MaxPods|Replicas|Age", _autoscaler),
    "CustomResourceDefinition": ("Name|Created At", _crd),
}


def _column(text: str) -> Obj:
    wide = text.startswith("+")
    name = text.lstrip("+")
    return {
        "name": name,
        "type": "string",
        "format": "name" if name == "Name" else "",
        "description": "",
        "priority": int(wide),
    }


def _printed(column: Obj, obj: Obj) -> Any:
    found = jsonpath.find(column["jsonPath"], obj)
    if not found or found[0] is None:
        return None
    value = found[0]
    if column["type"] == "date":
        return age(str(value))
    if column["type"] == "string":
        if isinstance(value, (dict, list)) or len(found) > 1:
            return _go_text(value)
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value


def _go_text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(f'"{item}"' if isinstance(item, str) else str(item) for item in value) + "]"
    return str(value)


def columns_of(resource: Resource) -> list[Obj]:
    """The column definitions of a resource's table."""
    if resource.custom:
        columns = [_column("Name")]
        for entry in resource.columns:
            columns.append(
                {
                    "name": entry["name"],
                    "type": entry["type"],
                    "format": entry.get("format", ""),
                    "description": entry.get("description", ""),
                    "priority": entry.get("priority", 0),
                }
            )
        return columns
    header = _TABLES.get(resource.kind, ("Name|Age", _simple()))[0]
    return [_column(text) for text in header.split("|")]


def cells_of(resource: Resource, obj: Obj) -> Cells:
    """The cells of one object's row."""
    if resource.custom:
        return [obj["metadata"]["name"], *(_printed(column, obj) for column in resource.columns)]
    return _TABLES.get(resource.kind, ("", _simple()))[1](obj)


def table(resource: Resource, objects: list[Obj], meta: Obj, include: str, header: bool = True) -> Obj:
    """A ``meta.k8s.io/v1`` Table of the objects; ``include`` is ``Metadata`` (default), ``Object`` or ``None``."""
    rows = []
    for obj in objects:
        row: Obj = {"cells": cells_of(resource, obj)}
        if include == "Object":
            row["object"] = obj
        elif include != "None":
            row["object"] = partial(obj)
        rows.append(row)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "columnDefinitions": columns_of(resource) if header else [],
        "rows": rows,
    }


def partial(obj: Obj) -> Obj:
    """An object's ``PartialObjectMetadata``."""
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
