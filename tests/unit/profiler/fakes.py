"""An engine, a device and a sink that live in virtual time: a whole profile runs in milliseconds, the same every time."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.engine import EngineInfo, EngineSettings
from tightship.profiler.errors import EngineError, OutOfMemory
from tightship.profiler.gpu import GIB, DeviceError, DeviceIdentity, Utilization
from tightship.profiler.metrics import EngineSample
from tightship.profiler.wire import Completion, Listener
from tightship.sandbox.virtual.clock import VirtualClock, VirtualLoop, in_virtual_time, work

__all__ = ["VirtualClock", "VirtualLoop", "in_virtual_time", "work"]


@dataclass(eq=False)
class Running:
    """A request in the fake engine."""

    request: Completion
    listener: Listener
    context: int
    left: int


@dataclass
class FakeModel:
    """How the fake engine behaves: a step takes `host + per_request * running` seconds and brings each request a token."""

    host: float = 0.010
    per_request: float = 0.0002
    kv_tokens: int = 400_000
    weights: int = 10 * GIB
    activations: int = 2 * GIB
    kv_bytes_per_token: int = 100_000
    dies_after: float | None = None
    """Seconds after its start at which an engine dies."""
    dies_above: int | None = None
    """Requests running at once at which it dies."""
    hangs_after: float | None = None
    slows_after: float | None = None
    """Seconds after its start from which a step takes twice as long."""
    fails_to_start: str | None = None
    out_of_memory: bool = False
    """Whether it does not start for want of memory."""
    start_seconds: float = 30.0
    refuses_after: float | None = None
    """Seconds after its start from which an engine answers every request with a 500."""
    client_seconds: float = 0.0
    """What the client works for each token; nothing else runs meanwhile, as on a real event loop."""
    client_calm_after: float = math.inf
    """Seconds after the engine's start from which that work takes no more time."""
    itl_told: float = 1.0
    """What its own histogram tells of the time between tokens, relative to what that is."""
    counts: bool = True
    """Whether its counter of generated tokens moves."""
    says: str = "INFO the engine's last line"
    """The end of what it printed while it runs."""
    slower_as_replica: float = 1.0
    """How much longer a step takes in an engine with a fixed KV cache."""


class FakeEngine:
    """Continuous batching without KV blocks' detail: enough to show rise, plateau and preemption."""

    def __init__(self, model: FakeModel, settings: EngineSettings, device: FakeDevice) -> None:
        self.model = model
        self.settings = settings
        self.device = device
        self.tokens = self.prompt_tokens = self.preemptions = self.itl_sum = self.itl_count = 0.0
        self.running: list[Running] = []
        self.waiting: deque[Running] = deque()
        self.born = asyncio.get_running_loop().time()
        self.dead: str | None = None
        capacity = model.kv_tokens
        if settings.kv_cache_bytes is not None:
            capacity = settings.kv_cache_bytes // model.kv_bytes_per_token
        self.info = EngineInfo(
            version="0.0",
            block_size=16,
            blocks=capacity // 16,
            kv_tokens=capacity,
            kv_bytes=capacity * model.kv_bytes_per_token,
            max_model_len=2048,
            max_num_batched_tokens=8192,
            capture_sizes=(1, 2, 4, 8),
        )
        self.cost = model.slower_as_replica if settings.kv_cache_bytes is not None else 1.0
        device.engine = model.weights + model.activations + capacity * model.kv_bytes_per_token
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def channel(self) -> FakeChannel:
        return FakeChannel(self)

    async def check(self) -> None:
        if self.dead:
            raise EngineError(f"the engine died: {self.dead}")

    def owns(self, pid: int) -> bool:
        return False

    def last_words(self) -> str:
        return self.dead or self.model.says

    async def sample(self) -> EngineSample:
        await self.check()
        return EngineSample(
            at=asyncio.get_running_loop().time(),
            generation_tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            preemptions=self.preemptions,
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage=min(1.0, self.used / (self.info.kv_tokens or 1)),
            itl_sum=self.itl_sum,
            itl_count=self.itl_count,
        )

    async def stop(self) -> None:
        self._task.cancel()
        self.device.release()

    @property
    def used(self) -> int:
        return sum(one.context for one in self.running)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.settings.max_num_seqs:
            if self.used + self.waiting[0].context >= (self.info.kv_tokens or 0):
                return
            self.running.append(self.waiting.popleft())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            age = loop.time() - self.born
            crowded = self.model.dies_above is not None and len(self.running) > self.model.dies_above
            if crowded or (self.model.dies_after is not None and age > self.model.dies_after):
                self.dead = "ValueError: the last words"
                for one in self.running:
                    one.listener.failed("connection lost", final=False)
                self.running.clear()
                return
            self._admit()
            if not self.running or (self.model.hangs_after is not None and age > self.model.hangs_after):
                await asyncio.sleep(0.001)
                continue
            slow = 2.0 if self.model.slows_after is not None and age > self.model.slows_after else 1.0
            step = slow * self.cost * (self.model.host + self.model.per_request * len(self.running))
            await asyncio.sleep(step)
            self.itl_sum += self.model.itl_told * step * len(self.running)
            self.itl_count += len(self.running)
            self._step()

    def _step(self) -> None:
        while self.used + len(self.running) > (self.info.kv_tokens or 0):
            youngest = self.running.pop()
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        done = []
        for one in self.running:
            one.context += 1
            one.left -= 1
            self.tokens += self.model.counts
            if not one.left:
                done.append(one)
        stepped = list(self.running)
        self.running = [one for one in self.running if one.left]
        busy = asyncio.get_running_loop().time() - self.born < self.model.client_calm_after
        for one in stepped:
            one.listener.tokens(1)
            work(self.model.client_seconds if busy else 0.0)
        for one in done:
            one.listener.finished()


@dataclass
class FakeTicket:
    """A request in a fake engine, or one that was."""

    engine: FakeEngine
    running: Running

    def cancel(self) -> None:
        self.engine.running = [one for one in self.engine.running if one is not self.running]
        if self.running in self.engine.waiting:
            self.engine.waiting.remove(self.running)


class FakeChannel:
    """Requests straight into a fake engine."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.closed = False

    def submit(self, request: Completion, listener: Listener) -> FakeTicket:
        tokens = request.prompt.count(b",") + 1
        running = Running(request, listener, tokens, request.output)
        loop, model = asyncio.get_running_loop(), self.engine.model
        if self.engine.dead:
            listener.failed("no connection", final=False)
        elif model.refuses_after is not None and loop.time() - self.engine.born > model.refuses_after:
            loop.call_soon(lambda: listener.failed("the engine answered 500: oops", final=False))
        else:
            self.engine.prompt_tokens += tokens
            self.engine.waiting.append(running)
        return FakeTicket(self.engine, running)

    async def close(self) -> None:
        self.closed = True
        self.engine.running.clear()
        self.engine.waiting.clear()


@dataclass
class FakeDevice:
    """A device whose memory is what the fake engine took."""

    memory: int = 80 * GIB
    idle: int = GIB // 2
    engine: int = 0
    stopped: int = 0
    lingers: float = 0.0
    """Seconds for which an engine's memory stays in use after its end."""
    held: int = 0
    """Bytes of engines that have ended."""
    lost_with: int | None = None
    """Engines whose end it does not outlive: from then on it can't be read."""
    kind: str = "cuda"
    product: str = "NVIDIA H100 80GB HBM3"

    @property
    def identity(self) -> DeviceIdentity:
        return DeviceIdentity(self.kind, self.product, self.memory, uuid="GPU-1", driver="580")

    def used(self) -> int:
        if self.lost_with is not None and self.stopped >= self.lost_with:
            raise DeviceError("the GPU is lost")
        return self.idle + self.engine + self.held

    def release(self) -> None:
        """The engine has ended."""
        ended, self.engine = self.engine, 0
        self.stopped += 1
        if self.lingers:
            self.held += ended
            asyncio.get_running_loop().call_later(self.lingers, self._free, ended)

    def _free(self, ended: int) -> None:
        self.held -= ended

    def utilization(self) -> Utilization:
        return Utilization(0.5, 0.25)


@dataclass
class FakeLauncher:
    """Starts fake engines, each by the next of `models`; the last serves for all further starts."""

    device: FakeDevice
    models: list[FakeModel] = field(default_factory=lambda: [FakeModel()])
    launched: list[EngineSettings] = field(default_factory=list)
    engines: list[FakeEngine] = field(default_factory=list)

    async def launch(self, settings: EngineSettings, *, timeout: float) -> FakeEngine:
        model = self.models[min(len(self.launched), len(self.models) - 1)]
        self.launched.append(settings)
        await asyncio.sleep(model.start_seconds)
        if model.out_of_memory:
            raise OutOfMemory("the engine did not start: torch.OutOfMemoryError: CUDA out of memory")
        if model.fails_to_start:
            raise EngineError(f"the engine did not start: exit status 1; its last words: {model.fails_to_start}")
        engine = FakeEngine(replace(model), settings, self.device)
        self.engines.append(engine)
        return engine


class MemorySink:
    """Keeps every status that was written."""

    def __init__(self, profile: api.BatchProfile) -> None:
        self.profile = profile
        self.written: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        """Raised by the next writes, one each."""

    async def read(self) -> api.BatchProfile:
        return self.profile

    async def write(self, status: Mapping[str, Any]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.written.append(dict(status))

    async def close(self) -> None:
        """Nothing to let go of."""


def make_profile(
    *,
    budget: str = "10m",
    itl: str | None = "30ms",
    args: Sequence[str] = ("--dtype=float16",),
    workload: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    **measurement: Any,
) -> api.BatchProfile:
    """A profile of a model on a GPU."""
    objectives = [{"metric": "InterTokenLatency", "statistic": "mean", "max": itl}] if itl else []
    return api.BatchProfile.model_validate(
        {
            "metadata": {"name": "opt", "namespace": "default"},
            "spec": {
                "key": {
                    "hash": "0" * 64,
                    "model": {"source": "hf://facebook/opt-1.3b"},
                    "engine": {"image": "vllm", "args": list(args), "maxModelLen": 2048},
                    "accelerator": {"device": "cuda", "product": "NVIDIA-H100-80GB-HBM3"},
                    "workload": dict(workload or {"inputTokens": 111, "outputTokens": 292}),
                },
                "measurement": {"budget": budget, "objectives": objectives} | measurement,
            },
            "status": dict(status or {}),
        }
    )
