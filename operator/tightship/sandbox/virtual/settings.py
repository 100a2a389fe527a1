"""Models, GPUs and workloads to simulate: as published (arXiv:2503.08311), and as the packing trials need them.

The published runs: one H100 with 64 GB, vLLM 0.6 with a token budget of 2,048, memory share 0.9, ShareGPT's lengths. Only their means
are published; `simulation.experiment` says what is assumed beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from tightship.profiler.lengths import Length, Lengths
from tightship.sandbox.simulation.costs import LLAMA_2_7B, OPT_1_3B, Model
from tightship.sandbox.simulation.experiment import sharegpt_lengths
from tightship.sandbox.simulation.gpu import Gpu, Memory

MIB: Final = 1 << 20
H100_64GB: Final = 65247 * MIB
PUBLISHED_PROMPTS: Final = 2000
REFERENCE_BATCH: Final = 32
STRICT, RELAXED = 2.0, 4.0
"""The published objectives, as multiples of the mean inter-token latency at batch 32."""


@dataclass(frozen=True)
class Setting:
    """A model on a GPU under a workload. Bytes and tokens."""

    name: str
    model: Model
    hub: str
    """The model's name on the hub, which is what an engine gets as --model."""
    input_mean: float
    output_mean: float
    grid: tuple[int, ...]
    """Batches of the published sweep."""
    memory: int = H100_64GB
    max_model_len: int = 2048
    token_budget: int = 2048
    share: float = 0.9
    """--gpu-memory-utilization of the published engine."""
    seed: int = 0

    def gpu(self) -> Gpu:
        """A GPU nobody has used yet."""
        return Gpu(f"GPU-{self.seed:08d}", "NVIDIA H100 64GB", Memory(self.memory), seed=self.seed)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Input and output lengths of the published number of prompts."""
        return sharegpt_lengths(PUBLISHED_PROMPTS, self.seed, self.input_mean, self.output_mean, self.max_model_len)

    @cached_property
    def lengths(self) -> Lengths:
        """The same, as the profiler's workload."""
        return Lengths([Length(*pair) for pair in self.pairs])

    @property
    def input_per_output(self) -> float:
        """Input tokens for one output token."""
        return self.lengths.mean_input / self.lengths.mean_output

    @property
    def arguments(self) -> tuple[str, ...]:
        """The user's arguments of the engine."""
        return (f"--gpu-memory-utilization={self.share}", f"--max-num-batched-tokens={self.token_budget}")


OPT: Final = Setting(
    name="OPT-1.3B",
    model=OPT_1_3B,
    hub="facebook/opt-1.3b",
    input_mean=110.6,
    output_mean=292.0,
    grid=(1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768),
)
LLAMA: Final = Setting(
    name="Llama-2-7B",
    model=LLAMA_2_7B,
    hub="meta-llama/llama-2-7b-hf",
    input_mean=112.8,
    output_mean=323.3,
    grid=(1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512),
)
PUBLISHED: Final = (OPT, LLAMA)


@dataclass(frozen=True)
class Packing:
    """A setting with an objective, and what packing replicas of it on one GPU is known to do."""

    setting: Setting
    slo: float
    """Mean inter-token latency allowed, seconds."""
    story: str


# From the published packed runs: OPT-1.3B at batch 96 has 13.8 ms alone, 19.0 with two replicas, 31.5 with four, and 2 x 256 have
# 36 % more throughput than 1 x 256. Llama-2-7B keeps the GPU 88 to 95 % busy alone: two replicas take turns.
PAYS: Final = Packing(
    OPT, 0.060, "the host's part of a step leaves a third of the GPU idle, and the objective leaves room"
)
NO_GAIN: Final = Packing(LLAMA, 0.080, "one replica keeps the GPU busy")
BREAKS_SLO: Final = Packing(OPT, 0.0145, "batch 96 meets the objective alone, and misses it beside a second replica")
PACKINGS: Final = (PAYS, NO_GAIN, BREAKS_SLO)
