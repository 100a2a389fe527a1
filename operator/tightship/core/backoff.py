"""Nodes that turned out not to fit a service: kept off for a while, longer each time it turns out again. Pure.

They had no room for its replicas, or showed them another GPU than their claim's. A node may fit again, and nobody tells; one that never
does must not be tried for ever at the same pace. So each is left alone for ten minutes, then may be tried again, and is left alone
twice as long each time it doesn't fit again soon, at most six hours. It is forgotten when replicas serve there, or when it hasn't been
in the way for as long as it was last left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

FIRST = timedelta(minutes=10)
LONGEST = timedelta(hours=6)
MOST_NODES = 64
"""What is remembered at most; the ones that end last."""


@dataclass(frozen=True)
class Avoided:
    """A node that is left alone until `until`, since it turned out at `since`, for the `times`-th time, not to fit."""

    node: str
    since: datetime
    until: datetime
    times: int = 1


def length(times: int) -> timedelta:
    """How long a node is left alone after the `times`-th time."""
    return min(LONGEST, FIRST * (1 << min(times - 1, 10)))


def avoid(known: Iterable[Avoided], unfit: Iterable[str], serving: Iterable[str], now: datetime) -> tuple[Avoided, ...]:
    """What to remember now, by node: `unfit` are the nodes that don't fit at the moment, `serving` those where replicas serve."""
    unfit, kept = set(unfit), {}
    for each in known:
        if each.node not in unfit and (each.node in set(serving) or now >= each.until + length(each.times)):
            continue
        kept[each.node] = each
    for node in unfit:
        before = kept.get(node)
        if before is None or before.until <= now:
            times = before.times + 1 if before else 1
            kept[node] = Avoided(node, now, now + length(times), times)
    last = sorted(kept.values(), key=lambda each: (each.until, each.node))[-MOST_NODES:]
    return tuple(sorted(last, key=lambda each: each.node))
