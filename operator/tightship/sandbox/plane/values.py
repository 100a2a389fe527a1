"""Small value helpers: copies, times, quantities, paths, random names.

Invariant: stored objects are never changed in place; whoever wants to change one takes ``copy`` first.
"""

from __future__ import annotations

import math
import re
import secrets
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

from tightship.api.units import BINARY_SUFFIXES, DECIMAL_SUFFIXES, exact_quantity
from tightship.sandbox.plane.errors import Obj

_BINARY = {"": Fraction(1), **{suffix: Fraction(size) for suffix, size in BINARY_SUFFIXES.items()}}
# What would need n is rounded up to it.
_DECIMAL = {"": Fraction(1), **{suffix: size for suffix, size in DECIMAL_SUFFIXES.items() if suffix != "n"}}
# The alphabet of generated names in Kubernetes: no vowels, so no words.
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


def copy(value: Any) -> Any:
    """A deep copy of a JSON value."""
    if isinstance(value, dict):
        return {key: copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy(item) for item in value]
    return value


def dig(value: Any, *path: str, default: Any = None) -> Any:
    """The value under nested keys, or ``default`` where any of them is missing or null."""
    for key in path:
        if not isinstance(value, dict):
            return default
        value = value.get(key)
        if value is None:
            return default
    return value


def now() -> datetime:
    """The present time, UTC."""
    return datetime.now(timezone.utc)


def stamp(at: datetime | None = None) -> str:
    """A ``metav1.Time``: RFC 3339, whole seconds."""
    return (at or now()).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_stamp(at: datetime | None = None) -> str:
    """A ``metav1.MicroTime``: RFC 3339 with microseconds."""
    return (at or now()).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Reads any RFC 3339 time. Raises ValueError."""
    match = re.match(r"^(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)$", text)
    if not match:
        raise ValueError(f"{text!r} is no RFC 3339 time")
    day, clock, fraction, zone = match.groups()
    at = datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)
    if fraction:
        at += timedelta(microseconds=int(fraction[1:7].ljust(6, "0")))
    if zone not in "Zz":
        sign = -1 if zone[0] == "-" else 1
        at -= sign * timedelta(hours=int(zone[1:3]), minutes=int(zone[4:6]))
    return at


def canonical_quantity(text: str | int | float) -> str:
    """The form in which the server stores a quantity: no fractions, the largest suffix that fits.

    The suffix family (binary or decimal) is the one that was written. Raises ValueError.
    """
    number = exact_quantity(text)
    if number == 0:
        return "0"
    sizes = _BINARY if str(text).endswith("i") and number.denominator == 1 else _DECIMAL
    for suffix in sorted(sizes, key=lambda each: sizes[each], reverse=True):
        if number % sizes[suffix] == 0:
            return f"{number // sizes[suffix]}{suffix}"
    return f"{math.ceil(number / DECIMAL_SUFFIXES['n'])}n"


def random_suffix(length: int = 5) -> str:
    """Random letters as ``generateName`` appends them."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def safe_encode(number: int) -> str:
    """A number in the alphabet of generated names (revision hashes)."""
    return "".join(_ALPHABET[int(digit) % len(_ALPHABET)] for digit in str(number))


def key_of(obj: Obj) -> tuple[str, str]:
    """(namespace, name); the namespace is empty for cluster-scoped objects."""
    meta = obj["metadata"]
    return meta.get("namespace") or "", meta["name"]


def is_controlled_by(obj: Obj, uid: str) -> bool:
    """Whether the owner with this UID controls the object."""
    refs = obj["metadata"].get("ownerReferences") or []
    return any(ref.get("controller") and ref.get("uid") == uid for ref in refs)


def controller_of(obj: Obj) -> Obj | None:
    """The controlling owner reference, if there is one."""
    for ref in obj["metadata"].get("ownerReferences") or []:
        if ref.get("controller"):
            return dict(ref)
    return None


def owner_reference(owner: Obj) -> Obj:
    """A controlling owner reference to ``owner``."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def condition(obj: Obj, kind: str) -> Obj | None:
    """The status condition of a type, if there is one."""
    for entry in dig(obj, "status", "conditions", default=[]):
        if entry.get("type") == kind:
            return dict(entry)
    return None


def set_condition(status: Obj, kind: str, state: str, reason: str = "", message: str = "", **extra: Any) -> None:
    """Sets a condition in place; ``lastTransitionTime`` moves on flips only."""
    entries = status.setdefault("conditions", [])
    old = next((entry for entry in entries if entry.get("type") == kind), None)
    entry: Obj = {"type": kind, "status": state, **extra}
    if reason:
        entry["reason"] = reason
    if message:
        entry["message"] = message
    unflipped = old is not None and old.get("status") == state
    entry["lastTransitionTime"] = old["lastTransitionTime"] if old and unflipped else stamp()
    if old is None:
        entries.append(entry)
    else:
        entries[entries.index(old)] = entry
