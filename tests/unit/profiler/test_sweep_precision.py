"""Which levels of the sweep may be coarse: rungs on the way up, where nothing hangs on them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tightship.api.v1alpha1 import batchprofile as api
from tightship.core.curve import Metric, Objective, Statistic
from tightship.profiler.job import make_job
from tightship.profiler.session import Session
from tightship.profiler.sweep import Sweep
from unit.profiler.fakes import FakeDevice, make_profile

ITL = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, 0.03)


def lower(
    batch: int, *, kv_tokens: int = 10**6, floor: float = 0.1, objectives: tuple[Objective, ...] = (ITL,)
) -> float | None:
    """T of the level that a batch may be coarse against; points at the powers of two below 64, each with 1.6 x the last one's T."""
    job = make_job(make_profile(), "facebook/opt-1.3b", FakeDevice(), {})
    points = {
        1 << power: api.Point(batch=1 << power, total_tokens_per_second=str(100 * 1.6**power)) for power in range(6)
    }
    session: Any = SimpleNamespace(
        job=replace(
            job, objectives=objectives, efficiency_floor=floor, settings=replace(job.settings, max_num_seqs=128)
        ),
        report=SimpleNamespace(points=points),
        info=SimpleNamespace(kv_tokens=kv_tokens),
        load_context=SimpleNamespace(mean=400.0),
    )
    return Sweep(cast(Session, session))._lower(batch)


def test_a_rung_on_the_way_up_is_held_against_half_its_batch() -> None:
    assert lower(8) == pytest.approx(100 * 1.6**2)
    assert lower(64) == pytest.approx(100 * 1.6**5)


@pytest.mark.parametrize(
    ("batch", "more"),
    [
        (1, {}),  # every efficiency is measured by it
        (48, {}),  # between two rungs
        (128, {}),  # the largest: the baseline too
        (32, {"kv_tokens": 400 * 60}),  # the cache is full at 60
        (32, {"floor": 0.2}),  # its efficiency may be 0.16 to 0.42
        (32, {"objectives": (Objective(Metric.INTER_TOKEN_LATENCY, Statistic.P95, 0.03),)}),
        (32, {"objectives": (ITL, Objective(Metric.TIME_TO_FIRST_TOKEN, Statistic.MEAN, 1.0))}),
    ],
)
def test_what_something_may_hang_on_is_measured_precisely(batch: int, more: dict[str, Any]) -> None:
    assert lower(batch, **more) is None
