"""GPUPack: one physical GPU, or one CPU set, that Tightship holds. Written by the placement pass alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.common import Conditions, Metadata, Model, Name, Quantity, Text, list_map

KIND = "GPUPack"
PLURAL = "gpupacks"


class Assignment(Model):
    """Replicas of one service on this GPU."""

    service: Annotated[Name, Field(description="The LLMService, in the pack's namespace.")]
    uid: Annotated[Text, Field(description="Its UID: a service made anew under the same name is another one.")]
    replicas: Annotated[int, Field(ge=0, le=48, description="How many of its replicas run here.")]
    batch: Annotated[int, Field(ge=1, description="Their batch: vLLM's max_num_seqs.")]
    kv_cache: Annotated[Quantity, Field(description="KV cache of each.")]
    memory_per_replica: Annotated[Quantity, Field(description="Memory of each, KV cache included.")]
    profile: Annotated[Name, Field(description="The BatchProfile these figures come from.")]


class GPUPackSpec(Model):
    """Which GPU is wanted, and who is on it."""

    namespace: Annotated[Name, Field(description="Namespace of the services on this GPU.")]
    device: Annotated[Literal["cuda", "cpu"], Field(description="cuda, or cpu for a set of cores.")] = "cuda"
    product: Annotated[Text | None, Field(description="GPU product, as on the node's label.")] = None
    mode: Annotated[
        Literal["Reservation", "DRA", "DevicePlugin", "Exclusive", "CPUSet"],
        Field(
            description="How the GPU is shared. Reservation: a holder pod has it and runs MPS. DRA: a ResourceClaim of all replicas, MPS by its "
            "driver. DevicePlugin: each replica has a share that the device plugin makes by MPS. Exclusive: one replica has it alone. CPUSet: "
            "cores in place of a GPU."
        ),
    ] = "Reservation"
    allocator: Annotated[
        Literal["DevicePlugin", "DRA"],
        Field(
            description="Who hands the GPU out: the device plugin for nvidia.com/gpu, or DRA for a ResourceClaim of the pack's name."
        ),
    ] = "DevicePlugin"
    resource: Annotated[
        Text, Field(description="With allocator DevicePlugin: what the holder, or each replica, requests one of.")
    ] = labels.GPU_RESOURCE
    run_as_user: Annotated[int, Field(ge=0, description="User of the MPS daemon and of every replica.")] = 0
    node: Annotated[Text | None, Field(description="With device cpu: the node whose cores these are.")] = None
    cores: Annotated[int | None, Field(ge=1, description="With device cpu: how many cores.")] = None
    memory: Annotated[Quantity | None, Field(description="With device cpu: how much memory.")] = None
    excluded_nodes: Annotated[
        list[Text],
        Field(
            max_length=64,
            description="Nodes that turned out not to fit.",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = Field(default_factory=list)
    assignments: Annotated[
        list[Assignment],
        Field(max_length=16, description="Who is on it.", json_schema_extra=list_map("uid")),
    ] = Field(default_factory=list)

    @property
    def has_holder(self) -> bool:
        """Whether a pod of its own holds the GPU, so that the replicas request none."""
        return self.device == "cuda" and self.mode == "Reservation"

    @property
    def claims(self) -> bool:
        """Whether the replicas get the GPU by a ResourceClaim."""
        return self.allocator == "DRA"


class PackGPU(Model):
    """The GPU this pack holds, as seen on the node."""

    uuid: Annotated[Text | None, Field(description="UUID of the GPU.")] = None
    product: Annotated[Text | None, Field(description="Product, as the driver names it.")] = None
    memory: Annotated[Quantity | None, Field(description="Memory of the whole GPU, or of the CPU set.")] = None
    driver: Annotated[Text | None, Field(description="Driver version.")] = None


class PackLedger(Model):
    """Memory given out and left."""

    assigned: Annotated[Quantity, Field(description="Memory that the assigned replicas may use.")]
    free: Annotated[Quantity | None, Field(description="Memory left, the reserve included.")] = None


class PackMPS(Model):
    """The MPS daemon of this GPU."""

    state: Annotated[Literal["ACTIVE", "IDLE", "FAULT", "DOWN"], Field(description="What its server says of itself.")]
    clients: Annotated[int, Field(description="Processes attached to it.")] = 0
    attached_replicas: Annotated[int, Field(description="Replica pods with a process attached to it.")] = 0


class PackPreflight(Model):
    """What a replica saw of the GPU before its engine started."""

    uuid: Annotated[Text, Field(description="UUID of the GPU.")]
    total: Annotated[Quantity, Field(description="Memory of the GPU, as the engine sees it.")]
    free: Annotated[Quantity, Field(description="Of it free just before the engine started.")]


class PackRepair(Model):
    """What was done last to make replicas share this GPU again."""

    reason: Annotated[Literal["MPSFault", "MPSNotAttached"], Field(description="What was wrong.")]
    count: Annotated[
        int, Field(ge=1, description="How many repairs there were, with less than an hour between each two.")
    ]
    since: Annotated[Text, Field(description="When the last one began (RFC 3339).")]
    ended: Annotated[
        Text | None,
        Field(description="When replicas could start again, or were seen to share again; absent until then."),
    ] = None


class PackReplica(Model):
    """One replica pod on this GPU."""

    name: Annotated[Text, Field(description="The pod.")]
    service: Annotated[Text, Field(description="Its LLMService.")]
    ready: Annotated[bool, Field(description="Whether it answers.")]
    attached: Annotated[bool | None, Field(description="Whether it runs under MPS; absent without MPS.")] = None
    restarts: Annotated[int, Field(description="How often its engine was started anew in this pod.")] = 0
    preflight: Annotated[
        PackPreflight | None, Field(description="What it saw of the GPU before its engine started.")
    ] = None
    message: Annotated[str | None, Field(max_length=4096, description="What keeps it from being ready.")] = None


class GPUPackStatus(Model):
    """What is observed of this GPU."""

    observed_generation: Annotated[
        int | None, Field(description="The metadata.generation this status was computed from.")
    ] = None
    phase: Annotated[Text | None, Field(description="One word for people; programs read the conditions.")] = None
    node: Annotated[Text | None, Field(description="The node.")] = None
    holder: Annotated[Text | None, Field(description="The holder pod.")] = None
    gpu: Annotated[PackGPU | None, Field(description="The GPU.")] = None
    ledger: Annotated[PackLedger | None, Field(description="Memory given out and left.")] = None
    mps: Annotated[PackMPS | None, Field(description="The MPS daemon.")] = None
    replica_count: Annotated[int, Field(description="Replicas assigned.")] = 0
    ready_replicas: Annotated[int, Field(description="Replicas ready.")] = 0
    replicas: Annotated[
        list[PackReplica],
        Field(max_length=64, description="The replica pods.", json_schema_extra=list_map("name")),
    ] = Field(default_factory=list)
    repair: Annotated[PackRepair | None, Field(description="The last repair, if there was one.")] = None
    conditions: Conditions = Field(default_factory=list)


class GPUPack(Model):
    """One physical GPU, or one CPU set, that Tightship holds."""

    api_version: Literal["tightship.dev/v1alpha1"] = labels.API_VERSION  # type: ignore[assignment]
    kind: Literal["GPUPack"] = KIND  # type: ignore[assignment]
    metadata: Metadata = Field(default_factory=Metadata)
    spec: GPUPackSpec
    status: GPUPackStatus = Field(default_factory=GPUPackStatus)


CRD: dict[str, Any] = {
    "plural": PLURAL,
    "singular": "gpupack",
    "short": ["gpack"],
    "categories": ["tightship"],
    "scope": "Cluster",
    "model": GPUPack,
    "description": "A GPUPack is one physical GPU, or one set of CPU cores, that Tightship holds: who is on it, with how much memory.",
    "columns": [
        {"name": "Node", "type": "string", "jsonPath": ".status.node"},
        {"name": "GPU", "type": "string", "jsonPath": ".status.gpu.uuid"},
        {"name": "Replicas", "type": "integer", "jsonPath": ".status.replicaCount"},
        {"name": "Memory", "type": "string", "jsonPath": ".status.ledger.assigned"},
        {"name": "MPS", "type": "string", "jsonPath": ".status.mps.state"},
        {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {
            "name": "Message",
            "type": "string",
            "jsonPath": '.status.conditions[?(@.type=="Ready")].message',
            "priority": 1,
        },
    ],
}
"""What the generated CustomResourceDefinition needs beyond the schema."""
