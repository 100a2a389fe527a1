"""Engines in virtual time behind the profiler's ports: what they share, what they refuse, how they end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tightship.profiler.engine import EngineSettings
from tightship.profiler.errors import EngineError, OutOfMemory
from tightship.profiler.lengths import Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.wire import Completion
from tightship.sandbox.virtual.clock import VirtualClock, in_virtual_time
from tightship.sandbox.virtual.disturbance import Faults, Noise
from tightship.sandbox.virtual.engine import VirtualEngine
from tightship.sandbox.virtual.launcher import VirtualDevice, VirtualLauncher
from tightship.sandbox.virtual.settings import BREAKS_SLO, NO_GAIN, OPT, PAYS, Packing, Setting

GIB = 1 << 30
CLOCK = VirtualClock()


def make_settings(setting: Setting = OPT, **changes: Any) -> EngineSettings:
    settings = EngineSettings(
        setting.hub, max_num_seqs=256, args=setting.arguments, max_model_len=setting.max_model_len
    )
    return replace(settings, **changes)


def make_replica(setting: Setting, batch: int, kv_gib: float, share: float) -> EngineSettings:
    """As a replica would run: its own batch, a fixed cache, and a share of memory that leaves room for others."""
    return make_settings(setting, max_num_seqs=batch, kv_cache_bytes=int(kv_gib * GIB), gpu_memory_utilization=share)


@dataclass
class Heard:
    """A listener that writes down what it hears."""

    heard: list[str] = field(default_factory=list)

    def tokens(self, count: int) -> None:
        self.heard += ["token"] * count

    def finished(self) -> None:
        self.heard.append("finished")

    def failed(self, reason: str, final: bool) -> None:
        self.heard.append(f"{'refused' if final else 'failed'}: {reason}")


def make_request(tokens: int, output: int, **sampling: Any) -> Completion:
    return Completion(b"[" + b",".join([b"7"] * tokens) + b"]", output, sampling)


async def loaded(
    engines: list[VirtualEngine], setting: Setting, batch: int, seconds: float
) -> list[tuple[float, float]]:
    """Keep `batch` requests in flight on each engine; return each one's mean ITL in seconds and total tokens/s."""
    loads = [
        ClosedLoop(engine.channel(), setting.lengths, Prompts(1000, number), CLOCK, seed=number)
        for number, engine in enumerate(engines)
    ]
    for load in loads:
        load.resize(batch)
    await CLOCK.sleep(3)
    before = [await engine.sample() for engine in engines]
    recordings = [load.begin() for load in loads]
    await CLOCK.sleep(seconds)
    after = [await engine.sample() for engine in engines]
    for load in loads:
        await load.close()
    rates = [
        (last.generation_tokens - first.generation_tokens) / (last.at - first.at) * (1 + setting.input_per_output)
        for first, last in zip(before, after, strict=True)
    ]
    return [(recording.itl.mean or 0.0, rate) for recording, rate in zip(recordings, rates, strict=True)]


async def packed(
    setting: Setting, batch: int, replicas: int, *, kv_gib: float, share: float, seconds: float = 20
) -> tuple[float, float]:
    """Start replicas one after the other, load all at once; return their mean ITL and their total tokens/s."""
    launcher = VirtualLauncher(setting.gpu())
    engines = [await launcher.launch(make_replica(setting, batch, kv_gib, share), timeout=100) for _ in range(replicas)]
    results = await loaded(engines, setting, batch, seconds)
    for engine in engines:
        await engine.stop()
    return sum(itl for itl, _ in results) / replicas, sum(rate for _, rate in results)


def test_an_engine_starts_as_vllm_does() -> None:
    async def story() -> None:
        gpu = OPT.gpu()
        launcher = VirtualLauncher(gpu)
        began = CLOCK.now()
        engine = await launcher.launch(make_settings(), timeout=100)
        assert CLOCK.now() - began == pytest.approx(45)
        info = engine.info
        # published: 18,573 blocks at batch 16
        assert info.blocks == pytest.approx(18_573, rel=0.02)
        assert info.kv_bytes_per_token == pytest.approx(196_608, rel=0.001)
        assert (info.max_model_len, info.max_num_batched_tokens) == (2048, 2048)
        assert VirtualDevice(gpu).used() == engine.memory > 0.85 * gpu.memory.total
        await engine.stop()
        assert VirtualDevice(gpu).used() == 0

    in_virtual_time(story)


@pytest.mark.parametrize(
    ("memory", "sequences", "budget"), [(80, 1024, 8192), (64, 256, 2048)], ids=["80 GiB", "64 GiB"]
)
def test_batch_and_token_budget_default_as_vllm_chooses(memory: int, sequences: int, budget: int) -> None:
    async def story() -> None:
        setting = replace(OPT, memory=memory * GIB)
        engine = await VirtualLauncher(setting.gpu()).launch(
            make_settings(args=(), max_num_seqs=sequences), timeout=100
        )
        assert engine.info.max_num_batched_tokens == budget

    in_virtual_time(story)


# Published (arXiv:2503.08311): mean ITL in ms of R replicas at a batch; finite runs, whose drain makes latency low by some per cent.
@pytest.mark.parametrize(
    ("batch", "replicas", "itl", "kv_gib", "share"),
    [(96, 1, 13.8, 12, 0.25), (96, 2, 19.0, 12, 0.25), (96, 4, 31.5, 11, 0.23)],
)
def test_replicas_of_opt_slow_each_other_down_as_published(
    batch: int, replicas: int, itl: float, kv_gib: float, share: float
) -> None:
    found, _ = in_virtual_time(lambda: packed(OPT, batch, replicas, kv_gib=kv_gib, share=share))
    assert found == pytest.approx(itl / 1000, rel=0.1)


def test_engines_that_share_a_gpu_share_it_fairly() -> None:
    async def story() -> None:
        launcher = VirtualLauncher(OPT.gpu())
        engines = [await launcher.launch(make_replica(OPT, 96, 12, 0.25), timeout=100) for _ in range(3)]
        latencies = [itl for itl, _ in await loaded(engines, OPT, 96, 20)]
        assert max(latencies) < 1.05 * min(latencies)

    in_virtual_time(story)


@pytest.mark.parametrize(
    ("packing", "batch", "kv_gib", "gain", "within"),
    [
        (PAYS, 256, 24, (1.2, 1.6), True),
        (NO_GAIN, 64, 14.5, (0.95, 1.1), True),
        (BREAKS_SLO, 96, 12, (1.2, 1.6), False),
    ],
    ids=lambda value: value.story if isinstance(value, Packing) else str(value),
)
def test_three_kinds_of_packing(
    packing: Packing, batch: int, kv_gib: float, gain: tuple[float, float], within: bool
) -> None:
    setting = packing.setting
    alone, single = in_virtual_time(lambda: packed(setting, batch, 1, kv_gib=kv_gib, share=0.45, seconds=30))
    together, total = in_virtual_time(lambda: packed(setting, batch, 2, kv_gib=kv_gib, share=0.45, seconds=30))
    assert alone <= packing.slo
    assert (together <= packing.slo) is within
    assert gain[0] < total / single < gain[1]


def test_a_second_engine_finds_what_the_first_has_left() -> None:
    async def story() -> None:
        gpu = OPT.gpu()
        launcher = VirtualLauncher(gpu)
        first = await launcher.launch(make_replica(OPT, 96, 30, 0.6), timeout=100)
        with pytest.raises(OutOfMemory, match=r"Free memory on device .* is less than"):
            await launcher.launch(make_replica(OPT, 96, 30, 0.6), timeout=100)
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            await launcher.launch(make_replica(OPT, 96, 30, 0.3), timeout=100)
        assert gpu.memory.used == first.memory, "a failed start gives everything back"
        await first.stop()
        await launcher.launch(make_replica(OPT, 96, 30, 0.6), timeout=100)

    in_virtual_time(story)


@pytest.mark.parametrize(
    ("changes", "faults", "timeout", "says"),
    [
        ({"args": ("--no-such-flag",)}, Faults(), 100, "exit status 2; .*unrecognized arguments: --no-such-flag"),
        ({"model": "facebook/nothing"}, Faults(), 100, "facebook/nothing is not a local folder"),
        ({"max_model_len": 4096}, Faults(), 100, "greater than the derived max_model_len"),
        ({}, Faults(start_fails="RuntimeError: no luck"), 100, "last words: RuntimeError: no luck"),
        ({}, Faults(), 10, "not healthy after 10 s"),
    ],
)
def test_an_engine_that_does_not_start_says_why(
    changes: dict[str, Any], faults: Faults, timeout: float, says: str
) -> None:
    async def story() -> None:
        gpu = OPT.gpu()
        with pytest.raises(EngineError, match=says):
            await VirtualLauncher(gpu, faults=[faults]).launch(make_settings(**changes), timeout=timeout)
        assert gpu.memory.used == 0

    in_virtual_time(story)


def test_an_engine_that_dies_fails_what_is_in_flight_and_leaves_its_memory() -> None:
    async def story() -> None:
        gpu = OPT.gpu()
        engine = await VirtualLauncher(gpu, faults=[Faults(dies_after=1.0)]).launch(make_settings(), timeout=100)
        short, long, late = Heard(), Heard(), Heard()
        channel = engine.channel()
        channel.submit(make_request(10, 3), short)
        channel.submit(make_request(10, 1000), long)
        await CLOCK.sleep(2)
        channel.submit(make_request(10, 3), late)
        await CLOCK.sleep(0.1)
        assert short.heard == ["token"] * 3 + ["finished"]
        assert long.heard[-1].startswith("failed: connection lost after ")
        assert late.heard == ["failed: no connection: the engine is gone"]
        for failing in (engine.sample(), engine.check()):
            with pytest.raises(EngineError, match=r"last words: .*unspecified launch failure"):
                await failing
        assert gpu.memory.used == 0

    in_virtual_time(story)


def test_an_engine_that_hangs_brings_no_more_tokens_but_answers() -> None:
    async def story() -> None:
        launcher = VirtualLauncher(OPT.gpu(), faults=[Faults(hangs_after=1.0)])
        engine = await launcher.launch(make_settings(), timeout=100)
        engine.channel().submit(make_request(10, 1000), Heard())
        await CLOCK.sleep(2)
        before = await engine.sample()
        await CLOCK.sleep(60)
        after = await engine.sample()
        assert 0 < before.generation_tokens == after.generation_tokens
        assert after.running == 1

    in_virtual_time(story)


def test_a_request_that_does_not_fit_is_refused_for_good() -> None:
    async def story() -> None:
        engine = await VirtualLauncher(OPT.gpu()).launch(make_settings(), timeout=100)
        listener = Heard()
        engine.channel().submit(make_request(2000, 49), listener)
        assert listener.heard == [], "who submits hears nothing before submit has returned"
        await CLOCK.sleep(0.1)
        assert listener.heard == [
            "refused: the engine answered 400: 2000 tokens in and 49 out exceed max_model_len 2048"
        ]

    in_virtual_time(story)


@pytest.mark.parametrize("drop", ["cancel", "close"])
def test_what_is_dropped_is_heard_of_no_more_and_takes_no_cache(drop: str) -> None:
    async def story() -> None:
        engine = await VirtualLauncher(OPT.gpu()).launch(make_settings(), timeout=100)
        channel, kept = engine.channel(), Heard()
        gone = Heard()
        engine.channel().submit(make_request(10, 50), kept)
        ticket = channel.submit(make_request(10, 1000), gone)
        await CLOCK.sleep(0.1)
        if drop == "cancel":
            ticket.cancel()
        else:
            await channel.close()
        heard = list(gone.heard)
        await CLOCK.sleep(5)
        assert gone.heard == heard
        assert kept.heard[-1] == "finished"
        sample = await engine.sample()
        assert (sample.running, sample.waiting, sample.kv_usage) == (0, 0, 0)

    in_virtual_time(story)


def test_sampling_that_sorts_takes_more_memory() -> None:
    async def story() -> None:
        engine = await VirtualLauncher(OPT.gpu()).launch(make_settings(), timeout=100)
        before = engine.memory
        channel = engine.channel()
        for _ in range(256):
            channel.submit(make_request(10, 8, top_p=0.9, logprobs=5), Heard())
        await CLOCK.sleep(5)
        assert engine.memory > before

    in_virtual_time(story)


def test_noise_is_of_the_second_and_of_the_size_that_was_asked_for() -> None:
    noise = Noise(0.05, seed=3)
    assert noise.stretch(17.01) == noise.stretch(17.99) != noise.stretch(18.0)
    speeds = [1 / noise.stretch(float(second)) for second in range(2000)]
    mean = sum(speeds) / len(speeds)
    deviation = (sum((speed - mean) ** 2 for speed in speeds) / len(speeds)) ** 0.5
    assert mean == pytest.approx(1, abs=0.005)
    assert deviation == pytest.approx(0.05, rel=0.1)


def test_the_same_run_gives_the_same_figures() -> None:
    def once() -> Any:
        return in_virtual_time(lambda: packed(OPT, 96, 2, kv_gib=12, share=0.25, seconds=3))

    assert once() == once()


def test_a_loop_nobody_will_wake_says_so() -> None:
    async def story() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="deadlock"):
        in_virtual_time(story)
