"""BatchProfile: what was measured for one (model, engine, GPU product, workload).

It keeps the curve, never the choice. `spec.key` says what was measured and never changes; `spec.measurement` says how to measure and
comes from whoever created the profile; `status` is shared between two writers: the profiler owns what it measured, the operator owns
`observedGeneration`, `phase`, `attempt`, `job` and the conditions.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.common import (
    ATOMIC,
    RESERVE_PATTERN,
    Conditions,
    Decimal,
    Duration,
    Metadata,
    Model,
    Quantity,
    Text,
    Wish,
    list_map,
)
from tightship.api.v1alpha1.spec import AcceleratorSpec, LengthsFrom, ModelCache, Objective, Statistic
from tightship.api.v1alpha1.template import EnvVar, PodTemplate, Resources

KIND = "BatchProfile"
PLURAL = "batchprofiles"

LONG_TEXT = 8192

Part = Literal["Sweep", "Baseline", "Confirmation", "Arrivals"]
"""A part of a measurement."""


class KeyModel(Model):
    """The model that was measured."""

    source: Annotated[Text, Field(description="hf://ORGANISATION/NAME or pvc://CLAIM/PATH.")]
    revision: Annotated[Text | None, Field(description="Revision asked for.")] = None


class KeyEngine(Model):
    """The engine that was measured."""

    image: Annotated[Text, Field(description="Image of the engine.")]
    args: Annotated[
        list[Text], Field(max_length=64, description="The user's vLLM arguments.", json_schema_extra=ATOMIC)
    ] = Field(default_factory=list)
    max_model_len: Annotated[int | None, Field(description="Longest context, in tokens.")] = None
    env: Annotated[
        list[EnvVar], Field(max_length=64, description="The engine's environment.", json_schema_extra=ATOMIC)
    ] = Field(default_factory=list)
    env_from: Annotated[
        list[Text],
        Field(
            max_length=16,
            description="Names of the sources in envFrom; never what is in them.",
            json_schema_extra=ATOMIC,
        ),
    ] = Field(default_factory=list)


class KeyWorkload(Model):
    """The requests that were put on the engine: mean lengths, or the digest of a set of lengths."""

    input_tokens: Annotated[int | None, Field(ge=1, description="Mean prompt length, in tokens.")] = None
    output_tokens: Annotated[int | None, Field(ge=1, description="Mean completion length, in tokens.")] = None
    lengths_digest: Annotated[
        str | None,
        Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the lengths' text: what is in it, not where it lies."),
    ] = None


class ProfileKey(Model):
    """All that a measurement depends on. No objective is in it: a changed objective costs no GPU time."""

    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the rest of the key.")]
    model: Annotated[KeyModel, Field(description="The model.")]
    engine: Annotated[KeyEngine, Field(description="The engine.")]
    accelerator: Annotated[AcceleratorSpec, Field(description="What it ran on.")]
    workload: Annotated[KeyWorkload, Field(description="The requests.")]
    resources: Annotated[Resources, Field(description="CPU and memory of the engine's container.")] = Field(
        default_factory=Resources
    )

    @classmethod
    def of(cls, **parts: Any) -> ProfileKey:
        """The key made of `model`, `engine`, `accelerator`, `workload` and `resources`, with its hash worked out."""
        unhashed = cls.model_construct(hash="", **parts)
        content = json.dumps(unhashed.to_dict() | {"hash": None}, sort_keys=True, separators=(",", ":"))
        return cls(hash=hashlib.sha256(content.encode()).hexdigest(), **parts)


class Pair(Model):
    """A batch, and how many replicas of it share one GPU."""

    batch: Annotated[int, Field(ge=1, le=1_000_000, description="Requests in flight in each replica.")]
    replicas: Annotated[int, Field(ge=1, le=48, description="Replicas on the GPU.")]


class Extension(Model):
    """What is asked for after the measurement was done: what its outcome names as unfinished, and packing trials; what was measured stays."""

    request: Annotated[
        Text, Field(min_length=1, description="Any new text asks anew; the outcome names the one it answers.")
    ]
    pairs: Annotated[
        list[Pair],
        Field(
            max_length=16,
            description="What to try; none where only what the outcome names as unfinished is to be made up for.",
            json_schema_extra=list_map("batch", "replicas"),
        ),
    ] = Field(default_factory=list)
    budget: Annotated[Duration, Field(description="Time for all of it, from the first healthy engine.")] = "20m"
    objectives: Annotated[
        list[Objective],
        Field(
            max_length=2,
            description="Objectives whose statistics the trials must resolve, beside measurement.objectives; what left one open is made again.",
            json_schema_extra=list_map("metric"),
        ),
    ] = Field(default_factory=list)


class Measurement(Model):
    """How to measure. Outside the key: it comes from the service that created the profile or asked for something (`rerun`, `extend`) last."""

    budget: Annotated[Duration, Field(description="Time from the first healthy engine.")] = "20m"
    objectives: Annotated[
        list[Objective],
        Field(
            max_length=2,
            description="Objectives that place the confirmation run.",
            json_schema_extra=list_map("metric"),
        ),
    ] = Field(default_factory=list)
    efficiency_floor: Annotated[Decimal, Field(description="Efficiency floor that places the confirmation run.")] = (
        "0.1"
    )
    memory_reserve: Annotated[
        str, Field(max_length=32, pattern=RESERVE_PATTERN, description="Memory left free: a percentage or a quantity.")
    ] = "5%"
    max_replicas_per_gpu: Annotated[
        int, Field(alias="maxReplicasPerGPU", ge=1, le=24, description="Most replicas on one GPU that are tried.")
    ] = 8
    minimum_gain: Annotated[
        Decimal, Field(description="Least gain of packing that is worth a trial: it places the trials.")
    ] = "1.05"
    lengths_from: Annotated[
        LengthsFrom | None,
        Field(description="Where the lengths are that the key has the digest of; the Job mounts them."),
    ] = None
    cache: Annotated[ModelCache | None, Field(description="Where files fetched from a hub are kept.")] = None
    template: Annotated[PodTemplate, Field(description="What the Job's pod gets besides.")] = Field(
        default_factory=PodTemplate
    )
    rerun: Annotated[Wish, Field(description="Any new text measures again. Empty asks for nothing.")] = None
    extend: Annotated[
        Extension | None, Field(description="Packing trials to make beside those there are; the rest is kept.")
    ] = None

    def is_answered_by(self, rerun: str | None) -> bool:
        """Whether what was done for the text `rerun` is what is asked for; where nothing is asked anything will do."""
        return self.rerun is None or self.rerun == rerun


class Latency(Model):
    """Statistics of one latency; any subset."""

    mean: Annotated[Duration | None, Field(description="Mean.")] = None
    p50: Annotated[Duration | None, Field(description="Median.")] = None
    p90: Annotated[Duration | None, Field(description="90th percentile.")] = None
    p95: Annotated[Duration | None, Field(description="95th percentile.")] = None
    p99: Annotated[Duration | None, Field(description="99th percentile.")] = None


class Figures(Model):
    """What any load of engines shows, one engine or several."""

    batch: Annotated[int, Field(ge=1, le=1_000_000, description="Requests in flight.")]
    running_mean: Annotated[Decimal | None, Field(description="Mean number of requests the engine ran at once.")] = None
    requests_per_second: Annotated[Decimal | None, Field(description="Requests finished per second.")] = None
    output_tokens_per_second: Annotated[Decimal | None, Field(description="Tokens generated per second.")] = None
    total_tokens_per_second: Annotated[
        Decimal | None, Field(description="Prompt and generated tokens per second: T(B).")
    ] = None
    inter_token_latency: Annotated[Latency | None, Field(description="Time between tokens, weighed by tokens.")] = None
    time_to_first_token: Annotated[Latency | None, Field(description="Time to the first token, without queueing.")] = (
        None
    )
    requests: Annotated[int | None, Field(ge=0, description="Requests finished while measuring.")] = None
    preemptions: Annotated[int | None, Field(ge=0, description="Requests preempted for want of KV cache.")] = None
    gpu_utilization: Annotated[Decimal | None, Field(description="NVML utilization.gpu, 0 to 1.")] = None
    memory_utilization: Annotated[Decimal | None, Field(description="NVML utilization.memory, 0 to 1.")] = None
    window: Annotated[Duration | None, Field(description="Length of the measured window.")] = None
    half_width: Annotated[Decimal | None, Field(description="Half-width of T's 95 % interval, relative.")] = None
    unresolved: Annotated[
        list[Statistic],
        Field(
            max_length=5,
            description="Statistics with too few engine steps behind them, or that the load's own lateness hides.",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = Field(default_factory=list)
    blurred: Annotated[
        list[Statistic],
        Field(
            max_length=5,
            description="Those of the unresolved that the load's own lateness hides: more time does not settle them.",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = Field(default_factory=list)


class Point(Figures):
    """What was measured at one batch."""

    kv_cache_tokens_peak: Annotated[int | None, Field(ge=0, description="Most tokens held in the KV cache.")] = None


class Trial(Figures):
    """What was measured with several replicas on one GPU, all loaded at once. Rates are of all of them together."""

    batch: Annotated[int, Field(ge=1, le=1_000_000, description="Requests in flight in each replica.")]
    replicas: Annotated[int, Field(ge=1, le=48, description="Replicas on the GPU.")]
    running_mean: Annotated[
        Decimal | None, Field(description="Mean number of requests that one replica ran at once.")
    ] = None
    total_tokens_per_second: Annotated[
        Decimal | None, Field(description="Prompt and generated tokens per second: R T_R(B).")
    ] = None
    half_width: Annotated[Decimal | None, Field(description="Half-width of the rate's 95 % interval, relative.")] = None
    memory: Annotated[Quantity | None, Field(description="Device memory that these replicas took at the most.")] = None
    kv_cache: Annotated[Quantity | None, Field(description="KV cache of each engine.")] = None
    slowest: Annotated[
        Decimal | None, Field(description="The slowest replica's rate over the mean of all: 1 where they share fairly.")
    ] = None
    message: Annotated[str | None, Field(max_length=1024, description="What is doubtful about it, in words.")] = None


class Load(Model):
    """What was put on the engine."""

    basis: Annotated[
        Literal["Means", "Lengths"], Field(description="Whether every request had the mean lengths, or one of a set.")
    ]
    requests: Annotated[int, Field(ge=1, description="Requests in the set.")] = 1
    input_tokens: Annotated[Decimal | None, Field(description="Their mean prompt length, in tokens.")] = None
    output_tokens: Annotated[Decimal | None, Field(description="Their mean completion length, in tokens.")] = None
    seed: Annotated[int, Field(description="Seed of the random numbers: order, ages and token ids.")]
    prefix_caching: Annotated[
        Literal["Off"],
        Field(
            description="Off while measuring. Replicas keep their own setting: it makes real requests cheaper, never dearer."
        ),
    ] = "Off"


class Cost(Model):
    """Device seconds by what they were spent on."""

    starts: Annotated[Decimal | None, Field(description="Starting engines, the first one included.")] = None
    sweep: Annotated[Decimal | None, Field(description="The sweep.")] = None
    baseline: Annotated[Decimal | None, Field(description="The engine's default batch.")] = None
    confirmation: Annotated[Decimal | None, Field(description="The confirmation run.")] = None
    trials: Annotated[Decimal | None, Field(description="The packing trials.")] = None


class ProfileGPU(Model):
    """What the engine ran on."""

    product: Annotated[Text | None, Field(description="Product, as the driver names it.")] = None
    memory: Annotated[Quantity | None, Field(description="Its memory.")] = None
    uuid: Annotated[Text | None, Field(description="UUID of the GPU measured on.")] = None
    driver: Annotated[Text | None, Field(description="Driver version.")] = None


class ProfileEngine(Model):
    """What the engine said of itself; replicas are started with the same settings."""

    version: Annotated[Text | None, Field(description="Engine version.")] = None
    model_commit: Annotated[Text | None, Field(description="Commit that the revision resolved to.")] = None
    block_size: Annotated[int | None, Field(description="Tokens per block of KV cache.")] = None
    kv_cache_tokens: Annotated[int | None, Field(description="KV cache of the sweep's engine, in tokens.")] = None
    max_num_seqs: Annotated[int | None, Field(description="Batch of the sweep's engine.")] = None
    max_model_len: Annotated[int | None, Field(description="Longest context the engine accepts, in tokens.")] = None
    max_num_batched_tokens: Annotated[int | None, Field(description="Token budget of one engine step.")] = None
    capture_sizes: Annotated[
        list[int],
        Field(
            max_length=512,
            description="Batch sizes with a CUDA graph.",
            json_schema_extra=ATOMIC,
        ),
    ] = Field(default_factory=list)


class Progress(Model):
    """How far the measurement is."""

    stage: Annotated[
        Literal["Starting", "Sweeping", "Baseline", "Confirming", "Trying", "Done"],
        Field(description="What is being done."),
    ]
    batch: Annotated[int | None, Field(description="The batch being measured.")] = None
    replicas: Annotated[int | None, Field(description="The replicas it is measured with, in a trial.")] = None
    points: Annotated[int, Field(description="Points measured so far.")] = 0
    elapsed: Annotated[
        Duration | None,
        Field(description="Time since the first healthy engine, of all attempts at what is being done."),
    ] = None
    rerun: Annotated[Text | None, Field(description="The spec.measurement.rerun that is being answered.")] = None
    extend: Annotated[
        Text | None, Field(description="The spec.measurement.extend.request that is being answered, while it is one.")
    ] = None
    message: Annotated[str | None, Field(max_length=1024, description="The same in words.")] = None


class ProfileMemory(Model):
    """The memory ledger: what one replica needs, read from the device while an engine ran as a replica would."""

    confirmed_batch: Annotated[int | None, Field(description="Batch of the confirmation run.")] = None
    device_total: Annotated[Quantity | None, Field(description="Memory of the device.")] = None
    block_size: Annotated[int | None, Field(description="Tokens per block of KV cache.")] = None
    kv_bytes_per_token: Annotated[int | None, Field(description="KV cache bytes per token.")] = None
    kv_cache_tokens: Annotated[int | None, Field(description="KV cache at the confirmed batch, in tokens.")] = None
    kv_cache: Annotated[Quantity | None, Field(description="KV cache at the confirmed batch.")] = None
    replica: Annotated[Quantity | None, Field(description="Device memory of one replica in its worst step.")] = None
    non_kv: Annotated[Quantity | None, Field(alias="nonKV", description="Of that, all but the KV cache.")] = None
    context_mean: Annotated[Decimal | None, Field(description="Mean context of a request in flight, in tokens.")] = None
    context_std: Annotated[Decimal | None, Field(description="Its standard deviation.")] = None
    basis: Annotated[
        Literal["Measured", "Assumed"] | None,
        Field(
            description="Assumed: lengths were given as means, so their spread is an assumption (coefficient of variation 1)."
        ),
    ] = None


class Arrivals(Model):
    """How a replica did when requests arrived at random times (a Poisson process), as users' requests do."""

    offered_requests_per_second: Annotated[Decimal, Field(description="Rate at which requests arrived.")]
    requests_per_second: Annotated[Decimal | None, Field(description="Rate at which they were finished.")] = None
    time_to_first_token: Annotated[Latency | None, Field(description="Time to the first token, queueing included.")] = (
        None
    )
    inter_token_latency: Annotated[Latency | None, Field(description="Time between tokens, weighed by tokens.")] = None
    requests: Annotated[int | None, Field(ge=0, description="Requests that arrived.")] = None
    running_mean: Annotated[Decimal | None, Field(description="Mean number of requests the engine ran at once.")] = None
    waiting_mean: Annotated[Decimal | None, Field(description="Mean number of requests that waited.")] = None
    preemptions: Annotated[int | None, Field(ge=0, description="Requests preempted for want of KV cache.")] = None
    window: Annotated[Duration | None, Field(description="How long requests arrived.")] = None
    sustained: Annotated[
        bool | None,
        Field(
            description="Whether the engine kept up: the requests in it did not pile up. Absent where the window is too short to tell."
        ),
    ] = None


class Confirmation(Model):
    """How the confirmation run compares with the sweep at the same batch."""

    batch: Annotated[int, Field(description="The batch.")]
    total_tokens_per_second: Annotated[Decimal | None, Field(description="T of the confirmation run.")] = None
    inter_token_latency: Annotated[Latency | None, Field(description="Its time between tokens.")] = None
    throughput_ratio: Annotated[Decimal | None, Field(description="T here over T in the sweep.")] = None
    latency_ratio: Annotated[Decimal | None, Field(description="Mean time between tokens here over the sweep's.")] = (
        None
    )
    arrivals: Annotated[
        Arrivals | None, Field(description="Poisson arrivals at 80 % of the capacity, which a closed loop can't tell.")
    ] = None
    sustainable_requests_per_second: Annotated[
        Decimal | None,
        Field(description="Requests per second that one replica sustains; absent where that is not known."),
    ] = None
    agrees: Annotated[bool | None, Field(description="Whether both ratios are within their intervals plus 2 %.")] = None
    message: Annotated[str | None, Field(max_length=1024, description="What disagrees, in words.")] = None


class Outcome(Model):
    """How the measurement ended."""

    state: Annotated[Literal["Completed", "BudgetExceeded", "Failed"], Field(description="How it ended.")]
    reason: Annotated[
        Text | None,
        Field(
            description="For Failed: EngineFailed, NoPointInBudget, InsufficientMemory, or JobFailed when the Job broke before it could say why."
        ),
    ] = None
    message: Annotated[
        str | None, Field(max_length=LONG_TEXT, description="In words, with the engine's last words.")
    ] = None
    rerun: Annotated[Text | None, Field(description="The spec.measurement.rerun this outcome answers.")] = None
    extend: Annotated[Text | None, Field(description="The spec.measurement.extend.request this outcome answers.")] = (
        None
    )
    unfinished: Annotated[
        list[Part],
        Field(
            max_length=4,
            description="Parts that came to nothing, or not to their end, for a load that ran late or an engine that failed: going on makes "
            "up for them and keeps the rest.",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = Field(default_factory=list)


class Measured(Model):
    """What a measurement yields; in `status` as measured, in `spec.results` as imported."""

    gpu: Annotated[ProfileGPU | None, Field(description="What the engine ran on.")] = None
    engine: Annotated[ProfileEngine | None, Field(description="What the engine said of itself.")] = None
    points: Annotated[
        list[Point],
        Field(max_length=256, description="The curve, by batch, in no order.", json_schema_extra=list_map("batch")),
    ] = Field(default_factory=list)
    memory: Annotated[ProfileMemory | None, Field(description="The memory ledger.")] = None
    confirmation: Annotated[Confirmation | None, Field(description="The confirmation run.")] = None
    load: Annotated[Load | None, Field(description="What was put on the engine.")] = None
    baseline: Annotated[
        Point | None, Field(description="The engine as its user would have run it: its own default batch, saturated.")
    ] = None
    trials: Annotated[
        list[Trial],
        Field(
            max_length=256,
            description="Packings that were measured, in no order.",
            json_schema_extra=list_map("batch", "replicas"),
        ),
    ] = Field(default_factory=list)
    gpu_seconds: Annotated[
        Decimal | None,
        Field(description="GPU time the measurement took from the first healthy engine, all attempts together."),
    ] = None
    cost: Annotated[Cost | None, Field(description="GPU time by what it was spent on.")] = None


class BatchProfileSpec(Model):
    """What to measure, and how."""

    key: Annotated[
        ProfileKey,
        Field(
            description="What is measured; immutable.",
            json_schema_extra={
                "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "a profile's key is immutable"}]
            },
        ),
    ]
    measurement: Annotated[Measurement, Field(description="How to measure.")] = Field(default_factory=Measurement)
    results: Annotated[
        Measured | None,
        Field(
            description="Imported measurements: copied to status, no Job runs. Immutable.",
            json_schema_extra={
                "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "results are immutable"}]
            },
        ),
    ] = None


class Rerun(Measured):
    """What a measurement that was asked for again has found so far. It takes the earlier one's place when it ends, unless it fails."""

    request: Annotated[Text, Field(description="The spec.measurement.rerun that is being answered.")]


class JobStatus(Model):
    """The profiling Job."""

    name: Annotated[Text, Field(description="The Job.")]
    attempt: Annotated[int, Field(description="Which attempt it is; lost pods start another.")]


class Lost(Model):
    """Attempts that were lost one after the other (evicted, node gone), none of which found anything."""

    attempts: Annotated[int, Field(ge=1, description="How many; after the sixth the measurement fails.")]
    last: Annotated[int, Field(ge=0, description="The number of the last one.")]
    found: Annotated[
        int, Field(ge=0, description="Points and trials there were then: the count begins anew with more.")
    ]
    rerun: Annotated[Text | None, Field(description="The spec.measurement.rerun they were made for.")] = None
    extend: Annotated[Text | None, Field(description="The spec.measurement.extend.request they were made for.")] = None


class BatchProfileStatus(Measured):
    """What was measured, and how the measurement goes."""

    observed_generation: Annotated[
        int | None, Field(description="The metadata.generation the conditions were computed from.")
    ] = None
    phase: Annotated[Text | None, Field(description="One word for people; programs read the conditions.")] = None
    job: Annotated[JobStatus | None, Field(description="The profiling Job.")] = None
    image_id: Annotated[
        Text | None, Field(alias="imageID", description="The engine image's digest, as the node pulled it.")
    ] = None
    progress: Annotated[Progress | None, Field(description="How far the measurement is.")] = None
    rerun: Annotated[
        Rerun | None,
        Field(description="What a new measurement (spec.measurement.rerun) has found, while the earlier one stands."),
    ] = None
    lost: Annotated[Lost | None, Field(description="Attempts lost in a row.")] = None
    outcome: Annotated[Outcome | None, Field(description="How the measurement ended.")] = None
    conditions: Conditions = Field(default_factory=list)


class BatchProfile(Model):
    """What was measured for one (model, engine, GPU product, workload)."""

    api_version: Literal["tightship.dev/v1alpha1"] = labels.API_VERSION  # type: ignore[assignment]
    kind: Literal["BatchProfile"] = KIND  # type: ignore[assignment]
    metadata: Metadata = Field(default_factory=Metadata)
    spec: BatchProfileSpec
    status: BatchProfileStatus = Field(default_factory=BatchProfileStatus)

    @property
    def standing(self) -> Outcome | None:
        """The outcome of an earlier `rerun` whose figures stand until the new measurement has ended; None where there are none."""
        outcome = self.status.outcome
        if outcome is None or outcome.state == "Failed" or not self.status.points:
            return None
        return None if self.spec.measurement.is_answered_by(outcome.rerun) else outcome


CRD: dict[str, Any] = {
    "plural": PLURAL,
    "singular": "batchprofile",
    "short": ["bprof"],
    "categories": ["tightship"],
    "scope": "Namespaced",
    "model": BatchProfile,
    "description": "A BatchProfile is what was measured for one (model, engine, GPU product, workload).",
    "spec_validations": [
        {
            "rule": "has(self.results) == has(oldSelf.results)",
            "message": "results are given when a profile is created, or never",
        }
    ],
    "columns": [
        {"name": "Model", "type": "string", "jsonPath": ".spec.key.model.source"},
        {"name": "GPU", "type": "string", "jsonPath": ".spec.key.accelerator.product"},
        {"name": "Points", "type": "integer", "jsonPath": ".status.progress.points"},
        {"name": "Complete", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Complete")].status'},
        {"name": "GPU-Seconds", "type": "string", "jsonPath": ".status.gpuSeconds"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {
            "name": "Reason",
            "type": "string",
            "jsonPath": '.status.conditions[?(@.type=="Ready")].reason',
            "priority": 1,
        },
        {
            "name": "Message",
            "type": "string",
            "jsonPath": '.status.conditions[?(@.type=="Ready")].message',
            "priority": 1,
        },
    ],
}
"""What the generated CustomResourceDefinition needs beyond the schema."""
