"""From windows to a rate: the mean and its interval, and what knowing the share of prompts brings."""

from __future__ import annotations

import random
from statistics import median

import pytest

from tightship.profiler.estimate import Estimate, Window, estimate, half_width

TOKEN, PROMPT = 0.010, 0.004  # seconds that an engine takes for a generated and for a prompt token


@pytest.mark.parametrize(
    ("values", "width"),
    [([1.0], None), ([0.0, 0.0], None), ([10.0] * 5, 0.0), ([9.0, 10.0, 11.0], 4.303 / 3**0.5 / 10)],
)
def test_half_width_is_students(values: list[float], width: float | None) -> None:
    assert half_width(values) == (None if width is None else pytest.approx(width))


def windows(prompts: list[float], *, noise: float = 0.0, seed: int = 0) -> list[Window]:
    """Windows of a hundred generated tokens each, on an engine that takes TOKEN and PROMPT seconds for one."""
    rng = random.Random(seed)
    return [Window((100 * TOKEN + met * PROMPT) * rng.gauss(1.0, noise), 100, met) for met in prompts]


def rate(prompts_per_token: float) -> float:
    """Generated tokens per second where the prompts have their share."""
    return 1 / (TOKEN + prompts_per_token * PROMPT)


def test_lumps_of_prompts_cost_no_precision() -> None:
    lumps = [0.0, 256.0, 64.0, 0.0, 128.0, 192.0]
    found = estimate(windows(lumps), 1.0)
    assert found.rate == pytest.approx(rate(1.0))
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
    plain = half_width([window.rate for window in windows(lumps)])
    assert plain is not None
    assert plain > 0.2


def test_a_measurement_that_met_too_few_prompts_is_corrected() -> None:
    few = [0.0, 64.0, 0.0, 64.0, 128.0]  # 0.5 a token, where the workload has one
    assert estimate(windows(few), 1.0).rate == pytest.approx(rate(1.0))
    assert sum(one.generated for one in windows(few)) / sum(one.seconds for one in windows(few)) > 1.15 * rate(1.0)


@pytest.mark.parametrize(
    "given",
    [
        windows([100.0] * 6, noise=0.02),  # no lumps: nothing to learn from
        [Window(1.0, tokens) for tokens in (99, 101, 100, 98, 102)],  # an engine that doesn't count prompts
        [Window(1.0, 90 + met / 10, met) for met in (50.0, 150.0, 100.0, 80.0, 120.0)],  # prompts that save time: noise
        windows([0.0, 200.0, 100.0]),  # too few windows
    ],
)
def test_without_anything_to_correct_by_it_is_the_plain_mean(given: list[Window]) -> None:
    generated, seconds = sum(one.generated for one in given), sum(one.seconds for one in given)
    assert estimate(given, 1.0) == Estimate(generated / seconds, half_width([one.rate for one in given]))


def test_windows_without_tokens_have_no_width() -> None:
    assert estimate([Window(1.0, 0.0)] * 5, 1.0) == Estimate(0.0, None)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits, widths, plain = 0, [], []
    for seed in range(400):
        rng = random.Random(seed)
        given = windows([64.0 * rng.choice((0, 1, 2, 3)) for _ in range(8)], noise=0.02, seed=seed)
        found = estimate(given, 0.96)
        assert found.half_width is not None
        hits += abs(found.rate / rate(0.96) - 1) <= found.half_width
        widths.append(found.half_width)
        plain.append(half_width([one.rate for one in given]) or 0.0)
    assert hits >= 0.9 * 400
    assert median(widths) < 0.4 * median(plain)
