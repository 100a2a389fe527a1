"""The confirmation run: an engine exactly as a replica would run, driven through its worst step, its memory read from the device.

A share of memory is no cap, and a profile of memory is no measurement: what a replica needs is the device's used memory at
its worst less what was used before the start. The worst step is a burst that fills the token budget of a step, a prompt as long as the model
takes, and B rows that sample with top_p and report log-probabilities. The same engine then runs B requests at once: T and L must
be the sweep's, within both half-widths and 2 %; where they are not, the report says so.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tightship.api.units import format_quantity, parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.memory import Context, kv_tokens
from tightship.profiler import points
from tightship.profiler.clock import Clock
from tightship.profiler.engine import Engine, EngineInfo, EngineSettings
from tightship.profiler.errors import EngineError, LoadError, UnansweredError
from tightship.profiler.gpu import GIB, Device, DeviceError
from tightship.profiler.lengths import Prompts
from tightship.profiler.meter import Reading
from tightship.profiler.wire import Channel, Completion

log = logging.getLogger(__name__)

TOLERANCE: Final = 0.02
WORST_OUTPUT: Final = 8
WORST_SAMPLING: Final[dict[str, Any]] = {"top_p": 0.9, "logprobs": 5}
MEMORY_PERIOD: Final = 0.1
RELEASE_POLL: Final = 0.25
RELEASE_SECONDS: Final = 15.0
RELEASE_SLACK: Final = 512 << 20
"""Bytes beyond what was used before the first engine that are no engine's: the driver's own, an MPS server's."""


@dataclass(frozen=True)
class ReplicaPlan:
    """A replica's batch and KV cache."""

    batch: int
    kv_tokens: int
    kv_bytes: int
    kv_bytes_per_token: int
    block_size: int
    max_model_len: int
    context: Context
    capped: bool
    """Whether the method asks for more KV cache than the sweep's whole engine had."""


def plan_replica(batch: int, context: Context, info: EngineInfo, observed_peak: int | None) -> ReplicaPlan:
    """The KV cache of a replica at a batch, from the context in flight and what the sweep's engine said of itself.

    Raises:
        EngineError: the engine did not say how large its KV cache is.
    """
    per_token, block = info.kv_bytes_per_token, info.block_size
    if per_token is None or block is None or info.kv_tokens is None:
        raise EngineError(
            f"the engine (version {info.version}) did not say how many tokens and bytes its KV cache holds: "
            "vllm:cache_config_info lacks kv_cache_size_tokens, and its log 'Available KV cache memory'"
        )
    longest = info.max_model_len or 0
    wanted = kv_tokens(batch, context, block, longest, observed_peak)
    tokens = min(wanted, info.kv_tokens // block * block)
    return ReplicaPlan(batch, tokens, tokens * per_token, per_token, block, longest, context, capped=tokens < wanted)


def replica_settings(sweep: EngineSettings, info: EngineInfo, plan: ReplicaPlan) -> EngineSettings:
    """The replica's command line: its batch and KV cache, and the sweep engine's token budget and graphs, explicitly."""
    return replace(
        sweep,
        max_num_seqs=plan.batch,
        kv_cache_bytes=plan.kv_bytes,
        max_num_batched_tokens=info.max_num_batched_tokens,
        capture_sizes=info.capture_sizes,
        # vLLM's CPU back end lets this variable override --kv-cache-memory-bytes.
        environment={**sweep.environment, "VLLM_CPU_KVCACHE_SPACE": None},
    )


class MemoryWatch:
    """Keeps the highest used memory of a device while it is entered; raises DeviceError at the end where that could not be read."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self.peak = 0

    async def __aenter__(self) -> MemoryWatch:
        self._task = asyncio.get_running_loop().create_task(self._watch())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._task is not None
        self._task.cancel()
        (ended,) = await asyncio.gather(self._task, return_exceptions=True)
        if error is not None:
            return  # what the engine failed of says more than a device that can't be read any more
        if isinstance(ended, DeviceError):
            raise ended
        self.peak = max(self.peak, self._device.used())

    async def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._device.used())
            await self._clock.sleep(MEMORY_PERIOD)


async def released(device: Device, clock: Clock, idle: int) -> int:
    """Used memory once an engine that has ended has given its own back, or 15 s later, in bytes.

    That it doesn't fall says nothing: vLLM's own processes may hold a context for seconds after their parent has gone.

    Args:
        device: the device.
        clock: the time.
        idle: bytes that were in use before the first engine, and what those that still run may take.
    """
    deadline = clock.now() + RELEASE_SECONDS
    while (used := device.used()) > idle + RELEASE_SLACK:
        if clock.now() >= deadline:
            log.warning(
                "%.2f GiB are in use %.0f s after an engine's end, more than %.2f GiB",
                used / GIB,
                RELEASE_SECONDS,
                idle / GIB,
            )
            break
        await clock.sleep(RELEASE_POLL)
    return used


async def worst_step(engine: Engine, plan: ReplicaPlan, budget: int, prompts: Prompts, timeout: float) -> None:
    """Drive the steps that take the most memory, one kind after the other.

    Raises:
        EngineError: the engine died, or (UnansweredError) answered with errors or took longer than `timeout` seconds.
    """
    channel = engine.channel()
    longest = max(plan.max_model_len, 2 * WORST_OUTPUT)
    fill = math.ceil(budget / longest) if budget > longest else 0  # else the longest prompt alone fills a step
    bursts: Sequence[list[Completion]] = (
        [Completion(prompts.draw(longest - WORST_OUTPUT), WORST_OUTPUT) for _ in range(min(plan.batch, fill))],
        [Completion(prompts.draw(longest - 2), 2)],
        [Completion(prompts.draw(16), WORST_OUTPUT, WORST_SAMPLING) for _ in range(plan.batch)],
    )
    try:
        for burst in bursts:
            await asyncio.wait_for(_all(channel, burst), timeout)
    except asyncio.TimeoutError:
        await engine.check()
        raise UnansweredError(f"the engine did not finish its worst step within {timeout:.0f} s") from None
    except LoadError as error:
        await engine.check()
        raise UnansweredError(f"the engine failed in its worst step: {error}") from error
    finally:
        await channel.close()


async def _all(channel: Channel, burst: Sequence[Completion]) -> None:
    loop = asyncio.get_running_loop()
    answers = [_Answer(loop.create_future()) for _ in burst]
    for request, answer in zip(burst, answers, strict=True):
        channel.submit(request, answer)
    await asyncio.gather(*(answer.done for answer in answers))


class _Answer:
    """A request whose tokens nobody times."""

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done

    def tokens(self, count: int) -> None:
        """Not of interest."""

    def finished(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, reason: str, final: bool) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(reason))


def implausible(plan: ReplicaPlan, before: int, peak: int) -> str | None:
    """Why a reading of a GPU can't be a replica's memory, with numbers; None where it can.

    Args:
        plan: the replica.
        before: bytes used before its start.
        peak: most bytes used while it ran.
    """
    if peak - before >= plan.kv_bytes:
        return None
    return (
        f"{before / GIB:.2f} GiB were in use before the start and {peak / GIB:.2f} GiB at the most, which leaves less than the "
        f"{plan.kv_bytes / GIB:.2f} GiB of its KV cache alone: something else gave memory back meanwhile"
    )


def ledger(plan: ReplicaPlan, device_total: int, replica: int) -> api.ProfileMemory:
    """The memory ledger from what the device showed: `replica` is bytes used at the worst less bytes used before the start."""
    return api.ProfileMemory(
        confirmed_batch=plan.batch,
        device_total=format_quantity(device_total),
        block_size=plan.block_size,
        kv_bytes_per_token=plan.kv_bytes_per_token,
        kv_cache_tokens=plan.kv_tokens,
        kv_cache=format_quantity(plan.kv_bytes),
        replica=format_quantity(replica),
        non_kv=format_quantity(max(0, replica - plan.kv_bytes)),
        context_mean=points.decimal(plan.context.mean),
        context_std=points.decimal(plan.context.std),
        basis="Assumed" if plan.context.assumed else "Measured",
    )


def compare(reading: Reading, sweep: api.Point, plan: ReplicaPlan) -> api.Confirmation:
    """The confirmation run against the sweep's point of the same batch."""
    expected = points.throughput(sweep) or math.nan
    sweep_latency = sweep.inter_token_latency
    mean = parse_duration(sweep_latency.mean) if sweep_latency is not None and sweep_latency.mean else math.nan
    throughput_ratio, latency_ratio = reading.throughput / expected, reading.itl / mean
    allowed = math.hypot(reading.half_width, float(sweep.half_width or 0)) + TOLERANCE
    doubts = [
        f"{name} {ratio:.3f} times the sweep's, more than {allowed:.3f} off"
        for name, ratio in (("throughput", throughput_ratio), ("time between tokens", latency_ratio))
        if not abs(ratio - 1) <= allowed
    ]
    if plan.capped:
        doubts.append(
            f"KV cache capped at the {plan.kv_tokens} tokens the device holds: long requests may be preempted"
        )
    return api.Confirmation(
        batch=reading.point.batch,
        total_tokens_per_second=points.decimal(reading.throughput),
        inter_token_latency=points.resolved(reading.point.inter_token_latency, reading.point.unresolved),
        throughput_ratio=points.decimal(throughput_ratio),
        latency_ratio=points.decimal(latency_ratio),
        agrees=abs(throughput_ratio - 1) <= allowed and abs(latency_ratio - 1) <= allowed,
        message="; ".join([*doubts, *reading.notes])[:1024] or None,
    )


def make_prompts(vocabulary: int, seed: int) -> Prompts:
    """Prompts for the worst step: drawn apart from the load's."""
    return Prompts(vocabulary, random.Random(seed).randrange(1 << 30))
