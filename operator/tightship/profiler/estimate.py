"""From windows to a rate and its half-width: the mean of the windows, or their regression on the prompts they met.

Prompts arrive in lumps. A window with more of them than its share has less time left for tokens, so windows differ though the engine does
not. What share the workload gives them is known, though: mean input over mean output tokens. With d seconds, g generated and p
prompt tokens in a window, and rho that share, the model is

    d / g = a + b (p / g - rho),      b >= 0,

fitted by least squares with weights g (a control variate with known mean; Lavenberg and Welch, "A perspective on the use of control
variables", Management Science 27, 1981). a is the time of a token in a window with exactly its share, so 1 / a is the rate, corrected also for
a measurement that met too many prompts or too few as a whole. The fit takes a degree of freedom, which doesn't pay where prompts are cheap: of
the two estimates the narrower is taken. A b below 0 says that prompts save time; then it is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT: Final = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


@dataclass(frozen=True)
class Window:
    """What one window saw."""

    seconds: float
    generated: float
    """Tokens generated in it."""
    prompts: float = 0.0
    """Tokens of the prompts whose first token came in it (so vLLM counts them); 0 in all windows where the engine doesn't count them."""

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.generated / self.seconds


@dataclass(frozen=True)
class Estimate:
    """A rate and how well it is known."""

    rate: float
    """Generated tokens per second."""
    half_width: float | None
    """Half-width of its 95 % interval, relative to it; None where too few windows tell."""


def estimate(windows: Sequence[Window], prompts_per_token: float) -> Estimate:
    """The rate that windows of one steady state show.

    Args:
        windows: at least one.
        prompts_per_token: prompt tokens for each generated token, by the workload: mean input over mean output.
    """
    seconds, generated = sum(one.seconds for one in windows), sum(one.generated for one in windows)
    plain = Estimate(generated / seconds, half_width([one.rate for one in windows]))
    corrected = _corrected(windows, prompts_per_token)
    if corrected is None or plain.half_width is None or (corrected.half_width or 0.0) >= plain.half_width:
        return plain
    return corrected


def half_width(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % interval of the values' mean, relative to the mean; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    if mean <= 0:
        return None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return _student(count - 1) * deviation / math.sqrt(count) / mean


def _corrected(windows: Sequence[Window], prompts_per_token: float) -> Estimate | None:
    """The regression; None where it can't be made or makes no sense."""
    count = len(windows)
    if count < 4 or any(one.generated <= 0 for one in windows) or not any(one.prompts for one in windows):
        return None
    weight = sum(one.generated for one in windows)
    cost = sum(one.seconds for one in windows) / weight
    excess = sum(one.prompts for one in windows) / weight - prompts_per_token
    deviations = [
        (one.generated, one.prompts / one.generated - prompts_per_token - excess, one.seconds / one.generated - cost)
        for one in windows
    ]
    spread = sum(tokens * x * x for tokens, x, _ in deviations)
    if spread <= 0:
        return None
    slope = sum(tokens * x * y for tokens, x, y in deviations) / spread
    exact = cost - slope * excess
    if slope < 0 or exact <= 0:
        return None
    variance = sum(tokens * (y - slope * x) ** 2 for tokens, x, y in deviations) / (count - 2)
    error = math.sqrt(variance * (1 / weight + excess * excess / spread))
    return Estimate(1 / exact, _student(count - 2) * error / exact)


def _student(freedom: int) -> float:
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.4 / freedom
