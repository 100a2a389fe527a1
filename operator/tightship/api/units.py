"""Go durations and Kubernetes quantities, to plain numbers and back.

The API writes durations and sizes as text, the decisions count in seconds and bytes. All arithmetic on the way is exact
(fractions), so parsing what was formatted gives back the same number.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Final

_DURATION_UNITS: Final = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "μs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
_DURATION_PART: Final = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)

_QUANTITY: Final = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:([KMGTPE]i)|([numkMGTPE])|[eE]([+-]?\d{1,3}))?", re.ASCII)
BINARY_SUFFIXES: Final[dict[str, int]] = {
    suffix: 1024 ** (power + 1) for power, suffix in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"])
}
"""A quantity's binary suffixes, smallest first, and what they stand for."""
DECIMAL_SUFFIXES: Final = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "E": Fraction(10**18),
}
"""Its decimal ones, smallest first."""


def parse_duration(text: str) -> float:
    """Seconds in a Go duration such as `13.89ms`, `1m30s` or `1.5s`; only `0` may go without a unit.

    Raises:
        ValueError: the text is no duration, or is negative.
    """
    body = str(text).strip()
    if body in ("0", "+0"):
        return 0.0
    if body.startswith("-"):
        raise ValueError(f"duration {text!r} is negative")
    body = body.removeprefix("+")
    parts = list(_DURATION_PART.finditer(body))
    if not parts or "".join(part.group() for part in parts) != body:
        raise ValueError(
            f"{text!r} is not a duration: write a number and a unit (ns, us, ms, s, m, h), e.g. 15ms or 1m30s"
        )
    return float(sum((Fraction(part[1].rstrip(".")) * _DURATION_UNITS[part[2]] for part in parts), Fraction(0)))


def format_duration(seconds: float) -> str:
    """A Go duration for a number of seconds: `13.89ms`, `1.5s`, `1m30s`.

    Six significant digits; past a minute, milliseconds.

    Raises:
        ValueError: the number is negative or not finite.
    """
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{seconds!r} seconds is not a duration")
    rounded = float(f"{seconds:.6g}")  # first, so that 0.9999999 s reads 1s and never 1000ms
    if rounded >= 60:
        return _compose(seconds)
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if rounded >= size:
            return f"{rounded / size:.6g}{unit}"
    return f"{round(rounded / 1e-9)}ns" if rounded >= 1e-9 else "0s"


def _compose(seconds: float) -> str:
    hours, rest = divmod(round(seconds * 1000), 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{rest / 1000:g}s" if rest else ""]
    return "".join(parts)


def parse_quantity(quantity: str | int | float) -> int:
    """The whole number a Kubernetes quantity stands for (bytes for memory), rounded up as Kubernetes does.

    `64Gi`, `16G`, `500Mi`, `1e9`, `1.5Gi`, `1500m` (= 2) and bare numbers are quantities.

    Raises:
        ValueError: the text is no quantity, is negative, or exceeds the 63 bits that Kubernetes counts in.
    """
    amount = math.ceil(_positive(quantity))
    if amount >= 1 << 63:
        raise ValueError(f"quantity {str(quantity)[:40]} is larger than 2^63")
    return amount


def parse_cpu(quantity: str | int | float) -> int:
    """Thousandths of a core in a CPU quantity, rounded up: `500m` is 500, `2` is 2000, `1.5` is 1500.

    Raises:
        ValueError: the text is no quantity, or is negative.
    """
    return math.ceil(_positive(quantity) * 1000)


def _positive(quantity: str | int | float) -> Fraction:
    number = exact_quantity(quantity.strip() if isinstance(quantity, str) else quantity)
    if number < 0:
        raise ValueError(f"quantity {quantity!r} is negative")
    return number


def exact_quantity(quantity: str | int | float) -> Fraction:
    """The number a Kubernetes quantity stands for (bytes, cores, a count), of either sign and not rounded.

    Raises:
        ValueError: the text is no quantity.
    """
    match = _QUANTITY.fullmatch(str(quantity)) if not isinstance(quantity, bool) else None
    if match is None:
        raise ValueError(
            f"{quantity!r} is not a quantity: write a number and a suffix (Ki Mi Gi Ti, k M G T, m), e.g. 64Gi"
        )
    sign, digits, binary, decimal, exponent = match.groups()
    number = Fraction(sign + digits.rstrip("."))
    if binary:
        return number * BINARY_SUFFIXES[binary]
    if decimal:
        return number * DECIMAL_SUFFIXES[decimal]
    return number * Fraction(f"1e{exponent}") if exponent else number


def format_quantity(amount: int) -> str:
    """The shortest exact quantity for a number of bytes, binary suffixes first: `64Gi`, `11469Mi`, `16G`.

    Raises:
        ValueError: the number is negative.
    """
    if amount < 0:
        raise ValueError(f"{amount} is not a quantity of bytes")
    sizes = {**BINARY_SUFFIXES, **{suffix: int(size) for suffix, size in DECIMAL_SUFFIXES.items() if size > 1}}
    forms = [f"{amount // size}{suffix}" for suffix, size in sizes.items() if amount and amount % size == 0]
    return min([*forms, str(amount)], key=len)


def format_cpu(millicores: int) -> str:
    """The CPU quantity for thousandths of a core: 2000 is `2`, 500 is `500m`.

    Raises:
        ValueError: the number is negative.
    """
    if millicores < 0:
        raise ValueError(f"{millicores} is not a number of millicores")
    return str(millicores // 1000) if millicores % 1000 == 0 else f"{millicores}m"
