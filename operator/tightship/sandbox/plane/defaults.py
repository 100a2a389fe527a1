"""What the server fills in for built-in kinds, where clients and controllers rely on it.

One function a kind, in place, after decoding and before validation. Filling in twice changes nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.values import dig, stamp


def _put(obj: Obj, **values: Any) -> None:
    for name, value in values.items():
        obj.setdefault(name, value)


def _probe(probe: Obj | None) -> None:
    if probe is None:
        return
    _put(probe, timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
    if "httpGet" in probe:
        _put(probe["httpGet"], path="/", scheme="HTTP")


def _container(container: Obj) -> None:
    image = container.get("image", "")
    latest = ":" not in image.rsplit("/", 1)[-1] or image.endswith(":latest")
    pull = "Always" if latest and "@" not in image else "IfNotPresent"
    _put(
        container,
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
        imagePullPolicy=pull,
        resources={},
    )
    for port in container.get("ports") or []:
        _put(port, protocol="TCP")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        _probe(container.get(name))
    for hook in ("postStart", "preStop"):
        get = dig(container, "lifecycle", hook, "httpGet")
        if get is not None:
            _put(get, path="/", scheme="HTTP")
    for variable in container.get("env") or []:
        reference = dig(variable, "valueFrom", "fieldRef")
        if reference is not None:
            _put(reference, apiVersion="v1")
        resource = dig(variable, "valueFrom", "resourceFieldRef")
        if resource is not None:
            _put(resource, divisor="0")
    resources = container["resources"]
    for name, limit in (resources.get("limits") or {}).items():
        resources.setdefault("requests", {}).setdefault(name, limit)


def _volume(volume: Obj) -> None:
    if list(volume) == ["name"]:
        volume["emptyDir"] = {}
    for kind in ("secret", "configMap", "downwardAPI", "projected"):
        if kind in volume:
            _put(volume[kind], defaultMode=420)
    for item in dig(volume, "downwardAPI", "items", default=[]):
        if "fieldRef" in item:
            _put(item["fieldRef"], apiVersion="v1")
    for source in dig(volume, "projected", "sources", default=[]):
        if "serviceAccountToken" in source:
            _put(source["serviceAccountToken"], expirationSeconds=3600)
        for item in dig(source, "downwardAPI", "items", default=[]):
            if "fieldRef" in item:
                _put(item["fieldRef"], apiVersion="v1")
    if "hostPath" in volume:
        _put(volume["hostPath"], type="")


def pod_spec(spec: Obj) -> None:
    """Defaults of a pod's spec, in a template too."""
    _put(
        spec,
        restartPolicy="Always",
        terminationGracePeriodSeconds=30,
        dnsPolicy="ClusterFirst",
        securityContext={},
        schedulerName="default-scheduler",
    )
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        _container(container)
    for volume in spec.get("volumes") or []:
        _volume(volume)
    if spec.get("hostNetwork"):
        for container in spec.get("containers") or []:
            for port in container.get("ports") or []:
                _put(port, hostPort=port["containerPort"])


def quality_of_service(spec: Obj) -> str:
    """``Guaranteed``, ``Burstable`` or ``BestEffort``."""
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    resources = [container.get("resources") or {} for container in containers]
    named = [
        {name: values for name in ("cpu", "memory") if (values := (entry.get(kind) or {}).get(name))}
        for entry in resources
        for kind in ("limits", "requests")
    ]
    if not any(named):
        return "BestEffort"
    for entry in resources:
        limits, requests = entry.get("limits") or {}, entry.get("requests") or {}
        if any(name not in limits or limits[name] != requests.get(name, limits[name]) for name in ("cpu", "memory")):
            return "Burstable"
    return "Guaranteed"


def _pod(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    pod_spec(spec)
    _put(
        spec, enableServiceLinks=True, serviceAccountName="default", preemptionPolicy="PreemptLowerPriority", priority=0
    )
    spec.setdefault("serviceAccount", spec["serviceAccountName"])
    tolerations = spec.setdefault("tolerations", [])
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(
            entry.get("key") in (key, None) and entry.get("effect") in ("NoExecute", None) for entry in tolerations
        ):
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
    status = obj.setdefault("status", {})
    _put(status, phase="Pending", qosClass=quality_of_service(spec))


def _template(spec: Obj) -> None:
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    pod_spec(template.setdefault("spec", {}))


def _stateful_set(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    _put(spec, replicas=1, podManagementPolicy="OrderedReady", revisionHistoryLimit=10, updateStrategy={})
    _put(spec["updateStrategy"], type="RollingUpdate")
    if spec["updateStrategy"]["type"] == "RollingUpdate":
        _put(spec["updateStrategy"], rollingUpdate={})
        _put(spec["updateStrategy"]["rollingUpdate"], partition=0)
    _put(spec, persistentVolumeClaimRetentionPolicy={"whenDeleted": "Retain", "whenScaled": "Retain"})
    _template(spec)
    for claim in spec.get("volumeClaimTemplates") or []:
        _put(claim, apiVersion="v1", kind="PersistentVolumeClaim", status={"phase": "Pending"})
        _put(claim.setdefault("spec", {}), volumeMode="Filesystem")
    obj.setdefault("status", {}).setdefault("replicas", 0)


def _deployment(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    _put(spec, replicas=1, revisionHistoryLimit=10, progressDeadlineSeconds=600, strategy={})
    _put(spec["strategy"], type="RollingUpdate")
    if spec["strategy"]["type"] == "RollingUpdate":
        _put(spec["strategy"], rollingUpdate={})
        _put(spec["strategy"]["rollingUpdate"], maxSurge="25%", maxUnavailable="25%")
    _template(spec)
    obj.setdefault("status", {})


def _replica_set(obj: Obj) -> None:
    _put(obj.setdefault("spec", {}), replicas=1)
    _template(obj["spec"])
    obj.setdefault("status", {}).setdefault("replicas", 0)


def _job(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    _put(spec, backoffLimit=6, completionMode="NonIndexed", suspend=False, podReplacementPolicy="TerminatingOrFailed")
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    _put(spec, parallelism=1, manualSelector=False)
    uid = obj["metadata"].get("uid")
    template = spec.setdefault("template", {})
    if uid and not spec["manualSelector"]:
        names = {"batch.kubernetes.io/controller-uid": uid, "controller-uid": uid}
        names |= {"batch.kubernetes.io/job-name": obj["metadata"]["name"], "job-name": obj["metadata"]["name"]}
        labels = template.setdefault("metadata", {}).setdefault("labels", {})
        labels.update(names)
        spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})
    own = dig(spec, "template", "metadata", "labels")
    if own and not obj["metadata"].get("labels"):
        obj["metadata"]["labels"] = dict(own)
    _template(spec)
    obj.setdefault("status", {})


def _service(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    _put(spec, type="ClusterIP", sessionAffinity="None")
    if spec["type"] != "ExternalName":
        _put(spec, internalTrafficPolicy="Cluster", ipFamilies=["IPv4"], ipFamilyPolicy="SingleStack")
    for port in spec.get("ports") or []:
        _put(port, protocol="TCP")
        _put(port, targetPort=port.get("port"))
    obj.setdefault("status", {}).setdefault("loadBalancer", {})


def _secret(obj: Obj) -> None:
    _put(obj, type="Opaque")
    for name, value in (obj.pop("stringData", None) or {}).items():
        obj.setdefault("data", {})[name] = base64.b64encode(value.encode()).decode()


def _namespace(obj: Obj) -> None:
    obj.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
    obj.setdefault("status", {}).setdefault("phase", "Active")
    obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"]["name"]


def _node(obj: Obj) -> None:
    obj.setdefault("spec", {})
    status = obj.setdefault("status", {})
    if "capacity" in status:
        status.setdefault("allocatable", dict(status["capacity"]))


def _volume_object(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    _put(spec, volumeMode="Filesystem", persistentVolumeReclaimPolicy="Retain")
    obj.setdefault("status", {}).setdefault("phase", "Pending")
    if "hostPath" in spec:
        _put(spec["hostPath"], type="")


def _claim(obj: Obj) -> None:
    _put(obj.setdefault("spec", {}), volumeMode="Filesystem")
    obj.setdefault("status", {}).setdefault("phase", "Pending")


def _event(obj: Obj) -> None:
    _put(obj, source={}, reportingComponent="", reportingInstance="")
    if "eventTime" not in obj:
        obj["eventTime"] = None


def _role_binding(obj: Obj) -> None:
    for subject in obj.get("subjects") or []:
        if subject.get("kind") in ("User", "Group"):
            _put(subject, apiGroup="rbac.authorization.k8s.io")
    if isinstance(obj.get("roleRef"), dict):
        _put(obj["roleRef"], apiGroup="rbac.authorization.k8s.io")


def _priority_class(obj: Obj) -> None:
    _put(obj, preemptionPolicy="PreemptLowerPriority")


def _autoscaler(obj: Obj) -> None:
    _put(obj.setdefault("spec", {}), minReplicas=1)
    obj.setdefault("status", {})


def _custom_resource_definition(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    _put(spec, conversion={"strategy": "None"})
    names = spec.setdefault("names", {})
    kind = names.get("kind", "")
    _put(names, singular=kind.lower(), listKind=f"{kind}List")
    status = obj.setdefault("status", {})
    status.setdefault("storedVersions", [v["name"] for v in spec.get("versions") or [] if v.get("storage")])
    status.setdefault("acceptedNames", dict(names))
    for kind_, reason, message in (
        ("NamesAccepted", "NoConflicts", "no conflicts found"),
        ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ):
        conditions = status.setdefault("conditions", [])
        if not any(entry["type"] == kind_ for entry in conditions):
            conditions.append(
                {
                    "type": kind_,
                    "status": "True",
                    "reason": reason,
                    "message": message,
                    "lastTransitionTime": stamp(),
                }
            )


_BY_KIND: dict[str, Callable[[Obj], None]] = {
    "Pod": _pod,
    "StatefulSet": _stateful_set,
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "ReplicationController": _replica_set,
    "Job": _job,
    "Service": _service,
    "Secret": _secret,
    "Namespace": _namespace,
    "Node": _node,
    "PersistentVolume": _volume_object,
    "PersistentVolumeClaim": _claim,
    "Event": _event,
    "RoleBinding": _role_binding,
    "ClusterRoleBinding": _role_binding,
    "PriorityClass": _priority_class,
    "HorizontalPodAutoscaler": _autoscaler,
    "CustomResourceDefinition": _custom_resource_definition,
}


def fill_in(obj: Obj) -> None:
    """Defaults of a built-in kind, in place."""
    filler = _BY_KIND.get(obj["kind"])
    if filler:
        filler(obj)


_EVENT_FIELDS = (
    ("message", "note"),
    ("involvedObject", "regarding"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
)


def event_to_core(event: Obj) -> Obj:
    """An ``events.k8s.io/v1`` Event as a core one."""
    names = {new: old for old, new in _EVENT_FIELDS}
    out = {names.get(key, key): value for key, value in event.items()}
    out["apiVersion"] = "v1"
    return out


def event_from_core(event: Obj) -> Obj:
    """A core Event as an ``events.k8s.io/v1`` one."""
    names = dict(_EVENT_FIELDS)
    out = {names.get(key, key): value for key, value in event.items()}
    out["apiVersion"] = "events.k8s.io/v1"
    return out
