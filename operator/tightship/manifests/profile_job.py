"""The profiling Job and what lets it report: ServiceAccount, Role, RoleBinding.

One Job is one attempt at one profile: a pod of the user's own engine image that takes a whole GPU (or the cores of the replicas it
tries), with the profiler injected. Its packing trials run several engines in the one container, under an MPS daemon of the
pod's own, so it gets CPU and memory for them, a place for the daemon's pipe and log, and shared memory. What must always hold:

- the pod gets what a replica's pod gets (template, model, cache), else what is measured isn't what is served;
- its ServiceAccount may read this one profile and patch its status, nothing else; the template's `serviceAccountName` is for
  replicas only;
- it asks for no more than a node has for one GPU: a pod that no node can take would keep the service from ever being measured;
- the deadline is the pod's: a Job's would also count the wait for a GPU. It is a backstop; the profiler keeps the budget itself;
- the pod passes PodSecurity `baseline`: no host path, namespace or port, no privilege.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile
from tightship.api.v1alpha1.spec import ModelSpec
from tightship.manifests import packdir
from tightship.manifests.podparts import (
    ENGINE_CONTAINER,
    LIBRARY,
    TOKEN_DIR,
    OperatorImage,
    inject_container,
    inject_mount,
    inject_volume,
    model_argument,
    model_env,
    model_mounts,
    model_volumes,
    owned_metadata,
    token_mount,
    token_volume,
)

BACKOFF_LIMIT: Final = 2
GRACE_SECONDS: Final = 60
FINISHED_TTL_SECONDS: Final = 3600
SETUP_SECONDS: Final = 2 * 3600
"""What a pod may take beyond its budget: image pull, download of the model, starts and stops of engines."""
START_SECONDS: Final = 600
"""What each replica of a trial may take besides: engines start one after the other."""
SHARED_MEMORY_PER_REPLICA: Final = 2**30
"""Bytes of /dev/shm for each engine: a container's 64 MiB are too few for several. What is used counts as the container's memory."""
MAX_PROFILE_NAME: Final = 63
"""The profile's name is the value of a label."""
LENGTHS_FILE: Final = "/lengths"
_LENGTHS_NAME: Final = "lengths"
_MAX_JOB_NAME: Final = 63  # it becomes a label of its pods
_SCALED: Final[Mapping[str, Callable[[str], int]]] = {"cpu": units.parse_cpu, "memory": units.parse_quantity}
"""What each replica needs of its own, with the way to read an amount of it."""


def access_name(profile: str) -> str:
    """Name of the ServiceAccount, Role and RoleBinding of a profile's Jobs."""
    return f"{profile}-profiler"


def job_name(profile: str, attempt: int) -> str:
    """Name of the Job that makes an attempt; long profile names are shortened with a hash."""
    name = f"{profile}-{attempt}"
    if len(name) <= _MAX_JOB_NAME:
        return name
    digest = hashlib.sha256(profile.encode()).hexdigest()[:8]
    return f"{profile[: _MAX_JOB_NAME - 10 - len(str(attempt))]}-{digest}-{attempt}"


def profiler_access(profile: BatchProfile) -> list[dict[str, Any]]:
    """ServiceAccount, Role and RoleBinding: read this one profile, patch its status."""
    name = access_name(profile.metadata.name)
    metadata = owned_metadata(name, profile.metadata.namespace, _labels(profile), profile)
    only = {"apiGroups": [labels.GROUP], "resourceNames": [profile.metadata.name]}
    rbac = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata,
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                {**only, "resources": ["batchprofiles"], "verbs": ["get"]},
                {**only, "resources": ["batchprofiles/status"], "verbs": ["get", "patch"]},
            ],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": profile.metadata.namespace}],
        },
    ]


def profile_job(profile: BatchProfile, attempt: int, image: OperatorImage, room: int | None = None) -> dict[str, Any]:
    """The Job that makes attempt number `attempt` at `profile`.

    `room`: replicas for which a node has CPU and memory beside one GPU; None where nobody knows.
    """
    measurement = profile.spec.measurement
    answers = {
        labels.ANNOTATION_RERUN: measurement.rerun,
        labels.ANNOTATION_EXTEND: measurement.extend.request if measurement.extend else None,
        labels.ANNOTATION_TEMPLATE: fingerprint(profile),
    }
    annotations = {name: value for name, value in answers.items() if value is not None}
    name = job_name(profile.metadata.name, attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": owned_metadata(name, profile.metadata.namespace, _labels(profile), profile, annotations),
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "ttlSecondsAfterFinished": FINISHED_TTL_SECONDS,
            "template": _pod_template(profile, image, room),
        },
    }


def fingerprint(profile: BatchProfile) -> str:
    """Of all that a profile's pod is made from but the operator's image and the nodes' room: another one, and it would run otherwise."""
    text = json.dumps(_pod_template(profile, OperatorImage(""), None), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pod_deadline(profile: BatchProfile) -> int:
    """Seconds after which Kubernetes ends a pod that didn't end by itself: its budgets, what a setup takes, and a start a replica."""
    measurement = profile.spec.measurement
    budgets = [measurement.budget, *([measurement.extend.budget] if measurement.extend else [])]
    starts = START_SECONDS * replicas_tried(profile)
    return sum(math.ceil(units.parse_duration(each)) for each in budgets) + SETUP_SECONDS + starts


def replicas_tried(profile: BatchProfile) -> int:
    """The most replicas that this profile's trials may run at once; on CPUs those that the pack has cores for."""
    measurement, accelerator = profile.spec.measurement, profile.spec.key.accelerator
    pairs = measurement.extend.pairs if measurement.extend else []
    most = max([measurement.max_replicas_per_gpu, *(pair.replicas for pair in pairs)])
    if accelerator.device == "cpu":
        return max(1, min(most, (accelerator.cores or 1) // (accelerator.cores_per_replica or 1)))
    return most


def room_on(profile: BatchProfile, allocatable: Mapping[str, str]) -> int | None:
    """Replicas for which a node that offers `allocatable` has CPU and memory beside one of its GPUs, at least 1.

    A tenth is left to what else runs on every node. None where the template asks for neither, so that any number fits.
    """
    gpus = units.parse_quantity(allocatable.get(labels.GPU_RESOURCE, "0"))
    asked = profile.spec.measurement.template.spec.engine.resources
    rooms = []
    for name, parse in _SCALED.items():
        each = parse(asked.requests.get(name) or asked.limits.get(name) or "0")
        if each and gpus:
            rooms.append(parse(allocatable.get(name, "0")) * 9 // (10 * gpus * each))
    return max(1, min(rooms)) if rooms else None


def _labels(profile: BatchProfile) -> dict[str, str]:
    key = labels.key_value(profile.spec.key.hash)
    extra = {labels.PROFILE: profile.metadata.name, labels.PROFILE_KEY: key}
    return labels.common(profile.metadata.name, labels.COMPONENT_PROFILER, extra)


def _model(profile: BatchProfile) -> ModelSpec:
    key = profile.spec.key.model
    return ModelSpec(source=key.source, revision=key.revision, cache=profile.spec.measurement.cache)


def _pod_template(profile: BatchProfile, image: OperatorImage, room: int | None) -> dict[str, Any]:
    user = profile.spec.measurement.template.metadata
    metadata: dict[str, Any] = {"labels": {**user.labels, **_labels(profile)}}
    if user.annotations:
        metadata["annotations"] = dict(user.annotations)
    return {"metadata": metadata, "spec": _pod_spec(profile, image, room)}


def _pod_spec(profile: BatchProfile, image: OperatorImage, room: int | None) -> dict[str, Any]:
    user = profile.spec.measurement.template.spec
    accelerator = profile.spec.key.accelerator
    selector = dict(user.node_selector)
    if accelerator.device == "cuda" and accelerator.product:
        selector[labels.NODE_GPU_PRODUCT] = accelerator.product
    optional = {
        "nodeSelector": selector,
        "tolerations": [each.to_dict() for each in user.tolerations],
        "affinity": user.affinity,
        "imagePullSecrets": list(user.image_pull_secrets),
        "priorityClassName": user.priority_class_name,
        "runtimeClassName": user.runtime_class_name,
        "securityContext": user.security_context,
    }
    return {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": pod_deadline(profile),
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "serviceAccountName": access_name(profile.metadata.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **{field: value for field, value in optional.items() if value},
        "initContainers": [inject_container(image)],
        "containers": [_engine_container(profile, room)],
        "volumes": [
            inject_volume(),
            token_volume(),
            *_sharing_volumes(profile),
            *_lengths_volumes(profile),
            *model_volumes(_model(profile)),
            *user.volumes,
        ],
    }


def _sharing_volumes(profile: BatchProfile) -> list[dict[str, Any]]:
    """For trials on a GPU: where the pod's own MPS daemon has its pipe and log, and the shared memory of engines and clients."""
    if profile.spec.key.accelerator.device == "cpu":
        return []
    size = units.format_quantity(SHARED_MEMORY_PER_REPLICA * replicas_tried(profile))
    return [{"name": "mps", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]


def _sharing_mounts(profile: BatchProfile) -> list[dict[str, Any]]:
    if profile.spec.key.accelerator.device == "cpu":
        return []
    return [{"name": "mps", "mountPath": packdir.MPS_PATH}, {"name": "shm", "mountPath": packdir.SHM_PATH}]


def _lengths_volumes(profile: BatchProfile) -> list[dict[str, Any]]:
    """The entry with the lengths that the key has the digest of."""
    source = profile.spec.measurement.lengths_from
    if source is None:
        return []
    items = [{"key": source.config_map.key, "path": _LENGTHS_NAME}]
    return [{"name": "tightship-lengths", "configMap": {"name": source.config_map.name, "items": items}}]


def _lengths_mounts(profile: BatchProfile) -> list[dict[str, Any]]:
    """By subPath, so that it stays as it was at the start: the kubelet would put a later edition in its place while it is read."""
    if profile.spec.measurement.lengths_from is None:
        return []
    return [{"name": "tightship-lengths", "mountPath": LENGTHS_FILE, "subPath": _LENGTHS_NAME, "readOnly": True}]


def _engine_container(profile: BatchProfile, room: int | None) -> dict[str, Any]:
    user = profile.spec.measurement.template.spec.engine
    return {
        "name": ENGINE_CONTAINER,
        "image": profile.spec.key.engine.image,
        "command": ["python3", "-m", "tightship.profiler"],
        # Of two variables of one name the later one counts: ours.
        "env": [*(each.to_dict() for each in user.env), *_environment(profile)],
        **({"envFrom": list(user.env_from)} if user.env_from else {}),
        "resources": _resources(profile, room),
        "volumeMounts": [
            inject_mount(),
            token_mount(),
            *_sharing_mounts(profile),
            *_lengths_mounts(profile),
            *model_mounts(_model(profile)),
            *(each.to_dict() for each in user.volume_mounts),
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _environment(profile: BatchProfile) -> list[dict[str, Any]]:
    accelerator = profile.spec.key.accelerator
    values = {
        "PYTHONPATH": LIBRARY,
        "TIGHTSHIP_PROFILE_NAMESPACE": profile.metadata.namespace or "",
        "TIGHTSHIP_PROFILE_NAME": profile.metadata.name,
        "TIGHTSHIP_TOKEN_FILE": f"{TOKEN_DIR}/token",
        "TIGHTSHIP_DEVICE": accelerator.device,
        "TIGHTSHIP_MODEL_PATH": model_argument(_model(profile)),
    }
    if accelerator.device == "cpu" and accelerator.memory:
        values["TIGHTSHIP_DEVICE_MEMORY"] = str(units.parse_quantity(accelerator.memory))
    if profile.spec.measurement.lengths_from is not None:
        values["TIGHTSHIP_LENGTHS_FILE"] = LENGTHS_FILE
    return [*({"name": name, "value": value} for name, value in values.items()), *model_env(_model(profile))]


def _resources(profile: BatchProfile, room: int | None) -> dict[str, Any]:
    """A whole GPU, and CPU and memory of the replicas that are tried; on CPU, Guaranteed, their cores and the memory of the pack.

    On a GPU the template's amounts are one replica's. Requests are those of as many replicas as a node has room for beside one GPU,
    limits those of all that may be tried. On CPU each engine computes on the cores of one replica; the memory is all of the
    pack's, since how much of it a replica needs is what the measurement finds out.
    """
    asked = profile.spec.measurement.template.spec.engine.resources
    accelerator, tried = profile.spec.key.accelerator, replicas_tried(profile)
    if accelerator.device == "cpu":
        amount = {"cpu": str((accelerator.cores_per_replica or 1) * tried), "memory": str(accelerator.memory)}
        return {"requests": {**asked.requests, **amount}, "limits": {**asked.limits, **amount}}
    gpu = {labels.GPU_RESOURCE: "1"}
    # Kubernetes takes a limit for the request where there is none: of all replicas at once, it might fit nowhere.
    implied = {name: amount for name, amount in asked.limits.items() if name in _SCALED}
    requests = _times({**implied, **asked.requests}, min(tried, room or tried))
    return {"requests": {**requests, **gpu}, "limits": {**_times(asked.limits, tried), **gpu}}


def _times(amounts: Mapping[str, str], replicas: int) -> dict[str, str]:
    """Amounts of CPU and memory for so many replicas; other resources are the pod's as a whole."""
    return {
        name: _written(name, _SCALED[name](amount) * replicas) if name in _SCALED and replicas > 1 else amount
        for name, amount in amounts.items()
    }


def _written(name: str, amount: int) -> str:
    return units.format_quantity(amount) if name == "memory" else units.format_cpu(amount)
