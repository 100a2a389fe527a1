"""Conditions of the metav1.Condition form, as values.

`lastTransitionTime` moves only when a status flips, so merging the same facts twice changes nothing. A kind's `Ready` is
the first of its gates that is not True, with that gate's reason and message copied, so the user reads the cause where they
look first. The clock is passed in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

Status = Literal["True", "False", "Unknown"]

# The API server refuses a longer message, and with it the whole status.
MESSAGE_LIMIT = 32768


@dataclass(frozen=True)
class Condition:
    """One observation: `type` and `reason` are CamelCase words, `message` is for a human, with numbers."""

    type: str
    status: Status
    reason: str
    message: str = ""


def merge(
    existing: Iterable[Mapping[str, Any]],
    observed: Iterable[Condition],
    *,
    generation: int,
    now: datetime,
    absent: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The condition list to write: `existing` brought up to date with `observed`.

    Conditions not observed stay as they are, except those of the types in `absent`, which go. The order of `existing` is
    kept and new types follow, so an unchanged list compares equal.

    Args:
        generation: the `metadata.generation` the observation is about.
        now: an aware time, used where a status flips.
    """
    merged = {str(old["type"]): dict(old) for old in existing if old["type"] not in absent}
    for condition in observed:
        if condition.type not in absent:
            merged[condition.type] = _updated(merged.get(condition.type), condition, generation, now)
    return list(merged.values())


def _updated(old: Mapping[str, Any] | None, new: Condition, generation: int, now: datetime) -> dict[str, Any]:
    unchanged = old is not None and old.get("status") == new.status and old.get("lastTransitionTime")
    return {
        "type": new.type,
        "status": new.status,
        "reason": new.reason,
        "message": new.message if len(new.message) <= MESSAGE_LIMIT else new.message[: MESSAGE_LIMIT - 1] + "…",
        "observedGeneration": generation,
        "lastTransitionTime": old["lastTransitionTime"] if old is not None and unchanged else timestamp(now),
    }


def timestamp(now: datetime) -> str:
    """RFC 3339 in UTC to the second, as metav1.Time writes it."""
    return now.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def first_failing(gates: Sequence[Condition]) -> Condition | None:
    """The first gate that is not True, in the order given; `None` when all hold."""
    return next((gate for gate in gates if gate.status != "True"), None)


def ready(gates: Sequence[Condition], *, reason: str, message: str = "", kind: str = "Ready") -> Condition:
    """The summary of `gates`: True with `reason` when all hold, else the first failing gate's status, reason and message."""
    failing = first_failing(gates)
    if failing is None:
        return Condition(kind, "True", reason, message)
    return Condition(kind, failing.status, failing.reason, failing.message)


def find(conditions: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The condition of one type in a list read from the API, or `None`."""
    return next((condition for condition in conditions if condition.get("type") == kind), None)


def is_true(conditions: Iterable[Mapping[str, Any]], kind: str) -> bool:
    """Whether the condition of one type is there and True."""
    condition = find(conditions, kind)
    return condition is not None and condition.get("status") == "True"


def transitions(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conditions of `after` whose status or reason differs from `before`: what deserves an event."""
    old = {condition["type"]: (condition["status"], condition.get("reason")) for condition in before}
    return [new for new in after if old.get(new["type"]) != (new["status"], new.get("reason"))]
