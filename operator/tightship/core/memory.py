"""The memory ledger: how much device memory one replica needs at a batch, and how many replicas fit.

    M(B) = non-KV part + KV(B)
    KV(B) = max(observed peak, B m + 4 s sqrt(B), one request of max_model_len) tokens, rounded up to blocks
    R_max = floor((M_gpu - reserve) / M(B))

m and s are mean and standard deviation of the context length of a request *in flight*. A request that writes o tokens is in
flight o steps, so in-flight requests are length-biased, and each has a past: its age is uniform in [0, o). Half a block is
added to m, since the last block of a request is half empty on average. The non-KV part (weights, activations, CUDA
graphs, context) is read from an engine that runs as a replica would, never assumed. That engine ran one batch, and activations grow
with the batch: so where replicas that ran together took more beside their KV cache than this engine did, their figure counts, for
their batch and all above. A figure is never lowered by what they took less: they were not driven through their worst step.

All integers are bytes or tokens. What must hold: M(B) covers what was observed; R_max M(B) never exceeds the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Context:
    """Mean and standard deviation in tokens of an in-flight request's context; `assumed` when lengths were not known."""

    mean: float
    std: float
    assumed: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean > 0 and math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"context of mean {self.mean} and deviation {self.std} tokens is impossible")


def context_from_means(input_tokens: float, output_tokens: float, block_size: int) -> Context:
    """The in-flight context when only mean lengths are known: both are taken as exponential (coefficient of variation 1).

    With E[o^2] = 2 o^2 and E[o^3] = 6 o^3 the length-biased mean is in + out and the variance in^2 + out^2.
    """
    mean = input_tokens + output_tokens + block_size / 2
    return Context(mean=mean, std=math.hypot(input_tokens, output_tokens), assumed=True)


def context_from_lengths(lengths: Iterable[tuple[int, int]], block_size: int) -> Context:
    """The in-flight context of a workload given as (input, output) lengths in tokens.

    A request counts in proportion to its output length: E[c] = E[o (i + o/2)] / E[o], E[c^2] = E[o (i^2 + i o + o^2/3)] / E[o].

    Raises:
        ValueError: no lengths, or none with output.
    """
    weight, first, second = 0, Fraction(0), Fraction(0)
    for prompt, output in lengths:
        if prompt < 0 or output < 0:
            raise ValueError(f"lengths ({prompt}, {output}) are negative")
        weight += output
        first += output * (prompt + Fraction(output, 2))
        second += output * (prompt * prompt + prompt * output + Fraction(output * output, 3))
    if weight == 0:
        raise ValueError("a workload needs at least one request with output tokens")
    mean = first / weight
    return Context(mean=float(mean) + block_size / 2, std=math.sqrt(second / weight - mean * mean))


MIB = 1 << 20


@dataclass(frozen=True)
class Reserve:
    """Device memory that no replica may take: a number of bytes, or a share of the device from 0 to 1."""

    amount: int = 0
    share: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if self.amount < 0 or not 0 <= self.share < 1:
            raise ValueError(f"a reserve of {self.amount} bytes and {float(self.share):.1%} is impossible")

    def of(self, device_total: int) -> int:
        """Bytes kept free on a device of `device_total` bytes, rounded up."""
        return max(self.amount, math.ceil(self.share * device_total))


@dataclass(frozen=True)
class Ledger:
    """What one replica's memory is made of.

    Attributes:
        device_total: bytes of the device.
        non_kv: bytes a replica takes beside its KV cache, read from the confirmation run.
        kv_bytes_per_token: bytes one token takes in the KV cache.
        block_size: tokens of one KV-cache block.
        context: the in-flight context length.
        max_model_len: tokens of the longest request the engine accepts.
        confirmed_batch, confirmed_kv_tokens: the batch and KV size that ran as a replica would; their memory was read.
        seen: batches, each with the bytes that a replica took beside its KV cache when several ran together.
    """

    device_total: int
    non_kv: int
    kv_bytes_per_token: int
    block_size: int
    context: Context
    max_model_len: int = 0
    confirmed_batch: int | None = None
    confirmed_kv_tokens: int | None = None
    seen: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("device_total", "kv_bytes_per_token", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.non_kv < 0 or self.max_model_len < 0:
            raise ValueError(f"non-KV memory {self.non_kv} and max_model_len {self.max_model_len} must not be negative")

    def non_kv_at(self, batch: int) -> int:
        """Bytes a replica takes beside its KV cache at a batch: read at the confirmed one, more where more was seen."""
        return max([self.non_kv, *(taken for seen, taken in self.seen if seen <= batch)])

    def kv_tokens(self, batch: int, observed_peak: int | None = None) -> int:
        """KV(B) in tokens, a whole number of blocks; what the confirmation ran with, at its batch."""
        if batch == self.confirmed_batch and self.confirmed_kv_tokens is not None:
            return self.confirmed_kv_tokens
        return kv_tokens(batch, self.context, self.block_size, self.max_model_len, observed_peak)

    def kv_bytes(self, batch: int, observed_peak: int | None = None) -> int:
        """KV(B) in bytes."""
        return self.kv_tokens(batch, observed_peak) * self.kv_bytes_per_token

    def replica_bytes(self, batch: int, observed_peak: int | None = None) -> int:
        """M(B) in bytes, rounded up to whole MiB: what is given out is read by people, too."""
        need = self.non_kv_at(batch) + self.kv_bytes(batch, observed_peak)
        return -(-need // MIB) * MIB

    def available(self, reserve: Reserve) -> int:
        """Bytes that replicas may share; never below 0."""
        return max(self.device_total - reserve.of(self.device_total), 0)

    def replicas_max(self, batch: int, reserve: Reserve, observed_peak: int | None = None) -> int:
        """R_max: how many replicas fit; 0 where the GPU is too small for one."""
        return self.available(reserve) // max(self.replica_bytes(batch, observed_peak), 1)


def kv_tokens(
    batch: int, context: Context, block_size: int, max_model_len: int = 0, observed_peak: int | None = None
) -> int:
    """KV(B) of the module docstring, in tokens; also what the profiler sizes its confirmation run with."""
    if batch < 1 or block_size < 1:
        raise ValueError(f"batch {batch} and block size {block_size} must be at least 1")
    spread = batch * context.mean + 4 * context.std * math.sqrt(batch)
    return math.ceil(max(spread, float(max_model_len), float(observed_peak or 0)) / block_size) * block_size
