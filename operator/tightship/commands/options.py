"""The options that a decision depends on: read from text, and filled in with what a profile was measured for.

What is wrong with a text ends as argparse.ArgumentTypeError, with what to write instead. What must hold: what isn't given is the
profile's own word (`spec.measurement`), so that a command without options decides what was decided when it was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tightship.api.units import format_duration, parse_duration
from tightship.api.v1alpha1.batchprofile import Measurement
from tightship.commands.manifest import InputError, first_error
from tightship.core.advisor import Recommendation
from tightship.core.curve import Metric, Objective, Statistic
from tightship.decide import (
    DEFAULT_EFFICIENCY_FLOOR,
    DEFAULT_MAX_REPLICAS,
    DEFAULT_MEMORY_RESERVE,
    DEFAULT_MINIMUM_GAIN,
    ProfileError,
    decision_from_profile,
    objectives_from_api,
    parse_reserve,
)

NONE: Final = "none"
"""Instead of a bound: nothing is asked of this latency."""
METRICS: Final = {"itl": Metric.INTER_TOKEN_LATENCY, "ttft": Metric.TIME_TO_FIRST_TOKEN}
"""Options, by destination, and the latency that each bounds."""


class Bound(NamedTuple):
    """An option's bound on a latency."""

    seconds: float | None
    """None where it was said that there is none."""
    statistic: Statistic | None = None
    """None where --statistic says it."""


@dataclass(frozen=True)
class Settings:
    """All that a decision depends on besides the profile."""

    objectives: tuple[Objective, ...] = ()
    efficiency_floor: float = DEFAULT_EFFICIENCY_FLOOR
    minimum_gain: float = DEFAULT_MINIMUM_GAIN
    memory_reserve: str = DEFAULT_MEMORY_RESERVE
    max_replicas: int = DEFAULT_MAX_REPLICAS

    def decide(self, profile: Mapping[str, Any]) -> Recommendation:
        """The advisor's answer for a profile. Raises ProfileError."""
        return decision_from_profile(
            profile,
            self.objectives,
            efficiency_floor=self.efficiency_floor,
            minimum_gain=self.minimum_gain,
            memory_reserve=self.memory_reserve,
            max_replicas=self.max_replicas,
        )


def add_decision_options(parser: Any, otherwise: str) -> None:
    """Add the options that a decision depends on to a parser or a group of one; none has a default of its own.

    `otherwise`: whose word counts where an option isn't given, such as "the profile's".
    """
    for name, words, such in (
        ("itl", "inter-token latency", "30ms or p95:30ms"),
        ("ttft", "time to first token, unqueued", "2s or p95:2s"),
    ):
        parser.add_argument(
            f"--{name}",
            type=bound,
            metavar="[STATISTIC:]DURATION",
            help=f"bound on the {words}, such as {such}, or {NONE} (without --itl and --ttft: {otherwise} objectives)",
        )
    parser.add_argument(
        "--statistic",
        choices=[statistic.value for statistic in Statistic],
        help="the statistic of bounds that don't name theirs (default: mean)",
    )
    parser.add_argument(
        "--efficiency-floor",
        type=floor,
        metavar="SHARE",
        help=f"least T(B) / (B T(1)); 0 turns it off (default: {otherwise}, else {DEFAULT_EFFICIENCY_FLOOR})",
    )
    parser.add_argument(
        "--memory-reserve",
        type=reserve,
        metavar="RESERVE",
        help=f"device memory left free, a percentage or a quantity (default: {otherwise}, else {DEFAULT_MEMORY_RESERVE}%)",
    )
    parser.add_argument(
        "--minimum-gain",
        type=gain,
        metavar="RATIO",
        help=f"least throughput of a packed GPU over one replica's best (default: {otherwise}, else {DEFAULT_MINIMUM_GAIN})",
    )
    parser.add_argument(
        "--max-replicas-per-gpu",
        type=replicas,
        metavar="N",
        help=f"most replicas on one GPU (default: {otherwise}, else {DEFAULT_MAX_REPLICAS})",
    )


def objectives(args: argparse.Namespace) -> tuple[Objective, ...] | None:
    """The objectives among the options; None where there are none, which is not the same as none wanted.

    Raises:
        InputError: --statistic without a bound that it could be of.
    """
    given = {metric: value for name, metric in METRICS.items() if (value := getattr(args, name)) is not None}
    default = Statistic(args.statistic or Statistic.MEAN)
    if args.statistic is not None and not any(each.seconds and each.statistic is None for each in given.values()):
        raise InputError(
            f"--statistic {args.statistic} is of no bound: give it with --itl or --ttft, such as --itl 30ms"
        )
    if not given:
        return None
    return tuple(
        Objective(metric, each.statistic or default, each.seconds)
        for metric, each in given.items()
        if each.seconds is not None
    )


def settings(profile: Mapping[str, Any], args: argparse.Namespace) -> Settings:
    """What to decide by: the options, and what isn't among them from the profile's `spec.measurement`.

    Raises:
        InputError: the options contradict each other.
        ProfileError: the profile's word can't be read.
    """
    own, asked = settings_of(measured_for(profile)), objectives(args)

    def given(name: str, otherwise: Any) -> Any:
        value = getattr(args, name)
        return otherwise if value is None else value

    return Settings(
        objectives=own.objectives if asked is None else asked,
        efficiency_floor=given("efficiency_floor", own.efficiency_floor),
        minimum_gain=given("minimum_gain", own.minimum_gain),
        memory_reserve=given("memory_reserve", own.memory_reserve),
        max_replicas=given("max_replicas_per_gpu", own.max_replicas),
    )


def remark(chosen: Settings, args: argparse.Namespace) -> list[str]:
    """What to say of objectives that nobody gave."""
    if args.itl is not None or args.ttft is not None or not chosen.objectives:
        return []
    bounds = " and ".join(f"{each} {format_duration(each.maximum)}" for each in chosen.objectives)
    return [f"note: decided for what the profile was measured for, {bounds}; --itl and --ttft ask for something else"]


def settings_of(how: Measurement) -> Settings:
    """What a profile was measured for, to decide by."""
    return Settings(
        objectives=objectives_from_api(how.objectives),
        efficiency_floor=float(how.efficiency_floor),
        minimum_gain=float(how.minimum_gain),
        memory_reserve=how.memory_reserve,
        max_replicas=how.max_replicas_per_gpu,
    )


def measured_for(profile: Mapping[str, Any]) -> Measurement:
    """The part of a profile's `spec.measurement` that a decision depends on; the defaults where it says nothing.

    Raises:
        ProfileError: it can't be read.
    """
    here: Any = profile
    for depth, name in enumerate(("spec", "measurement")):
        here = here.get(name) or {}
        if not isinstance(here, Mapping):
            raise ProfileError(f"{'.'.join(('spec', 'measurement')[: depth + 1])} is not a mapping")
    wanted = ("objectives", "efficiencyFloor", "minimumGain", "memoryReserve", "maxReplicasPerGPU")
    said = {name: here[name] for name in wanted if here.get(name) is not None}
    checks: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("efficiencyFloor", floor),
        ("minimumGain", gain),
        ("memoryReserve", reserve),
    )
    try:
        for name, check in checks:
            if name in said:
                said[name] = str(said[name])  # people write numbers without quotes
                check(said[name])
        how = Measurement.model_validate(said)
        settings_of(how)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ProfileError(f"spec.measurement: {first_error(error)}") from error
    return how


def to_words(chosen: Settings, own: Settings) -> list[str]:
    """The options that have a profile decided by `chosen` where it was measured for `own`; the objectives are always named."""
    names = {metric: name for name, metric in METRICS.items()}
    words = [f"--{names[each.metric]} {to_text(each)}" for each in chosen.objectives]
    if not chosen.objectives and own.objectives:
        words = [f"--itl {NONE}"]
    for option, value, otherwise in (
        ("--efficiency-floor", f"{chosen.efficiency_floor:g}", f"{own.efficiency_floor:g}"),
        ("--minimum-gain", f"{chosen.minimum_gain:g}", f"{own.minimum_gain:g}"),
        ("--max-replicas-per-gpu", str(chosen.max_replicas), str(own.max_replicas)),
    ):
        words += [f"{option} {value}"] if value != otherwise else []
    if parse_reserve(chosen.memory_reserve) != parse_reserve(own.memory_reserve):
        words.append(f"--memory-reserve {chosen.memory_reserve}")
    return words


def to_text(objective: Objective) -> str:
    """An objective as --itl and --ttft take it."""
    statistic = "" if objective.statistic is Statistic.MEAN else f"{objective.statistic.value}:"
    return f"{statistic}{format_duration(objective.maximum)}"


def bound(text: str) -> Bound:
    """A bound on a latency, `30ms` or `p95:30ms`; or `none`."""
    if text == NONE:
        return Bound(None)
    name, colon, duration = text.rpartition(":")
    statistics = [statistic.value for statistic in Statistic]
    if colon and name not in statistics:
        raise argparse.ArgumentTypeError(
            f"{text!r}: no statistic is called {name!r}; there are {', '.join(statistics)}"
        )
    return Bound(latency(duration), Statistic(name) if colon else None)


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
