"""The bounded subset of a PodTemplate that users may set for the profiling Job and the replicas alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.common import ATOMIC, PRESERVE_UNKNOWN, Model, Name, Quantity, Text, list_map, validations

RESERVED_ENV = (
    "TIGHTSHIP_",
    "CUDA_MPS_",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "PYTHONPATH",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
)
"""Environment variables (or their prefixes) that Tightship sets itself."""

RESERVED_PREFIX = f"{labels.GROUP}/"
RESERVED_LABELS = (labels.NAME, labels.INSTANCE, labels.COMPONENT, labels.PART_OF, labels.MANAGED_BY)
"""Labels that Tightship sets itself, by which it finds its pods: a user's value would be lost, or lose the pod."""

# Of a map's keys the API server knows no greatest length, and counts `matches` on them as too dear: hence no pattern.
LABELS_RULE = (
    f"self.all(k, !k.startsWith('{RESERVED_PREFIX}') && "
    + " && ".join(f"k != '{name}'" for name in RESERVED_LABELS)
    + ")",
    f"these labels are set by Tightship itself: {RESERVED_PREFIX}*, {', '.join(RESERVED_LABELS)}",
)
ANNOTATIONS_RULE = (
    f"self.all(k, !k.startsWith('{RESERVED_PREFIX}'))",
    f"annotations under {RESERVED_PREFIX} are Tightship's own",
)


class EnvVar(Model):
    """One environment variable, as in a Pod."""

    name: Annotated[Name, Field(description="Name of the variable.")]
    value: Annotated[str | None, Field(max_length=4096, description="Its value.")] = None
    value_from: Annotated[
        dict[str, Any] | None,
        Field(
            description="Its source, as in a Pod (configMapKeyRef, secretKeyRef, ...).",
            json_schema_extra=PRESERVE_UNKNOWN,
        ),
    ] = None


class Toleration(Model):
    """One toleration, as in a Pod."""

    key: Annotated[Text | None, Field(description="Taint key; empty with operator Exists matches every taint.")] = None
    operator: Annotated[Literal["Exists", "Equal"] | None, Field(description="Exists or Equal (default).")] = None
    value: Annotated[Text | None, Field(description="Taint value, with operator Equal.")] = None
    effect: Annotated[
        Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None, Field(description="Effect; empty matches all.")
    ] = None
    toleration_seconds: Annotated[int | None, Field(description="How long a NoExecute taint is tolerated.")] = None


class TopologySpread(Model):
    """One topology spread constraint, over the GPUs that a service holds."""

    max_skew: Annotated[int, Field(ge=1, le=1000, description="How many more GPUs one domain may have than another.")]
    topology_key: Annotated[
        Text,
        Field(min_length=1, description="Node label whose values are the domains, such as kubernetes.io/hostname."),
    ]
    when_unsatisfiable: Annotated[
        Literal["DoNotSchedule", "ScheduleAnyway"],
        Field(description="DoNotSchedule lets the GPU wait for a place that fits, ScheduleAnyway takes the next best."),
    ]


class VolumeMount(Model):
    """One mount of a volume into the engine's container."""

    name: Annotated[Name, Field(description="Name of a volume of the template.")]
    mount_path: Annotated[str, Field(max_length=1024, description="Where it appears in the container.")]
    sub_path: Annotated[Text | None, Field(description="Path inside the volume.")] = None
    read_only: Annotated[bool | None, Field(description="Mount it read-only.")] = None


class Resources(Model):
    """Requests and limits of the engine's container. GPUs are Tightship's to ask for."""

    requests: Annotated[
        dict[str, Quantity], Field(max_length=16, description="Resource requests, such as cpu and memory.")
    ] = Field(default_factory=dict)
    limits: Annotated[dict[str, Quantity], Field(max_length=16, description="Resource limits.")] = Field(
        default_factory=dict
    )


class EngineContainer(Model):
    """What the engine's container gets beyond what Tightship sets."""

    env: Annotated[
        list[EnvVar],
        Field(
            max_length=64,
            description="Environment variables. Names that Tightship sets itself are refused.",
            json_schema_extra=list_map("name")
            | validations(
                (
                    "self.all(e, !e.name.matches('^(" + "|".join(RESERVED_ENV) + ")'))",
                    "these variables are set by Tightship itself: " + ", ".join(RESERVED_ENV),
                )
            ),
        ),
    ] = Field(default_factory=list)
    env_from: Annotated[
        list[dict[str, Any]],
        Field(
            max_length=16,
            description="Sources of environment variables, such as a Secret with a model hub's token.",
            json_schema_extra=ATOMIC,
        ),
    ] = Field(default_factory=list)
    volume_mounts: Annotated[
        list[VolumeMount],
        Field(max_length=32, description="Mounts of the template's volumes.", json_schema_extra=list_map("mountPath")),
    ] = Field(default_factory=list)
    resources: Annotated[Resources, Field(description="CPU and memory of one replica.")] = Field(
        default_factory=Resources
    )


class TemplateMetadata(Model):
    """Labels and annotations added to the pods."""

    labels: Annotated[
        dict[str, Text],
        Field(
            max_length=64,
            description="Labels added to the pods. Those that Tightship sets itself are refused.",
            json_schema_extra=validations(LABELS_RULE),
        ),
    ] = Field(default_factory=dict)
    annotations: Annotated[
        dict[str, str],
        Field(
            max_length=64,
            description=f"Annotations added to the pods. Those under {RESERVED_PREFIX} are refused.",
            json_schema_extra=validations(ANNOTATIONS_RULE),
        ),
    ] = Field(default_factory=dict)


class TemplateSpec(Model):
    """Scheduling, identity and volumes of the pods."""

    node_selector: Annotated[dict[str, Text], Field(max_length=32, description="Labels a node must have.")] = Field(
        default_factory=dict
    )
    tolerations: Annotated[
        list[Toleration], Field(max_length=32, description="Taints the pods tolerate.", json_schema_extra=ATOMIC)
    ] = Field(default_factory=list)
    affinity: Annotated[
        dict[str, Any] | None, Field(description="Affinity, as in a Pod.", json_schema_extra=PRESERVE_UNKNOWN)
    ] = None
    topology_spread_constraints: Annotated[
        list[TopologySpread],
        Field(
            max_length=8,
            description="How the GPUs that the service holds spread over nodes or zones. Replicas go where their GPU is. Tightship adds the "
            "label selector. Not with device cpu, whose nodes Tightship chooses itself.",
            json_schema_extra=list_map("topologyKey", "whenUnsatisfiable"),
        ),
    ] = Field(default_factory=list)
    image_pull_secrets: Annotated[
        list[dict[str, str]],
        Field(max_length=16, description="Secrets for pulling the engine's image.", json_schema_extra=ATOMIC),
    ] = Field(default_factory=list)
    service_account_name: Annotated[
        Text | None, Field(description="ServiceAccount of the replicas; the profiling Job has its own.")
    ] = None
    priority_class_name: Annotated[Text | None, Field(description="PriorityClass of Job, holders and replicas.")] = None
    runtime_class_name: Annotated[
        Text | None, Field(description="RuntimeClass that gives containers the GPU, often `nvidia`.")
    ] = None
    security_context: Annotated[
        dict[str, Any] | None,
        Field(
            description="Pod security context. runAsUser is also the user of the MPS daemon, which must be the same.",
            json_schema_extra=PRESERVE_UNKNOWN,
        ),
    ] = None
    volumes: Annotated[
        list[dict[str, Any]],
        Field(max_length=32, description="Volumes, as in a Pod.", json_schema_extra=ATOMIC),
    ] = Field(default_factory=list)
    engine: Annotated[EngineContainer, Field(description="The engine's container.")] = Field(
        default_factory=EngineContainer
    )

    @property
    def run_as_user(self) -> int:
        """The user of the replicas and of the MPS daemon; 0 where the template names none."""
        user = (self.security_context or {}).get("runAsUser")
        return user if isinstance(user, int) else 0


class PodTemplate(Model):
    """A bounded subset of a PodTemplate."""

    metadata: Annotated[TemplateMetadata, Field(description="Labels and annotations added to the pods.")] = Field(
        default_factory=TemplateMetadata
    )
    spec: Annotated[TemplateSpec, Field(description="Scheduling, identity and volumes of the pods.")] = Field(
        default_factory=TemplateSpec
    )
