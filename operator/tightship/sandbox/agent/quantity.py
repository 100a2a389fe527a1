"""Kubernetes quantities and Go durations as plain numbers."""

from __future__ import annotations

from fractions import Fraction

_SUFFIXES = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
    "Ti": Fraction(2**40),
    "Pi": Fraction(2**50),
}


def parse(quantity: str | int | float) -> Fraction:
    """The number a quantity stands for: bytes, cores or a count.

    Raises:
        ValueError: it is no quantity.
    """
    text = str(quantity).strip()
    digits = text.rstrip("numkMGTPi")
    try:
        return Fraction(digits) * _SUFFIXES[text[len(digits) :]]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no quantity") from None


def divide(quantity: str | int, divisor: str) -> int:
    """A resourceFieldRef's value: the quantity in units of the divisor ("0" means 1), rounded up."""
    unit = parse(divisor) or Fraction(1)
    return -int(-parse(quantity) // unit)
