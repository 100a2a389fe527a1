"""Server-side apply and field ownership (``metadata.managedFields``).

The idea of the real implementation, on plain sets of paths. An applier owns exactly the fields of its configuration. Its
fields win; where another manager owns one of them with another value, that is a conflict, unless forced. Fields that
the applier owned before and no longer mentions are removed, unless someone else owns them too. A plain update makes its
manager the owner of all that it changed.

Invariant: applying the same configuration twice changes neither the object nor its ``managedFields``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightship.sandbox.plane.errors import ApiError, Obj
from tightship.sandbox.plane.fieldsets import (
    CONTAINER,
    Path,
    Paths,
    element_of,
    flatten,
    from_fields,
    remove,
    show,
    to_fields,
)
from tightship.sandbox.plane.schema import Node
from tightship.sandbox.plane.values import copy, stamp

# Nobody owns these: they identify the object or belong to the system.
_UNOWNED = {("f:apiVersion",), ("f:kind",), ("f:metadata",)} | {
    ("f:metadata", f"f:{name}")
    for name in (
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "generation",
        "managedFields",
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    )
}


@dataclass(frozen=True)
class Manager:
    """Who wrote: a field manager, its operation, and through which endpoint and version."""

    name: str
    operation: str
    api_version: str
    subresource: str = ""


Owners = dict[Manager, tuple[Paths, str]]


def owners_of(obj: Obj) -> Owners:
    """The owners that an object's ``managedFields`` name, with the time of each."""
    found: Owners = {}
    for entry in obj["metadata"].get("managedFields") or []:
        if "fieldsV1" not in entry:
            continue
        manager = Manager(
            entry.get("manager", ""),
            entry.get("operation", ""),
            entry.get("apiVersion", ""),
            entry.get("subresource", ""),
        )
        found[manager] = (from_fields(entry["fieldsV1"]), entry.get("time", stamp()))
    return found


def set_owners(obj: Obj, owners: Owners) -> None:
    """Writes the owners into ``managedFields``; managers that own nothing are left out."""
    entries = []
    for manager, (paths, time) in owners.items():
        if not paths:
            continue
        entry: Obj = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": manager.api_version,
            "time": time,
            "fieldsType": "FieldsV1",
            "fieldsV1": to_fields(paths),
        }
        if manager.subresource:
            entry["subresource"] = manager.subresource
        entries.append(entry)
    obj["metadata"].pop("managedFields", None)
    if entries:
        order = {"Apply": 0}
        entries.sort(key=lambda entry: (order.get(entry["operation"], 1), entry["time"], entry["manager"]))
        obj["metadata"]["managedFields"] = entries


def _paths(values: dict[Path, Any]) -> Paths:
    return {path for path in values if path not in _UNOWNED and path[:2] not in _UNOWNED}


@dataclass
class _Difference:
    added: Paths
    removed: Paths
    modified: Paths


def _compare(node: Node, old: Any, new: Any) -> _Difference:
    before, after = flatten(node, old).values, flatten(node, new).values
    had, has = _paths(before), _paths(after)
    modified = {path for path in had & has if before[path] is not CONTAINER or after[path] is not CONTAINER}
    return _Difference(has - had, had - has, {path for path in modified if before[path] != after[path]})


def track_update(node: Node, old: Obj | None, new: Obj, manager: Manager) -> None:
    """Sets ``managedFields`` of ``new`` after a create, update or patch, in place."""
    base = new if "managedFields" in new["metadata"] else (old or new)
    owners = owners_of(base)
    change = _compare(node, old or {}, new)
    taken = change.added | change.modified
    if not (taken or change.removed):
        set_owners(new, owners)
        return
    lost = change.modified | change.removed | (change.added if old else set())
    owners = {who: (paths - lost, time) for who, (paths, time) in owners.items()}
    mine = owners.get(manager, (set(), ""))[0]
    owners[manager] = ((mine - change.removed) | taken, stamp())
    set_owners(new, owners)


def merge(node: Node, live: Any, config: Any) -> Any:
    """The live value with the configuration laid over it."""
    if isinstance(config, dict) and isinstance(live, dict) and not node.atomic:
        out = dict(live)
        for name, item in config.items():
            out[name] = merge(node.child(name), live.get(name), item)
        return out
    if isinstance(config, list) and isinstance(live, list) and node.granular:
        wanted = {element_of(node, item): item for item in config}
        merged = []
        for item in live:
            key = element_of(node, item)
            merged.append(merge(node.item(), item, wanted.pop(key)) if key in wanted else item)
        return [*merged, *(copy(item) for item in wanted.values())]
    return copy(config)


def apply(node: Node, live: Obj | None, config: Obj, manager: Manager, force: bool) -> Obj:
    """The object after a server-side apply, ``managedFields`` included.

    Raises:
        ApiError: 409 with one cause a conflicting field, when not forced.
    """
    owners = owners_of(live) if live else {}
    mine = {path for path in flatten(node, config).owned if path not in _UNOWNED and path[:2] not in _UNOWNED}
    before, time = owners.get(manager, (set(), ""))
    others = {who: entry for who, entry in owners.items() if who != manager}
    base = {key: value for key, value in (live or {}).items() if key not in ("apiVersion", "kind")}
    config = {**config, "metadata": {key: value for key, value in config["metadata"].items() if key != "managedFields"}}
    merged: Obj = merge(node, {"apiVersion": config["apiVersion"], "kind": config["kind"], **base}, config)
    if live:
        merged = _drop_unmentioned(node, merged, before - mine, mine, [paths for paths, _ in others.values()])
    change = _compare(node, live or {}, merged)
    touched = (change.added | change.modified) & mine
    if live and not force:
        _refuse_conflicts({who: paths & touched for who, (paths, _) in others.items()})
    lost = change.modified | change.added | change.removed
    others = {who: (paths - lost, at) for who, (paths, at) in others.items()}
    set_owners(merged, {**others, manager: (mine, time if mine == before and not lost else stamp())})
    return merged


def _drop_unmentioned(node: Node, merged: Obj, gone: Paths, mine: Paths, others: list[Paths]) -> Obj:
    kept: Paths = set(mine)
    for paths in others:
        kept |= paths
    # A container whose children someone still owns stays, and so does everything in it that nobody gave up.
    holders = {path[:length] for path in kept for length in range(1, len(path) + 1)}
    doomed = {path for path in gone if path not in holders}
    if not doomed:
        return merged
    return dict(remove(node, merged, doomed) or {})


def _refuse_conflicts(conflicts: dict[Manager, Paths]) -> None:
    causes, texts = [], []
    for manager, paths in sorted(conflicts.items(), key=lambda entry: entry[0].name):
        if not paths:
            continue
        using = f" using {manager.api_version}" if manager.operation != "Apply" else ""
        who = f'conflict with "{manager.name}"'
        if manager.subresource:
            who += f' with subresource "{manager.subresource}"'
        for path in sorted(paths):
            causes.append({"reason": "FieldManagerConflict", "message": who + using, "field": show(path)})
        fields = [show(path) for path in sorted(paths)]
        listed = f": {fields[0]}" if len(fields) == 1 else ":\n" + "\n".join(f"- {name}" for name in fields)
        texts.append(
            f"{who}{using}{listed}".replace("conflict with", "conflicts with" if len(fields) > 1 else "conflict with")
        )
    if not causes:
        return
    plural = "s" if len(causes) > 1 else ""
    message = f"Apply failed with {len(causes)} conflict{plural}: " + "\n".join(texts)
    raise ApiError(409, "Conflict", message, {"causes": causes})
