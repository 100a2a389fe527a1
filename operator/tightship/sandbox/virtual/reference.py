"""The published procedure in the same simulation: for every batch a fresh engine and 2,000 prompts, all there at once.

A finite run fills up at its start and drains at its end, so besides its own figures a point holds those of its *saturated* part:
from when twice the batch has finished (before, the requests in flight are younger than in a steady state) until none is waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tightship.core.curve import Curve, Latency, Point
from tightship.sandbox.simulation import calibration
from tightship.sandbox.simulation.engine import Engine, Outcome, Scheduling
from tightship.sandbox.simulation.experiment import run
from tightship.sandbox.simulation.serving.startup import CONTEXT_BYTES, GRAPH_BYTES, activation_bytes
from tightship.sandbox.virtual.settings import PUBLISHED_PROMPTS, Setting

_WARM = 2
_BLOCK = 16


@dataclass(frozen=True)
class FinitePoint:
    """One batch of the published procedure. Seconds, tokens per second."""

    batch: int
    seconds: float
    """The engine's time, its start not counted."""
    throughput: float
    itl: float
    requests: int
    preemptions: int
    saturated_seconds: float
    saturated_throughput: float | None
    """None where the run is too short to be saturated at all."""
    saturated_itl: float | None


def measure(setting: Setting, batch: int, prompts: int = PUBLISHED_PROMPTS) -> FinitePoint:
    """Run one batch with the published number of prompts, or another: then `seconds` are scaled by the tokens there would have been."""
    pairs = [setting.pairs[number % len(setting.pairs)] for number in range(prompts)]
    scheduling = Scheduling(
        batch, max(setting.token_budget, batch), setting.max_model_len, blocks(setting, batch), _BLOCK
    )
    window = _Window(batch)
    result = run(setting.gpu(), [(Engine(scheduling, setting.model.costs), pairs)], window.observe)
    rate = window.tokens / window.seconds if window.seconds else None
    return FinitePoint(
        batch=batch,
        seconds=result.duration * PUBLISHED_PROMPTS * setting.lengths.mean_output / result.output_tokens,
        throughput=result.total_throughput,
        itl=result.mean_itl,
        requests=result.requests,
        preemptions=result.preemptions,
        saturated_seconds=window.seconds,
        saturated_throughput=rate and rate * (1 + setting.input_per_output),
        saturated_itl=window.waited / window.gaps if window.gaps else None,
    )


def steady(setting: Setting, batch: int) -> FinitePoint:
    """A run long enough that its saturated part is most of it: 30 prompts for each in flight, and at least 200."""
    return measure(setting, batch, max(200, 30 * batch))


def sweep(setting: Setting, *, shortened: bool = False) -> list[FinitePoint]:
    """The published sweep over its grid; `shortened` cuts runs of small batches to where their drain is still under 2 %."""
    most = PUBLISHED_PROMPTS
    return [
        measure(setting, batch, calibration.shortened(batch, most) if shortened else most) for batch in setting.grid
    ]


def curve(points: Iterable[FinitePoint]) -> Curve:
    """The curve that a user of the published procedure has, drain and all."""
    return Curve(
        Point(
            batch=point.batch,
            throughput=point.throughput,
            inter_token_latency=Latency(mean=point.itl),
            requests=point.requests,
            preemptions=point.preemptions,
        )
        for point in points
    )


def blocks(setting: Setting, batch: int) -> int:
    """Blocks of KV cache of an engine with that `max_num_seqs`: what its share leaves beside weights, activations and graphs."""
    rows = min(batch, setting.token_budget)
    graphs = min(2 * batch, 512) // 8 + 3
    fixed = CONTEXT_BYTES + setting.model.weight_bytes + activation_bytes(setting.model, setting.token_budget, rows)
    left = int(setting.share * setting.memory) - fixed - graphs * GRAPH_BYTES
    return left // (_BLOCK * setting.model.kv_bytes_per_token)


class _Window:
    """Counts the saturated part of a run."""

    def __init__(self, batch: int) -> None:
        self._warm = _WARM * batch
        self._finished = 0
        self._since: float | None = None
        self.tokens = self.gaps = 0
        self.waited = self.seconds = 0.0

    def observe(self, engine: Engine, outcome: Outcome, now: float) -> None:
        """Take a step into account."""
        if self._since is not None and engine.waiting:
            self.tokens += len(outcome.tokens)
            self.seconds = now - self._since
            for gap, count in outcome.gaps.items():
                self.waited += gap * count
                self.gaps += count
        self._finished += len(outcome.finished)
        if self._since is None and self._finished >= self._warm:
            self._since = now
