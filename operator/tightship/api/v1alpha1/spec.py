"""Parts of a spec that LLMService and BatchProfile share: model, engine, accelerator, workload, objectives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tightship.api.v1alpha1.common import (
    ATOMIC,
    Duration,
    Model,
    Name,
    Quantity,
    list_map,
    validations,
)

REFUSED_FLAGS = (
    "model",
    "model-tag",
    "served-model-name",
    "port",
    "host",
    "uds",
    "config",
    "revision",
    "max-model-len",
    "max-num-seqs",
    "gpu-memory-utilization",
    "kv-cache-memory-bytes",
    "api-key",
)
"""Engine options that Tightship sets itself, or that would break its probes, without the leading dashes."""

PARALLEL_FLAGS = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
PARALLEL_SHORT = ("tp", "pp", "dp")


SHORTEST_ABBREVIATION = 2


def _abbreviated(flag: str) -> str:
    """A pattern for a flag with `-` or `_` between its words, and for every abbreviation of it.

    vLLM's argument parser accepts any unambiguous beginning of an option (`--gpu-mem=0.9`), so all of them are refused.
    """
    letters = ["[-_]" if letter == "-" else letter for letter in flag]
    shortest, rest = letters[:SHORTEST_ABBREVIATION], letters[SHORTEST_ABBREVIATION:]
    return "".join(shortest) + "".join(f"({letter}" for letter in rest) + ")?" * len(rest)


def _alternatives(flags: tuple[str, ...]) -> str:
    return "|".join(_abbreviated(flag) for flag in flags)


REFUSED_ARGS_PATTERN = f"^--({_alternatives(REFUSED_FLAGS)}|ssl[-_][a-z_-]+)([=.].*)?$"
"""Matches a refused engine argument: `_` or `-`, abbreviated or not, `--flag`, `--flag=value` and `--flag.key`."""

PARALLEL_PATTERN = f"^(--({_alternatives(PARALLEL_FLAGS)})|--?({'|'.join(PARALLEL_SHORT)}))(=.*)?$"
PARALLEL_ONE_PATTERN = "^.*=1$"

REFUSED_ARGS_RULE = (
    f"self.all(a, !a.matches('{REFUSED_ARGS_PATTERN}'))",
    "refused engine argument: Tightship sets --model, --served-model-name, --port, --host, --uds, --config, --revision, "
    "--max-model-len, --max-num-seqs, --gpu-memory-utilization, --kv-cache-memory-bytes, --api-key and --ssl-* itself",
)
PARALLEL_RULE = (
    f"self.all(a, !a.matches('{PARALLEL_PATTERN}') || a.matches('{PARALLEL_ONE_PATTERN}'))",
    "an engine of this version runs on one GPU: parallel sizes above 1 are refused (leave them out, or write --tensor-parallel-size=1)",
)
SOURCE_RULE = (
    "self.matches('^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$') || "
    "(self.matches('^pvc://[a-z0-9][-a-z0-9.]*/[^/].*$') && !self.contains('..'))",
    "the source is hf://ORGANISATION/NAME or pvc://CLAIM/PATH (without `..`)",
)


class ModelCache(Model):
    """Where model files fetched from a hub are kept."""

    pvc: Annotated[Name, Field(description="PersistentVolumeClaim of the namespace, mounted as the hub's cache.")]


class ModelSpec(Model):
    """Which model to serve."""

    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=512,
            description="hf://ORGANISATION/NAME, or pvc://CLAIM/PATH for a directory on a PersistentVolumeClaim.",
            json_schema_extra=validations(SOURCE_RULE),
        ),
    ]
    revision: Annotated[
        str | None,
        Field(max_length=128, description="Branch, tag or commit on the hub; the commit used is in the profile."),
    ] = None
    served_name: Annotated[
        str | None,
        Field(max_length=128, description="The name clients send as `model`; by default the source's last part."),
    ] = None
    cache: Annotated[ModelCache | None, Field(description="Where files fetched from a hub are kept.")] = None

    @property
    def name(self) -> str:
        """The name clients send as `model`."""
        return self.served_name or self.source.rstrip("/").rsplit("/", 1)[-1]


class EngineSpec(Model):
    """Which engine serves it."""

    image: Annotated[
        str, Field(min_length=1, max_length=512, description="Image with vLLM, such as vllm/vllm-openai:v0.33.0.")
    ]
    args: Annotated[
        list[Annotated[str, Field(max_length=512)]],
        Field(
            max_length=64,
            description="More vLLM arguments, part of the profile's key: what changes here is measured again, speculative decoding and LoRA "
            "included. Those that Tightship sets itself are refused, in every spelling.",
            json_schema_extra=ATOMIC | validations(REFUSED_ARGS_RULE, PARALLEL_RULE),
        ),
    ] = Field(default_factory=list)
    max_model_len: Annotated[
        int | None, Field(ge=1, le=10_000_000, description="Longest context, in tokens; by default the model's own.")
    ] = None


class AcceleratorSpec(Model):
    """What the model runs on: one GPU of a product, or a set of CPU cores that plays its part."""

    device: Annotated[Literal["cuda", "cpu"], Field(description="cuda, or cpu for vLLM's CPU back end.")] = "cuda"
    product: Annotated[
        str | None,
        Field(
            max_length=63,
            description="The node label nvidia.com/gpu.product, such as NVIDIA-H100-80GB-HBM3. Required with device cuda.",
        ),
    ] = None
    cores: Annotated[
        int | None, Field(ge=1, le=1024, description="With device cpu: the cores of one pack, all of one node.")
    ] = None
    cores_per_replica: Annotated[
        int | None, Field(ge=1, le=1024, description="With device cpu: the whole cores of one replica (default 1).")
    ] = None
    memory: Annotated[Quantity | None, Field(description="With device cpu: the memory of one pack.")] = None


ACCELERATOR_RULES = validations(
    (
        "self.device != 'cuda' || has(self.product)",
        "device cuda needs `product`: the node label nvidia.com/gpu.product",
    ),
    (
        "self.device != 'cpu' || (has(self.cores) && has(self.memory))",
        "device cpu needs `cores` and `memory`: the part of a node that plays a GPU's part",
    ),
    (
        "!has(self.coresPerReplica) || !has(self.cores) || self.coresPerReplica <= self.cores",
        "coresPerReplica can't exceed cores",
    ),
)


class ConfigMapKey(Model):
    """One entry of a ConfigMap of the same namespace."""

    name: Annotated[Name, Field(description="The ConfigMap; it carries the label tightship.dev/lengths.")]
    key: Annotated[Name, Field(description="The entry.")]


class LengthsFrom(Model):
    """Where the lengths of real requests are."""

    config_map: Annotated[
        ConfigMapKey,
        Field(
            description="Lines of `input,output` in tokens, JSON pairs, or ShareGPT-like conversations.",
        ),
    ]


WORKLOAD_RULES = validations(
    (
        "has(self.lengthsFrom) ? !has(self.inputTokens) && !has(self.outputTokens) : has(self.inputTokens) && has(self.outputTokens)",
        "a workload is either both inputTokens and outputTokens, the mean lengths, or lengthsFrom, the lengths themselves",
    )
)


class Workload(Model):
    """The requests that the service will see: their mean lengths, or the lengths themselves."""

    input_tokens: Annotated[int | None, Field(ge=1, le=1_000_000, description="Mean prompt length, in tokens.")] = None
    output_tokens: Annotated[
        int | None, Field(ge=2, le=1_000_000, description="Mean completion length, in tokens.")
    ] = None
    lengths_from: Annotated[
        LengthsFrom | None, Field(description="Lengths of real requests, instead of their means: better, where known.")
    ] = None


Metric = Literal["InterTokenLatency", "TimeToFirstToken"]
Statistic = Literal["mean", "p50", "p90", "p95", "p99"]


class Objective(Model):
    """One latency objective."""

    metric: Annotated[Metric, Field(description="InterTokenLatency or TimeToFirstToken.")]
    statistic: Annotated[Statistic, Field(description="The statistic that must hold.")] = "mean"
    max: Annotated[Duration, Field(description="Its largest value allowed, such as 30ms.")]


class SLO(Model):
    """The latency that must hold, packed or not."""

    objectives: Annotated[
        list[Objective],
        Field(max_length=2, description="At most one objective per metric.", json_schema_extra=list_map("metric")),
    ] = Field(default_factory=list)
