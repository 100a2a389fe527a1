"""What a step costs: the host's part, the GPU's mean part, and how much of that keeps memory busy.

The knots of the two known models come from the published single-replica runs of arXiv:2503.08311 (raw results: one H100
with 64 GB, vLLM 0.6, ShareGPT, 2000 prompts at once), found by `calibration`, which also says what was chosen with packed
runs in view. Besides them:

- a prefill's base is what separates the published mean from the median inter-token latency at batches 64 to 128, per
  prompt (output tokens / batch decode steps apart): 7.5 ms for OPT-1.3B, 9.2 ms for Llama-2-7B, less its tokens' part;
- a prompt token takes 2 FLOP per parameter at 400 TFLOP/s;
- a token of context takes its keys' and values' bytes at 2.43 TB/s, the slope of OPT-1.3B's published memory-busy time
  between batches 512 and 768, which differ in context and little else.

A model without published runs is estimated: OPT-1.3B's host part, and a GPU part scaled by the bytes of its weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

FLOPS = 400e12
BANDWIDTH = 2.43e12
_BYTES_PER_VALUE = 2


@dataclass(frozen=True)
class Cost:
    """A step's host seconds, mean GPU seconds, and the share of the latter in which memory is busy."""

    host: float
    gpu: float
    memory_share: float

    def plus_prefill(self, gpu: float) -> Cost:
        """Return this cost with the GPU time of prompt tokens added, which ride along with a decode."""
        return Cost(self.host, self.gpu + gpu, self.memory_share * self.gpu / (self.gpu + gpu))


@dataclass(frozen=True)
class Knot:
    """A decode step of `running` requests with the reference context: mean seconds, and the GPU's share of them."""

    running: int
    step: float
    gpu_share: float


@dataclass(frozen=True)
class CostModel:
    """Costs of one model's steps; between knots linear in the number of running requests.

    `prefill_base` is in seconds a step, `prefill_token` and `context_token` in GPU seconds a token of prompt or cache;
    `context_reference` is the mean context in tokens of a running request that the knots stand for.
    """

    knots: tuple[Knot, ...]
    prefill_base: float
    prefill_token: float
    context_token: float
    context_reference: float
    _known: dict[int, Knot] = field(default_factory=dict, init=False, compare=False, repr=False)

    def decode(self, running: int, context: int) -> Cost:
        """Cost of one token for each of `running` requests whose contexts sum up to `context` tokens."""
        knot = self.at(running)
        mean = knot.step * knot.gpu_share
        # Short contexts save their reads, but never more than leaves a quarter: weights are read all the same.
        gpu = max(mean / 4, mean + self.context_token * (context - running * self.context_reference))
        return Cost(knot.step * (1 - knot.gpu_share), gpu, 1.0)

    def prefill(self, tokens: int, running: int) -> Cost:
        """Cost of computing `tokens` prompt tokens while `running` requests are in the engine."""
        share = self.at(running).gpu_share
        return Cost(self.prefill_base * (1 - share), self.prefill_base * share + self.prefill_token * tokens, 0.0)

    def at(self, running: int) -> Knot:
        """Interpolate the knots; beyond the last one the step grows as between the last two."""
        known = self._known.get(running)
        if known is None:
            known = self._known[running] = self._interpolate(running)
        return known

    def _interpolate(self, running: int) -> Knot:
        if running <= self.knots[0].running or len(self.knots) == 1:
            return self.knots[0]
        right = min(bisect_right([knot.running for knot in self.knots], running), len(self.knots) - 1)
        low, high = self.knots[right - 1], self.knots[right]
        part = (running - low.running) / (high.running - low.running)
        share = low.gpu_share + min(part, 1.0) * (high.gpu_share - low.gpu_share)
        return Knot(running, low.step + part * (high.step - low.step), share)


@dataclass(frozen=True)
class Model:
    """What the simulation knows of a model: its shape, which gives its memory, and its costs."""

    parameters: int
    layers: int
    hidden: int
    kv_hidden: int
    vocabulary: int
    max_model_len: int
    architecture: str
    costs: CostModel

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in 16-bit precision."""
        return self.parameters * _BYTES_PER_VALUE

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of context takes, in 16-bit precision."""
        return 2 * self.layers * self.kv_hidden * _BYTES_PER_VALUE


def _prefill_token(parameters: int) -> float:
    return 2 * parameters / FLOPS


def _context_token(layers: int, kv_hidden: int) -> float:
    return 2 * layers * kv_hidden * _BYTES_PER_VALUE / BANDWIDTH


_OPT_KNOTS: tuple[Knot, ...] = (
    Knot(1, 0.003619, 0.581),
    Knot(2, 0.003756, 0.578),
    Knot(4, 0.003860, 0.593),
    Knot(8, 0.004405, 0.563),
    Knot(16, 0.005026, 0.577),
    Knot(32, 0.006767, 0.552),
    Knot(64, 0.009067, 0.600),
    Knot(96, 0.012053, 0.594),
    Knot(128, 0.015109, 0.573),
    Knot(192, 0.020855, 0.641),
    Knot(256, 0.026593, 0.632),
    Knot(384, 0.039170, 0.602),
    Knot(512, 0.053421, 0.614),
    Knot(640, 0.065797, 0.595),
    Knot(768, 0.085047, 0.569),
)
_LLAMA_KNOTS: tuple[Knot, ...] = (
    Knot(1, 0.010873, 0.950),
    Knot(2, 0.011123, 0.944),
    Knot(4, 0.011596, 0.932),
    Knot(8, 0.012339, 0.930),
    Knot(16, 0.014017, 0.918),
    Knot(32, 0.016863, 0.913),
    Knot(64, 0.022038, 0.927),
    Knot(96, 0.029335, 0.920),
    Knot(128, 0.034138, 0.881),
    Knot(192, 0.045369, 0.898),
)

_OPT_PARAMETERS = 1_315_758_080
_LLAMA_PARAMETERS = 6_738_415_616

OPT_1_3B = Model(
    parameters=_OPT_PARAMETERS,
    layers=24,
    hidden=2048,
    kv_hidden=2048,
    vocabulary=50272,
    max_model_len=2048,
    architecture="OPTForCausalLM",
    costs=CostModel(_OPT_KNOTS, 6.8e-3, _prefill_token(_OPT_PARAMETERS), _context_token(24, 2048), 367.0),
)
LLAMA_2_7B = Model(
    parameters=_LLAMA_PARAMETERS,
    layers=32,
    hidden=4096,
    kv_hidden=4096,
    vocabulary=32000,
    max_model_len=4096,
    architecture="LlamaForCausalLM",
    costs=CostModel(_LLAMA_KNOTS, 5.4e-3, _prefill_token(_LLAMA_PARAMETERS), _context_token(32, 4096), 390.0),
)

# By the last part of a model's name, in lower case.
MODELS: Mapping[str, Model] = MappingProxyType(
    {"opt-1.3b": OPT_1_3B, "llama-2-7b": LLAMA_2_7B, "llama-2-7b-hf": LLAMA_2_7B}
)


def estimate(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    kv_hidden: int,
    vocabulary: int,
    max_model_len: int,
    architecture: str,
) -> Model:
    """Return a model for a shape nobody published runs of; see the module's docstring."""
    parameters = vocabulary * hidden * 2 + layers * (
        2 * hidden * hidden + 2 * hidden * kv_hidden + 3 * hidden * intermediate
    )
    reference = OPT_1_3B.costs
    scale = parameters / _OPT_PARAMETERS
    knots = []
    for knot in reference.knots:
        host, gpu = knot.step * (1 - knot.gpu_share), knot.step * knot.gpu_share * scale
        knots.append(Knot(knot.running, host + gpu, gpu / (host + gpu)))
    costs = replace(
        reference,
        knots=tuple(knots),
        prefill_token=_prefill_token(parameters),
        context_token=_context_token(layers, kv_hidden),
    )
    return Model(parameters, layers, hidden, kv_hidden, vocabulary, max_model_len, architecture, costs)
