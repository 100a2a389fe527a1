"""Names that more than one part must spell the same way: the API group, labels, annotations, field managers.

Nothing outside this module writes one of these strings out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

GROUP: Final = "tightship.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"

FIELD_MANAGER: Final = "tightship"
STATUS_FIELD_MANAGER: Final = "tightship-status"
PROFILER_FIELD_MANAGER: Final = "tightship-profiler"

NAME: Final = "app.kubernetes.io/name"
INSTANCE: Final = "app.kubernetes.io/instance"
COMPONENT: Final = "app.kubernetes.io/component"
PART_OF: Final = "app.kubernetes.io/part-of"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
SERVICE: Final = f"{GROUP}/service"
SERVICE_NAMESPACE: Final = f"{GROUP}/service-namespace"
PACK: Final = f"{GROUP}/pack"
PROFILE: Final = f"{GROUP}/profile"
PROFILE_KEY: Final = f"{GROUP}/profile-key"
LENGTHS: Final = f"{GROUP}/lengths"
"""On ConfigMaps whose entries are lengths of requests; its value doesn't matter."""

PRODUCT: Final = "tightship"
PART_OF_SELECTOR: Final = f"{PART_OF}={PRODUCT}"

COMPONENT_REPLICA: Final = "replica"
COMPONENT_HOLDER: Final = "holder"
COMPONENT_PROFILER: Final = "profiler"
COMPONENT_SERVICE: Final = "service"

ANNOTATION_GPU: Final = f"{GROUP}/gpu"
ANNOTATION_MPS: Final = f"{GROUP}/mps"
ANNOTATION_PREFLIGHT: Final = f"{GROUP}/preflight"
"""On a holder: what each replica saw of the GPU before its engine started, as JSON by pod UID."""
ANNOTATION_TEMPLATE: Final = f"{GROUP}/template"
ANNOTATION_REVISION: Final = f"{GROUP}/revision"
"""On a StatefulSet: hash of all that its replicas are made from."""
ANNOTATION_GENERATION: Final = f"{GROUP}/service-generation"
ANNOTATION_RERUN: Final = f"{GROUP}/rerun"
ANNOTATION_EXTEND: Final = f"{GROUP}/extend"
"""On a profiling Job: the `measurement.extend.request` that it answers."""
ANNOTATION_ASKED_BY: Final = f"{GROUP}/asked-by"
"""On a BatchProfile: the service that asked last, whose settings are in `spec.measurement`."""
ANNOTATION_MEASUREMENT: Final = f"{GROUP}/measurement"
"""On profiles that a command wrote: progress and outcome of the measurement, as JSON; `tightship profile --resume` reads it."""
ANNOTATION_NOTES: Final = f"{GROUP}/notes"
"""On profiles that a command wrote: what a reader of the figures must know, a line each."""

NODE_GPU_PRODUCT: Final = "nvidia.com/gpu.product"
NODE_GPU_SHARING: Final = "nvidia.com/gpu.sharing-strategy"
NODE_MIG_STRATEGY: Final = "nvidia.com/mig.strategy"
GPU_RESOURCE: Final = "nvidia.com/gpu"
SHARED_GPU_RESOURCE: Final = "nvidia.com/gpu.shared"
NODE_GPU_MEMORY: Final = "nvidia.com/gpu.memory"
MIG_RESOURCES: Final = "nvidia.com/mig-"
NODE_GPU_COUNT: Final = "nvidia.com/gpu.count"
NODE_GPU_REPLICAS: Final = "nvidia.com/gpu.replicas"
DRA_DRIVER: Final = "gpu.nvidia.com"
"""NVIDIA's driver for dynamic resource allocation; its DeviceClass for whole GPUs has the same name."""

_VALUE_LIMIT: Final = 63  # characters of a label's value


def key_value(key_hash: str) -> str:
    """The value of `PROFILE_KEY` for a key's hash: a SHA-256 in hex has one character more than a label's value may."""
    return key_hash[:_VALUE_LIMIT]


def extend_annotation(service: str) -> str:
    """On a BatchProfile: the `profiling.extend` of this service that has been dealt with. A service's name fits behind the slash."""
    return f"extend.{GROUP}/{service}"


def rerun_annotation(service: str) -> str:
    """The same of `profiling.rerun`."""
    return f"rerun.{GROUP}/{service}"


def common(instance: str, component: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The labels that every object made by Tightship carries, with `extra` added."""
    return {
        NAME: PRODUCT,
        INSTANCE: instance,
        COMPONENT: component,
        PART_OF: PRODUCT,
        MANAGED_BY: PRODUCT,
        **(extra or {}),
    }
