"""Manifests that a user hands to a command, and those that commands write.

Read: YAML or JSON, one document or several, a `List` included. Written: one BatchProfile whose measurement stands in
`spec.results`, so that it survives Git and `kubectl apply`, and no `status`, which neither keeps. A file is replaced whole or
not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels

_PROFILE = "BatchProfile"
_SERVICE = "LLMService"
MEASURED = tuple(field.alias or name for name, field in api.Measured.model_fields.items())
"""The fields of a status that are a measurement's results."""


class InputError(ValueError):
    """A file, or a question, that nothing can be decided from; the text is for the user."""


def read_profile(filename: str) -> Mapping[str, Any]:
    """The one BatchProfile in a file of YAML or JSON documents, a `List` included; `-` is standard input.

    Raises:
        InputError: the file can't be read, or holds none or several.
    """
    return _read(filename, _PROFILE)


def read_service(filename: str) -> Mapping[str, Any]:
    """The one LLMService in a file; otherwise as `read_profile`."""
    return _read(filename, _SERVICE)


def manifest(
    profile: Mapping[str, Any], measured: Mapping[str, Any], annotations: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The BatchProfile to keep in Git or to apply elsewhere: key, how it was measured, and what was measured as `spec.results`.

    `measured` is a status, or results: of it only what was measured is taken. Of the metadata name, namespace and our own
    labels stay: the rest is the cluster's that it came from.
    """
    given, spec = profile.get("metadata") or {}, profile["spec"]
    kept = {name: value for name in ("name", "namespace") if (value := given.get(name))}
    ours = {name: value for name, value in (given.get("labels") or {}).items() if name == labels.PROFILE_KEY}
    metadata = kept | ({"labels": ours} if ours else {}) | ({"annotations": dict(annotations)} if annotations else {})
    results = _without_empty({name: measured[name] for name in MEASURED if measured.get(name) is not None})
    for name, order in (("points", ("batch",)), ("trials", ("batch", "replicas"))):
        if name in results:
            results[name] = sorted(results[name], key=lambda each, order=order: tuple(each[field] for field in order))  # type: ignore[misc]
    how = _without_empty(spec.get("measurement") or {})
    measurement = {"measurement": how} if how else {}
    return {
        "apiVersion": labels.API_VERSION,
        "kind": _PROFILE,
        "metadata": metadata,
        "spec": {"key": spec["key"], **measurement, "results": results},
    }


class _Dumper(yaml.SafeDumper):
    """Short mappings and lists of scalars on one line, all else in blocks; nothing is wrapped."""


_LONGEST_LINE = 130


def _collection(dumper: _Dumper, node: yaml.CollectionNode) -> yaml.CollectionNode:
    children = [child for each in node.value for child in (each if isinstance(each, tuple) else (each,))]
    length = sum(len(str(child.value)) + 2 for child in children)
    flat = all(isinstance(child, yaml.ScalarNode) for child in children)
    node.flow_style = flat and (length <= _LONGEST_LINE or isinstance(node, yaml.SequenceNode))
    return node


_Dumper.add_representer(
    dict, lambda dumper, value: _collection(dumper, dumper.represent_mapping("tag:yaml.org,2002:map", value.items()))
)
_Dumper.add_representer(
    list, lambda dumper, value: _collection(dumper, dumper.represent_sequence("tag:yaml.org,2002:seq", value))
)


def first_error(error: Exception) -> str:
    """An error in one line; of an object that isn't what the API says, the first field that is wrong."""
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
    return str(error)


def to_yaml(obj: Mapping[str, Any], comment: str = "") -> str:
    """An object as YAML that people can read and diff: in the API's order, short innermost collections on one line."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    # Through JSON, so that a value used twice is written twice and not as an alias.
    return head + yaml.dump(
        json.loads(json.dumps(obj)), Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True
    )


def _without_empty(value: Any) -> Any:
    """A value without the empty mappings and lists in it, which say nothing."""
    if isinstance(value, list):
        return [_without_empty(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    kept = {name: _without_empty(each) for name, each in value.items()}
    return {name: each for name, each in kept.items() if each not in ({}, [])}


def exists(filename: str) -> bool:
    """Whether a file is there. Raises InputError for a name that no file can have."""
    try:
        return Path(filename).exists()
    except OSError as error:
        raise InputError(f"{filename[:97]}...: {error.strerror or error}") from error


def write(filename: str, text: str) -> None:
    """Write to a file, or to standard output for `-`, whole or not at all.

    Raises:
        InputError: the file can't be written.
    """
    if filename == "-":
        print(text, end="", flush=True)
        return
    path = Path(filename)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"{filename} can't be written: {error.strerror or error}") from error


def _read(filename: str, kind: str) -> Mapping[str, Any]:
    try:
        text = sys.stdin.read() if filename == "-" else Path(filename).read_text(encoding="utf-8")
        documents = list(yaml.safe_load_all(text))
    except OSError as error:
        raise InputError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError("not a text file in UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}") from error
    objects = list(_objects(documents, kind))
    found = [obj for obj in objects if obj.get("kind", kind) == kind]
    if not found:
        kinds = ", ".join(sorted({str(obj["kind"]) for obj in objects})) or "nothing"
        raise InputError(f"holds {kinds}, no {kind}")
    if len(found) > 1:
        names = ", ".join(_name(each) for each in found)
        raise InputError(f"holds {len(found)} {kind}s ({names}): give one at a time")
    return found[0]


def _objects(documents: list[Any], kind: str) -> Iterator[Mapping[str, Any]]:
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, Mapping):
            raise InputError(f"a {kind} is a mapping, not {type(document).__name__}")
        items = document.get("items")
        if str(document.get("kind", "")).endswith("List") and isinstance(items, list):
            yield from _objects(items, kind)
        else:
            yield document


def _name(obj: Mapping[str, Any]) -> str:
    metadata = obj.get("metadata")
    return str(metadata.get("name", "unnamed")) if isinstance(metadata, Mapping) else "unnamed"
