"""A finite run of engines on one GPU in virtual time, as the published benchmark did it: every request there at the start.

A discrete event loop: of all engines the one whose host part ends first queues for the GPU first, so the queue is fair
and the run is exactly repeatable for a seed. The last requests of a run drain; figures therefore compare with those of
another finite run of the same number of requests, not with a steady state.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .engine import Engine, Outcome, Sequence, Step
from .gpu import Gpu

# Means of the published ShareGPT workload with OPT's tokenizer. Its lengths aren't published: they are taken as
# gamma-distributed, each at most half of the published max_model_len, with spreads at which the cache fills as published
# (16 % at batch 96, 38 % at 256) and a run's drain costs about as much throughput.
SHAREGPT_INPUT_MEAN = 110.6
SHAREGPT_OUTPUT_MEAN = 292.4
SHAREGPT_INPUT_VARIATION = 1.5
SHAREGPT_OUTPUT_VARIATION = 0.95
SHAREGPT_MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class Result:
    """What a run gave. Seconds, tokens per second, shares of 1; `duration` is that of the whole run."""

    duration: float
    requests: int
    output_tokens: int
    total_tokens: int
    mean_itl: float
    gpu_utilization: float
    memory_peaks: tuple[float, ...]
    preemptions: int

    @property
    def total_throughput(self) -> float:
        """Tokens in and out per second."""
        return self.total_tokens / self.duration


def sharegpt_lengths(
    count: int,
    seed: int = 0,
    input_mean: float = SHAREGPT_INPUT_MEAN,
    output_mean: float = SHAREGPT_OUTPUT_MEAN,
    longest: int = SHAREGPT_MAX_MODEL_LEN,
) -> list[tuple[int, int]]:
    """Return `count` pairs of input and output lengths with the published means, gamma-distributed, within `longest`."""
    generator = random.Random(seed)
    inputs = _gamma_lengths(generator, input_mean, SHAREGPT_INPUT_VARIATION, [longest // 2] * count)
    outputs = _gamma_lengths(generator, output_mean, SHAREGPT_OUTPUT_VARIATION, [longest // 2] * count)
    return list(zip(inputs, outputs, strict=True))


def run(
    gpu: Gpu,
    loads: Iterable[tuple[Engine, list[tuple[int, int]]]],
    observe: Callable[[Engine, Outcome, float], None] | None = None,
) -> Result:
    """Let each engine work off its requests, given as pairs of input and output lengths, all there at time 0.

    `observe` is told of every step: whose it was, what it brought, and when it ended.
    """
    engines: list[Engine] = []
    sequences: list[Sequence] = []
    ready: list[tuple[float, int, Step]] = []
    for number, (engine, lengths) in enumerate(loads):
        own = [Sequence(prompt, output) for prompt, output in lengths]
        for sequence in own:
            engine.add(sequence)
        engines.append(engine)
        sequences += own
        _push(ready, engine, number, 0.0)
    now = 0.0
    while ready:
        at, number, step = heapq.heappop(ready)
        end = gpu.serve(at, step.cost.gpu, step.cost.memory_share, owner=number)
        outcome = engines[number].complete(step, end)
        if observe is not None:
            observe(engines[number], outcome, end)
        now = max(now, end)
        _push(ready, engines[number], number, end)
    return _result(gpu, engines, sequences, now)


def _push(ready: list[tuple[float, int, Step]], engine: Engine, number: int, now: float) -> None:
    step = engine.plan(now)
    if step is not None:
        heapq.heappush(ready, (now + step.cost.host, number, step))


def _result(gpu: Gpu, engines: list[Engine], sequences: list[Sequence], duration: float) -> Result:
    gaps = sum(sequence.generated - 1 for sequence in sequences)
    waited = sum(sequence.last_token - (sequence.first_token or 0.0) for sequence in sequences)
    output = sum(sequence.generated for sequence in sequences)
    return Result(
        duration=duration,
        requests=len(sequences),
        output_tokens=output,
        total_tokens=output + sum(sequence.prompt for sequence in sequences),
        mean_itl=waited / gaps if gaps else 0.0,
        gpu_utilization=gpu.busy / duration,
        memory_peaks=tuple(engine.peak_blocks / engine.scheduling.num_blocks for engine in engines),
        preemptions=sum(engine.preemptions for engine in engines),
    )


def _gamma_lengths(generator: random.Random, mean: float, variation: float, longest: list[int]) -> list[int]:
    """Draw lengths, scaled until cutting each to 4..longest leaves their mean within half a per cent."""
    shape = 1 / variation**2
    drawn = [generator.gammavariate(shape, mean / shape) for _ in longest]
    scale = 1.0
    for _ in range(20):
        lengths = [min(max(round(length * scale), 4), most) for length, most in zip(drawn, longest, strict=True)]
        found = sum(lengths) / len(lengths)
        if abs(found / mean - 1) < 0.005:
            break
        scale *= mean / found
    return lengths
