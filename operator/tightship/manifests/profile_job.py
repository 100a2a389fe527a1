"""The profiling Job and what lets it report: ServiceAccount, Role, RoleBinding.

One Job is one attempt at one profile: a pod of the user's own engine image that takes a whole GPU (or the cores of one
replica), with the profiler injected. What must always hold:

- the pod gets what a replica's pod gets (template, model, cache), else what is measured isn't what is served;
- its ServiceAccount may read this one profile and patch its status, nothing else; the template's `serviceAccountName` is for
  replicas only;
- the deadline is the pod's: a Job's would also count the wait for a GPU. It is a backstop; the profiler keeps the budget itself;
- the pod passes PodSecurity `baseline`: no host path, namespace or port, no privilege.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile
from tightship.api.v1alpha1.spec import ModelSpec
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
MAX_PROFILE_NAME: Final = 63
"""The profile's name is the value of a label."""
_MAX_JOB_NAME: Final = 63  # it becomes a label of its pods


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


def profile_job(profile: BatchProfile, attempt: int, image: OperatorImage) -> dict[str, Any]:
    """The Job that makes attempt number `attempt` at `profile`."""
    measurement = profile.spec.measurement
    annotations = {labels.ANNOTATION_RERUN: measurement.rerun} if measurement.rerun else None
    pod_metadata: dict[str, Any] = {"labels": {**measurement.template.metadata.labels, **_labels(profile)}}
    if measurement.template.metadata.annotations:
        pod_metadata["annotations"] = dict(measurement.template.metadata.annotations)
    name = job_name(profile.metadata.name, attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": owned_metadata(name, profile.metadata.namespace, _labels(profile), profile, annotations),
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "ttlSecondsAfterFinished": FINISHED_TTL_SECONDS,
            "template": {"metadata": pod_metadata, "spec": _pod_spec(profile, image)},
        },
    }


def pod_deadline(profile: BatchProfile) -> int:
    """Seconds after which Kubernetes ends a pod that didn't end by itself."""
    return math.ceil(units.parse_duration(profile.spec.measurement.budget)) + SETUP_SECONDS


def _labels(profile: BatchProfile) -> dict[str, str]:
    key = labels.key_value(profile.spec.key.hash)
    extra = {labels.PROFILE: profile.metadata.name, labels.PROFILE_KEY: key}
    return labels.common(profile.metadata.name, labels.COMPONENT_PROFILER, extra)


def _model(profile: BatchProfile) -> ModelSpec:
    key = profile.spec.key.model
    return ModelSpec(source=key.source, revision=key.revision, cache=profile.spec.measurement.cache)


def _pod_spec(profile: BatchProfile, image: OperatorImage) -> dict[str, Any]:
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
        "containers": [_engine_container(profile)],
        "volumes": [inject_volume(), token_volume(), *model_volumes(_model(profile)), *user.volumes],
    }


def _engine_container(profile: BatchProfile) -> dict[str, Any]:
    user = profile.spec.measurement.template.spec.engine
    return {
        "name": ENGINE_CONTAINER,
        "image": profile.spec.key.engine.image,
        "command": ["python3", "-m", "tightship.profiler"],
        # Of two variables of one name the later one counts: ours.
        "env": [*(each.to_dict() for each in user.env), *_environment(profile)],
        **({"envFrom": list(user.env_from)} if user.env_from else {}),
        "resources": _resources(profile),
        "volumeMounts": [
            inject_mount(),
            token_mount(),
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
    return [*({"name": name, "value": value} for name, value in values.items()), *model_env(_model(profile))]


def _resources(profile: BatchProfile) -> dict[str, Any]:
    """A whole GPU beside what a replica asks for; on CPU, Guaranteed, the cores of one replica and the memory of the pack.

    The cores are one replica's, since one replica is what the curve describes; the memory is all of the pack's, since how much
    of it a replica needs is what the measurement finds out.
    """
    asked = profile.spec.measurement.template.spec.engine.resources
    accelerator = profile.spec.key.accelerator
    if accelerator.device == "cpu":
        amount = {"cpu": str(accelerator.cores_per_replica or 1), "memory": str(accelerator.memory)}
        return {"requests": {**asked.requests, **amount}, "limits": {**asked.limits, **amount}}
    gpu = {labels.GPU_RESOURCE: "1"}
    return {"requests": {**asked.requests, **gpu}, "limits": {**asked.limits, **gpu}}
