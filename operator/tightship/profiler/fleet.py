"""Several engines on one device, started one after the other and stopped together.

What must hold: never are two engines starting at once, since engines that start together charge each other's memory to themselves; an
engine is started only while the device has the memory it needs; an engine counts only once the device is proven to be shared as
it should be; and all are stopped at the end, however that comes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, replace

from tightship.core.memory import Ledger, Reserve
from tightship.profiler.engine import Engine, EngineInfo, EngineSettings
from tightship.profiler.errors import EngineError, ProfilerError
from tightship.profiler.gpu import GIB, Device
from tightship.profiler.sharing import Sharing

log = logging.getLogger(__name__)

Pair = tuple[int, int]
"""Batch and replicas."""


class DoesNotFitError(ProfilerError):
    """Engine number `replicas` can't be started beside the others; the message has the numbers or its last words."""

    def __init__(self, replicas: int, message: str) -> None:
        super().__init__(message)
        self.replicas = replicas


class NotStartedError(DoesNotFitError):
    """The device has the memory, but the engine ended while it started: that may have been chance."""


@dataclass(frozen=True)
class Group:
    """What engines that are started together can serve."""

    replicas: int
    """Most engines."""
    batch: int
    """`max_num_seqs` of each."""
    kv_tokens: int
    """KV cache of each."""
    kv_bytes: int
    need: int
    """Bytes of device memory that each takes at its worst."""


class Sizes:
    """What batches need, from the ledger: the same figures the advisor packs by."""

    def __init__(self, ledger: Ledger, reserve: Reserve, peaks: dict[int, int | None]) -> None:
        """`peaks`: the KV cache peak, in tokens, that was seen at each batch."""
        self.ledger = ledger
        self.reserve = reserve
        self._available = ledger.available(reserve)
        self._peaks = peaks

    @property
    def batches(self) -> Collection[int]:
        """The batches that were measured alone."""
        return self._peaks.keys()

    def peak(self, batch: int) -> int | None:
        """Most tokens that were seen in the KV cache at a batch."""
        return self._peaks.get(batch)

    def kv_tokens(self, batch: int) -> int:
        """KV cache of a replica at a batch, tokens."""
        return self.ledger.kv_tokens(batch, self.peak(batch))

    def room(self, replicas: int) -> int:
        """KV tokens, in whole blocks, that each of so many replicas can have."""
        block = self.ledger.block_size * self.ledger.kv_bytes_per_token
        return max(0, self._available // replicas - self.ledger.non_kv) // block * self.ledger.block_size

    def fits(self, pair: Pair) -> bool:
        """Whether so many replicas of that batch fit the device less its reserve."""
        return self.kv_tokens(pair[0]) <= self.room(pair[1])

    def misfit(self, pair: Pair) -> str:
        """Why a pair does not fit, with numbers."""
        need = self.ledger.non_kv + self.kv_tokens(pair[0]) * self.ledger.kv_bytes_per_token
        return (
            f"{pair[1]} x {need / GIB:.2f} GiB exceed the {self._available / GIB:.2f} GiB "
            f"of {self.ledger.device_total / GIB:.2f} GiB that the reserve leaves"
        )

    def group(self, pair: Pair, others: Iterable[Pair]) -> Group:
        """The group to start for a pair: as many engines, and as much KV cache for each, as further pairs can use.

        It gives way in that order: more engines come first, since starting them is what costs; the pair itself is always served.
        """
        wanted = {other for other in (*others, pair) if self.fits(other)} | {pair}
        least = self.kv_tokens(pair[0])
        replicas = max((count for _, count in wanted if least <= self.room(count)), default=pair[1])
        served = {
            batch for batch, count in wanted if count <= replicas and self.kv_tokens(batch) <= self.room(replicas)
        } | {pair[0]}
        tokens = max(self.kv_tokens(batch) for batch in served)
        kv_bytes = tokens * self.ledger.kv_bytes_per_token
        return Group(replicas, max(served), tokens, kv_bytes, self.ledger.non_kv + kv_bytes)

    def serves(self, group: Group, pair: Pair) -> bool:
        """Whether a group's engines can run a pair."""
        batch, replicas = pair
        return replicas <= group.replicas and batch <= group.batch and self.kv_tokens(batch) <= group.kv_tokens


def packed_settings(sweep: EngineSettings, info: EngineInfo, group: Group, device: Device) -> EngineSettings:
    """An engine of the group, as a replica would be started: what the sweep's engine decided for itself is passed explicitly.

    vLLM refuses to start while less is free than its share of the *total*, whatever of that it will use: so its share covers
    its own need only. (The CPU back end knows no such share for a cache of fixed size, nor do replicas there have one.)
    """
    identity = device.identity
    share = math.ceil(group.need / identity.memory * 10_000 - 1e-9) / 10_000
    return replace(
        sweep,
        max_num_seqs=group.batch,
        kv_cache_bytes=group.kv_bytes,
        gpu_memory_utilization=None if identity.kind == "cpu" else min(1.0, share),
        max_num_batched_tokens=info.max_num_batched_tokens,
        capture_sizes=info.capture_sizes,
        # vLLM's CPU back end lets this variable override --kv-cache-memory-bytes.
        environment={**sweep.environment, "VLLM_CPU_KVCACHE_SPACE": None},
    )


class Fleet:
    """The engines of one group."""

    def __init__(
        self,
        group: Group,
        settings: EngineSettings,
        *,
        launch: Callable[[EngineSettings], Awaitable[Engine]],
        device: Device,
        sharing: Sharing,
    ) -> None:
        """`launch` starts an engine and returns it healthy, or raises EngineError."""
        self.group = group
        self._settings = settings
        self._launch = launch
        self._device = device
        self._sharing = sharing
        self._engines: list[Engine] = []
        self.idle = device.used()
        """Bytes in use before the first engine."""

    @property
    def engines(self) -> list[Engine]:
        """Those that run, oldest first."""
        return list(self._engines)

    async def grow(self, count: int) -> list[Engine]:
        """Start engines, one after the other, until there are `count`, and return these.

        Raises:
            DoesNotFitError: the device lacks the memory for the next one, or (NotStartedError) it did not start; those before it
                run on.
            NotAttachedError: engines run, but don't share the device as they should.
            EngineError: one that ran before has died.
        """
        while len(self._engines) < count:
            for engine in self._engines:
                await engine.check()
            await self._start(len(self._engines) + 1)
        return self._engines[:count]

    async def _start(self, number: int) -> None:
        need, free = self.group.need, self._device.identity.memory - self._device.used()
        if free < need:
            raise DoesNotFitError(
                number,
                f"engine {number} needs {need / GIB:.2f} GiB, {free / GIB:.2f} of {self._device.identity.memory / GIB:.2f} "
                f"GiB are free beside {number - 1} others",
            )
        environment = {**self._settings.environment, **self._sharing.environment(number - 1)}
        try:
            engine = await self._launch(replace(self._settings, environment=environment, shares_cores=True))
        except EngineError as error:
            raise NotStartedError(
                number, f"engine {number} did not start beside {number - 1} others: {error}"
            ) from error
        self._engines.append(engine)
        await self._sharing.prove(self._engines)

    async def stop(self) -> None:
        """Stop all engines."""
        engines, self._engines = self._engines, []
        results = await asyncio.gather(*(engine.stop() for engine in engines), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                log.warning("an engine did not stop in order: %s", result)
