"""LLMService: one model, served by N packed replicas behind one Service. Written by users; status by the operator."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.common import (
    RESERVE_PATTERN,
    Conditions,
    Decimal,
    Duration,
    Metadata,
    Model,
    Name,
    Quantity,
    Share,
    Text,
    Wish,
    list_map,
    validations,
)
from tightship.api.v1alpha1.spec import (
    ACCELERATOR_RULES,
    SLO,
    WORKLOAD_RULES,
    AcceleratorSpec,
    EngineSpec,
    Metric,
    ModelSpec,
    Statistic,
    Workload,
)
from tightship.api.v1alpha1.template import PodTemplate

KIND = "LLMService"
PLURAL = "llmservices"
MAX_NAME_LENGTH = 40
"""StatefulSets add a hyphen and eight characters, and their pods' labels must stay below 63."""


class AdvisorSpec(Model):
    """How the batch is chosen."""

    efficiency_floor: Annotated[
        Decimal,
        Field(description="Least T(B) / (B T(1)): past it more batch buys almost nothing and only holds memory."),
    ] = "0.1"


class ProfilingSpec(Model):
    """How the model is measured."""

    budget: Annotated[
        Duration,
        Field(
            description="Time the measurement may take, from the first healthy engine (image pull and download don't count)."
        ),
    ] = "20m"
    rerun: Annotated[
        Wish,
        Field(
            description="Any new text measures again, on purpose, with this manifest's budget, objectives and template. Empty asks for nothing.",
        ),
    ] = None
    extend: Annotated[
        Wish,
        Field(
            description=(
                "Any new text has done what the measurement left unfinished, and the recommended packing tried where it is only estimated, with this "
                "budget. Empty asks for nothing."
            ),
        ),
    ] = None


class PackingSpec(Model):
    """How replicas share a GPU."""

    mode: Annotated[
        Literal["Auto", "Reservation", "DRA", "DevicePlugin", "Exclusive"],
        Field(
            description="Reservation: a holder pod takes the GPU and runs MPS. DRA: the replicas share a ResourceClaim, and NVIDIA's DRA driver runs "
            "MPS. DevicePlugin: each replica has a share of a node whose device plugin shares by MPS, with its limits on memory and threads. "
            "Exclusive: one replica a GPU, without MPS; also what a GPU gets where packing doesn't pay. Auto: DRA where the cluster "
            "offers GPUs so, else Reservation; the packs' SharingReady says which, and why."
        ),
    ] = "Auto"
    max_replicas_per_gpu: Annotated[
        int, Field(alias="maxReplicasPerGPU", ge=1, le=24, description="Most replicas of this service on one GPU.")
    ] = 8
    minimum_gain: Annotated[
        Decimal, Field(description="Packing is kept only where it gives this many times one replica's best throughput.")
    ] = "1.05"
    memory_reserve: Annotated[
        str,
        Field(
            max_length=32,
            pattern=RESERVE_PATTERN,
            description="Memory of the GPU left free: a percentage or a quantity.",
        ),
    ] = "5%"
    shared_with: Annotated[
        Literal["None", "SameNamespace"],
        Field(
            description="Whose replicas may be on a GPU beside this service's. SameNamespace: those of services of this namespace that say so "
            "too, on the same GPU product, in the same mode and as the same user. Latencies are measured without them."
        ),
    ] = "None"
    spread: Annotated[
        bool,
        Field(
            description="true keeps at most half of the replicas (rounded up) on one GPU, so that losing one leaves the others. "
            "It is a must: what has no second GPU waits for one."
        ),
    ] = False

    @property
    def most_per_gpu(self) -> int:
        """Most replicas of the service that its manifest lets on one GPU."""
        return 1 if self.mode == "Exclusive" else self.max_replicas_per_gpu


class RolloutSpec(Model):
    """How much of the service may be missing at a time."""

    max_unavailable: Annotated[
        Share,
        Field(
            description="Replicas that may be missing while the service counts as Available, that evictions may take, and that a roll-out "
            "replaces at a time: a number, or a percentage of spec.replicas, rounded up. On one GPU a roll-out replaces one at a time, "
            "and its first replica alone."
        ),
    ] = 1

    def least_serving(self, replicas: int) -> int:
        """How many of `replicas` have to serve: all but `maxUnavailable`, and one at the least.

        A percentage is rounded up, as the PodDisruptionBudget's is. One service of one replica is available only with that one.
        """
        share = self.max_unavailable
        missing = share if isinstance(share, int) else -(-replicas * int(share[:-1]) // 100)
        return min(replicas, max(1, replicas - missing))


class ProfileRef(Model):
    """A profile to use, by name."""

    name: Annotated[Name, Field(description="A BatchProfile of this namespace; its key must be this service's.")]


class EndpointPicker(Model):
    """The endpoint picker of an InferencePool: a Service of the namespace that a gateway asks where a request should go."""

    name: Annotated[Name, Field(description="The picker's Service.")]
    port: Annotated[int, Field(ge=1, le=65535, description="The port of that Service.")] = 9002
    failure_mode: Annotated[
        Literal["FailOpen", "FailClose"],
        Field(description="What a gateway does while the picker is silent: choose by itself, or drop the request."),
    ] = "FailClose"


ROUTING_RULE = (
    "!has(self.mode) || self.mode != 'InferencePool' || has(self.endpointPicker)",
    "mode InferencePool needs endpointPicker: a gateway asks it where each request should go",
)


class RoutingSpec(Model):
    """How requests find replicas."""

    mode: Annotated[
        Literal["Service", "InferencePool"],
        Field(
            description="Service: a ClusterIP, which spreads connections. InferencePool: beside it a pool of the Gateway API Inference "
            "Extension, for gateways that choose by request; where the cluster has none, the Service alone, and Accepted says so."
        ),
    ] = "Service"
    endpoint_picker: Annotated[
        EndpointPicker | None, Field(description="With mode InferencePool: who chooses the replica of a request.")
    ] = None


SPREAD_RULE = (
    "self.accelerator.device != 'cpu' || !has(self.template) || !has(self.template.spec) || "
    "!has(self.template.spec.topologySpreadConstraints) || self.template.spec.topologySpreadConstraints.size() == 0",
    "device cpu takes no topologySpreadConstraints: Tightship chooses the nodes of CPU packs itself",
)


class LLMServiceSpec(Model):
    """What the user asks for."""

    model: Annotated[ModelSpec, Field(description="Which model to serve.")]
    engine: Annotated[EngineSpec, Field(description="Which engine serves it.")]
    accelerator: Annotated[AcceleratorSpec, Field(description="What it runs on.", json_schema_extra=ACCELERATOR_RULES)]
    workload: Annotated[Workload, Field(description="The requests it will see.", json_schema_extra=WORKLOAD_RULES)]
    slo: Annotated[
        SLO,
        Field(description="The latency that must hold. Without objectives only the efficiency floor limits the batch."),
    ] = Field(default_factory=SLO)
    advisor: Annotated[AdvisorSpec, Field(description="How the batch is chosen.")] = Field(default_factory=AdvisorSpec)
    profiling: Annotated[ProfilingSpec, Field(description="How the model is measured.")] = Field(
        default_factory=ProfilingSpec
    )
    profile_ref: Annotated[
        ProfileRef | None, Field(description="A profile to use instead of the one found by key; its key must match.")
    ] = None
    packing: Annotated[PackingSpec, Field(description="How replicas share a GPU.")] = Field(default_factory=PackingSpec)
    replicas: Annotated[
        int, Field(ge=0, le=1000, description="How many replicas in all; `kubectl scale` writes it.")
    ] = 1
    routing: Annotated[
        RoutingSpec, Field(description="How requests find replicas.", json_schema_extra=validations(ROUTING_RULE))
    ] = Field(default_factory=RoutingSpec)
    rollout: Annotated[RolloutSpec, Field(description="How much of it may be missing at a time.")] = Field(
        default_factory=RolloutSpec
    )
    auto_apply: Annotated[
        bool,
        Field(
            description="false stops at a new recommendation, which isn't applied until this is true. What was applied before "
            "(status.lastApplied) goes on, and comes back."
        ),
    ] = True
    template: Annotated[
        PodTemplate, Field(description="What the profiling Job's and the replicas' pods get besides.")
    ] = Field(default_factory=PodTemplate)


class LatencyFigure(Model):
    """One latency beside the objective on it."""

    metric: Annotated[Metric, Field(description="InterTokenLatency or TimeToFirstToken.")]
    statistic: Annotated[Statistic, Field(description="The statistic of the objective.")]
    value: Annotated[Duration | None, Field(description="What it comes to; absent where it was not measured.")] = None
    max: Annotated[Duration, Field(description="The objective.")]


class DefaultEngine(Model):
    """The engine as its user would have run it, one replica to a GPU with its own default batch."""

    batch: Annotated[int, Field(description="Its default max_num_seqs.")]
    total_tokens_per_second: Annotated[Decimal | None, Field(description="Its tokens per second, saturated.")] = None
    latencies: Annotated[
        list[LatencyFigure], Field(max_length=2, description="Its latencies.", json_schema_extra=list_map("metric"))
    ] = Field(default_factory=list)
    meets_objectives: Annotated[bool | None, Field(description="Whether it meets the objectives.")] = None


class Applied(Model):
    """What is run until a better pair has been tried."""

    batch: Annotated[int, Field(description="vLLM's max_num_seqs.")]
    replicas_per_gpu: Annotated[int, Field(alias="replicasPerGPU", description="Replicas on one GPU.")]
    kv_cache: Annotated[Quantity | None, Field(description="KV cache of one replica.")] = None
    memory_per_replica: Annotated[Quantity | None, Field(description="GPU memory of one replica.")] = None
    expected_gain: Annotated[Decimal | None, Field(description="Its gain over the best of one replica.")] = None


class Recommendation(Model):
    """What the advisor decided, and why."""

    batch: Annotated[int, Field(description="Largest batch worth running: vLLM's max_num_seqs.")]
    kv_cache: Annotated[Quantity | None, Field(description="KV cache of one replica.")] = None
    memory_per_replica: Annotated[
        Quantity | None, Field(description="GPU memory of one replica, KV cache included.")
    ] = None
    replicas_per_gpu: Annotated[int, Field(alias="replicasPerGPU", description="Replicas on one GPU.")] = 1
    expected_gain: Annotated[
        Decimal | None,
        Field(description="Throughput of one packed GPU over the best of one replica that meets the SLO."),
    ] = None
    basis: Annotated[
        Literal["Measured", "Estimated"], Field(description="Whether the packing was measured or predicted.")
    ]
    tokens_per_second: Annotated[Decimal | None, Field(description="Tokens per second of one GPU.")] = None
    latencies: Annotated[
        list[LatencyFigure],
        Field(max_length=2, description="Latencies, packed.", json_schema_extra=list_map("metric")),
    ] = Field(default_factory=list)
    default_engine: Annotated[
        DefaultEngine | None, Field(description="The engine's own defaults beside it, measured in the same run.")
    ] = None
    applied: Annotated[
        Applied | None,
        Field(description="Where the recommendation is estimated: what runs until profiling.extend has had it tried."),
    ] = None
    binding_limit: Annotated[
        Literal["SLO", "Efficiency", "Memory", "Sweep"], Field(description="What kept the batch from being larger.")
    ]
    profile: Annotated[Text, Field(description="The BatchProfile it rests on.")]


class PackStatus(Model):
    """This service's part of one GPUPack."""

    name: Annotated[Text, Field(description="The GPUPack.")]
    node: Annotated[Text | None, Field(description="Its node.")] = None
    gpu: Annotated[Text | None, Field(description="Its GPU's UUID.")] = None
    replicas: Annotated[int, Field(description="Replicas of this service assigned to it.")] = 0
    ready: Annotated[int, Field(description="Of these, ready.")] = 0


class GPUCount(Model):
    """GPUs that the service holds, and those it would hold with one replica on each."""

    used: Annotated[int, Field(description="GPUs with replicas of it, those shared with other services included.")]
    saved: Annotated[int, Field(description="GPUs that one replica per GPU would have taken beyond these.")]


class ProfileStatus(Model):
    """The profile in use."""

    name: Annotated[Text, Field(description="The BatchProfile.")]
    key: Annotated[Text, Field(description="Hash of what was measured.")]


class AvoidedNode(Model):
    """A node on which replicas found no room."""

    node: Annotated[Text, Field(description="The node.")]
    since: Annotated[Text, Field(description="When it last turned out not to have room (RFC 3339).")]
    until: Annotated[Text, Field(description="Until when nothing of the service is put there (RFC 3339).")]
    times: Annotated[int, Field(ge=1, description="How often it turned out so; each time doubles the wait.")] = 1


class LastApplied(Model):
    """What replicas were last put on GPUs with."""

    profile: Annotated[Text, Field(description="The BatchProfile it rests on.")]
    batch: Annotated[int, Field(description="vLLM's max_num_seqs.")]
    kv_cache: Annotated[Quantity, Field(description="KV cache of one replica.")]
    memory_per_replica: Annotated[Quantity, Field(description="GPU memory of one replica.")]


class LLMServiceStatus(Model):
    """What the operator sees and decided."""

    observed_generation: Annotated[
        int | None, Field(description="The metadata.generation this status was computed from.")
    ] = None
    phase: Annotated[Text | None, Field(description="One word for people; programs read the conditions.")] = None
    replicas: Annotated[int, Field(description="Replica pods that exist.")] = 0
    ready_replicas: Annotated[int, Field(description="Of these, ready.")] = 0
    selector: Annotated[
        Text | None, Field(description="Label selector of the replicas, for the scale subresource.")
    ] = None
    profile: Annotated[ProfileStatus | None, Field(description="The profile in use.")] = None
    recommendation: Annotated[Recommendation | None, Field(description="What the advisor decided.")] = None
    last_applied: Annotated[
        LastApplied | None,
        Field(
            description="What replicas were last put on GPUs with. With autoApply: false this needs no new approval, also when none is left."
        ),
    ] = None
    packs: Annotated[
        list[PackStatus],
        Field(max_length=1000, description="Where the replicas are.", json_schema_extra=list_map("name")),
    ] = Field(default_factory=list)
    avoided_nodes: Annotated[
        list[AvoidedNode],
        Field(
            max_length=64,
            description="Nodes on which replicas found no room, or another GPU than their claim's, left alone for a while.",
            json_schema_extra=list_map("node"),
        ),
    ] = Field(default_factory=list)
    url: Annotated[Text | None, Field(description="Address of the OpenAI-compatible API inside the cluster.")] = None
    gpus: Annotated[GPUCount | None, Field(description="GPUs held and saved.")] = None
    conditions: Conditions = Field(default_factory=list)


class LLMService(Model):
    """One model, served by N packed replicas behind one Service."""

    api_version: Literal["tightship.dev/v1alpha1"] = labels.API_VERSION  # type: ignore[assignment]
    kind: Literal["LLMService"] = KIND  # type: ignore[assignment]
    metadata: Metadata = Field(default_factory=Metadata)
    spec: Annotated[
        LLMServiceSpec, Field(description="What the user asks for.", json_schema_extra=validations(SPREAD_RULE))
    ]
    status: LLMServiceStatus = Field(default_factory=LLMServiceStatus)


CRD: dict[str, Any] = {
    "plural": PLURAL,
    "singular": "llmservice",
    "short": ["llm"],
    "categories": ["tightship"],
    "scope": "Namespaced",
    "model": LLMService,
    "description": "An LLMService is one model, served by N packed replicas behind one Service.",
    "scale": {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    },
    "validations": [
        {
            "rule": f"self.metadata.name.size() <= {MAX_NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "message": f"the name is a DNS-1035 label (lower-case letters, digits, hyphens; a letter first) of at most {MAX_NAME_LENGTH} characters",
        }
    ],
    "columns": [
        {"name": "Model", "type": "string", "jsonPath": ".spec.model.source"},
        {"name": "GPU", "type": "string", "jsonPath": ".spec.accelerator.product"},
        {"name": "Batch", "type": "integer", "jsonPath": ".status.recommendation.batch"},
        {"name": "Per-GPU", "type": "integer", "jsonPath": ".status.recommendation.replicasPerGPU"},
        {"name": "Replicas", "type": "integer", "jsonPath": ".spec.replicas"},
        {"name": "Ready", "type": "integer", "jsonPath": ".status.readyReplicas"},
        {"name": "Reason", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].reason'},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {"name": "Gain", "type": "string", "jsonPath": ".status.recommendation.expectedGain", "priority": 1},
        {"name": "SLO", "type": "string", "jsonPath": ".spec.slo.objectives[0].max", "priority": 1},
        {"name": "URL", "type": "string", "jsonPath": ".status.url", "priority": 1},
        {
            "name": "Message",
            "type": "string",
            "jsonPath": '.status.conditions[?(@.type=="Ready")].message',
            "priority": 1,
        },
    ],
}
"""What the generated CustomResourceDefinition needs beyond the schema."""
