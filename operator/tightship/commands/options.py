"""The options that a decision depends on, read from text. What is wrong ends as argparse.ArgumentTypeError, with what to write instead."""

from __future__ import annotations

import argparse

from tightship.api.units import parse_duration
from tightship.decide import parse_reserve


def latency(text: str) -> float:
    """A latency above 0, in seconds."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} can't be met by anything: give a latency above 0, e.g. 15ms")
    return seconds


def reserve(text: str) -> str:
    """A memory reserve, a percentage or a quantity; the text as it was given."""
    try:
        parse_reserve(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def floor(text: str) -> float:
    """An efficiency floor: a share from 0 to below 1."""
    return _ranged(text, 0, 1, "an efficiency floor is a number from 0 to below 1, e.g. 0.1")


def gain(text: str) -> float:
    """A minimum gain: a ratio from 1."""
    return _ranged(text, 1, float("inf"), "a minimum gain is a number from 1, e.g. 1.05")


def _ranged(text: str, lowest: float, below: float, words: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not lowest <= number < below:
        raise argparse.ArgumentTypeError(f"{text!r}: {words}")
    return number


def replicas(text: str) -> int:
    """Replicas per GPU, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: replicas per GPU are a whole number from 1")
    return int(text)
