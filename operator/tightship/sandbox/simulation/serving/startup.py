"""How a vLLM engine starts, as far as memory is concerned, phase by phase and with vLLM's own messages.

CUDA context; check of the free memory against the asked share of the total; weights; the profile run's activations; KV
cache, sized from what the *device* then has free (so a co-tenant that allocates meanwhile is charged to this engine, as
in vLLM) or fixed by `--kv-cache-memory-bytes`; CUDA graphs. Activations are kept: an engine's steps never shrink what it
holds, and sampling parameters the profile run didn't have can make it grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..costs import Model
from ..engine import Scheduling
from .arguments import Options
from .channel import RefusedError

GIB = 2**30
CONTEXT_BYTES = 500 * 2**20
GRAPH_BYTES = 8 * 2**20
# Live copies of a step's widest activations and of its logits in 32-bit floats; sampling with top_p or logprobs sorts more.
_ACTIVATION_COPIES = 10
_LOGIT_COPIES = 2
_SORTED_COPIES = 3


class StartError(Exception):
    """The engine can't start; the text is what vLLM prints."""


class Driver(Protocol):
    """Who gives out the GPU's memory: the device server over its channel, or a GPU in this process."""

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer `open` and `alloc`. Raises RefusedError."""


@dataclass
class Holdings:
    """What an engine holds of its GPU, in bytes, and how it asks for more."""

    channel: Driver
    total: int
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Bytes held."""
        return sum(self.parts.values())

    async def take(self, part: str, amount: int) -> int:
        """Allocate `amount` bytes more for a part; return what the device has free then.

        Raises:
            StartError: out of memory, in PyTorch's words.
        """
        try:
            answer = await self.channel.request({"op": "alloc", "bytes": amount})
        except RefusedError as error:
            raise StartError(self.out_of_memory(amount, error)) from error
        self.parts[part] = self.parts.get(part, 0) + amount
        return int(answer["free"])

    def out_of_memory(self, amount: int, error: RefusedError) -> str:
        """PyTorch's words for an allocation of `amount` bytes that was refused."""
        if "free" not in error.answer:
            return f"torch.AcceleratorError: CUDA error: {error}"
        torch = (self.used - self.parts.get("context", 0)) / GIB
        return (
            f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {amount / GIB:.2f} GiB. GPU 0 has a total "
            f"capacity of {self.total / GIB:.2f} GiB of which {error.answer['free'] / GIB:.2f} GiB is free. Including "
            f"non-PyTorch memory, this process has {self.used / GIB:.2f} GiB memory in use. Of the allocated memory "
            f"{torch:.2f} GiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
        )


@dataclass(frozen=True)
class Started:
    """A started engine: its settings as resolved, and what it holds."""

    scheduling: Scheduling
    graph_sizes: tuple[int, ...]
    kv_bytes: int
    holdings: Holdings


def activation_bytes(model: Model, tokens: int, rows: int, *, sorted_rows: int = 0) -> int:
    """Bytes of a step of `tokens` tokens that samples `rows` of them, `sorted_rows` with top_p or logprobs."""
    widest = tokens * model.hidden * 2 * _ACTIVATION_COPIES
    logits = (rows * _LOGIT_COPIES + sorted_rows * _SORTED_COPIES) * model.vocabulary * 4
    return widest + logits


def max_model_len(options: Options, model: Model) -> int:
    """Return the context length to serve.

    Raises:
        StartError: more was asked for than the model has.
    """
    longest = options.max_model_len
    if longest is None or longest < 0:
        return model.max_model_len
    if longest > model.max_model_len:
        raise StartError(
            f"ValueError: User-specified max_model_len ({longest}) is greater than the derived max_model_len "
            f"(max_position_embeddings={model.max_model_len} or model_max_length=None in model's config.json). To allow "
            "overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
        )
    return longest


async def start(
    options: Options, model: Model, channel: Driver, uuid: str, *, seconds: float, log: Callable[[str], None]
) -> Started:
    """Start an engine on a GPU; the phases together take `seconds` of real time.

    Raises:
        StartError: with vLLM's message, when memory doesn't suffice or settings don't fit.
    """
    longest = max_model_len(options, model)
    opened = await channel.request({"op": "open", "uuid": uuid})
    holdings = Holdings(channel, int(opened["total"]))
    before = int(opened["free"])
    await asyncio.sleep(0.2 * seconds)
    free = await holdings.take("context", CONTEXT_BYTES)
    requested = _check_share(options, free, holdings.total)
    sequences, budget = options.sequences(holdings.total), options.token_budget(holdings.total)
    graphs = options.graph_sizes(sequences)
    await asyncio.sleep(0.4 * seconds)
    await holdings.take("weights", model.weight_bytes)
    log(f"Model loading took {model.weight_bytes / GIB:.2f} GiB memory and {0.4 * seconds:.6f} seconds")
    await asyncio.sleep(0.2 * seconds)
    left = await holdings.take("activations", activation_bytes(model, budget, min(sequences, budget)))
    if options.kv_cache_memory_bytes is not None:
        kv_bytes = options.kv_cache_memory_bytes
    else:
        if left > before:
            raise StartError(_released(before, left))
        kv_bytes = requested - (before - left) - len(graphs) * GRAPH_BYTES
    log(f"Available KV cache memory: {kv_bytes / GIB:.2f} GiB")
    blocks = _blocks(options, model, kv_bytes, longest)
    await holdings.take("cache", kv_bytes)
    log(f"GPU KV cache size: {blocks * options.block_size:,} tokens")
    await asyncio.sleep(0.2 * seconds)
    if graphs:
        await holdings.take("graphs", len(graphs) * GRAPH_BYTES)
        log(f"Graph capturing finished in {0.2 * seconds:.0f} secs, took {len(graphs) * GRAPH_BYTES / GIB:.2f} GiB")
    scheduling = Scheduling(sequences, budget, longest, blocks, options.block_size, options.chunked_prefill)
    return Started(scheduling, graphs, kv_bytes, holdings)


def _check_share(options: Options, free: int, total: int) -> int:
    """Return the bytes of the asked share; fatal when they aren't free."""
    share = options.gpu_memory_utilization
    requested = int(total * share)
    if free < requested:
        raise StartError(
            f"ValueError: Free memory on device cuda:0 ({free / GIB:.2f}/{total / GIB:.2f} GiB) on startup is less than "
            f"desired GPU memory utilization ({share}, {requested / GIB:.2f} GiB). Decrease GPU memory utilization or "
            "reduce GPU memory used by other processes."
        )
    return requested


def _released(before: int, now: int) -> str:
    return (
        f"AssertionError: Error in memory profiling. Initial free memory {before / GIB:.2f} GiB, current free memory "
        f"{now / GIB:.2f} GiB. This happens when other processes sharing the same container release GPU memory while "
        "vLLM is profiling during initialization. To fix this, ensure consistent GPU memory allocation or isolate vLLM "
        "in its own container."
    )


def _blocks(options: Options, model: Model, kv_bytes: int, longest: int) -> int:
    """Return the number of blocks; one request of the full length must fit."""
    if kv_bytes <= 0:
        raise StartError(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
            "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its "
            "name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    block_bytes = options.block_size * model.kv_bytes_per_token
    needed = -(-longest // options.block_size) * block_bytes
    if needed > kv_bytes:
        fits = kv_bytes // block_bytes * options.block_size
        estimated = f"Based on the available memory, the estimated maximum model length is {fits}. " if fits else ""
        raise StartError(
            f"ValueError: To serve at least one request with the model's max seq len ({longest}), ({needed / GIB:.2f} GiB "
            f"KV cache is needed, which is larger than the available KV cache memory ({kv_bytes / GIB:.2f} GiB). "
            f"{estimated}Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or "
            "decreasing `max_model_len` when initializing the engine. See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    return kv_bytes // block_bytes
