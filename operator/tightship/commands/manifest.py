"""Reading manifests that a user hands to a command: YAML or JSON, one document or several, a `List` included."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

_KIND = "BatchProfile"


class InputError(ValueError):
    """A file, or a question, that nothing can be decided from; the text is for the user."""


def read_profile(filename: str) -> Mapping[str, Any]:
    """The one BatchProfile in a file of YAML or JSON documents, a `List` included; `-` is standard input.

    Raises:
        InputError: the file can't be read, or holds none or several.
    """
    try:
        text = sys.stdin.read() if filename == "-" else Path(filename).read_text(encoding="utf-8")
        documents = list(yaml.safe_load_all(text))
    except OSError as error:
        raise InputError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError("not a text file in UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}") from error
    objects = list(_objects(documents))
    profiles = [obj for obj in objects if obj.get("kind", _KIND) == _KIND]
    if not profiles:
        kinds = ", ".join(sorted({str(obj["kind"]) for obj in objects})) or "nothing"
        raise InputError(f"holds {kinds}, no {_KIND}")
    if len(profiles) > 1:
        names = ", ".join(_name(profile) for profile in profiles)
        raise InputError(f"holds {len(profiles)} {_KIND}s ({names}): give one at a time")
    return profiles[0]


def _objects(documents: list[Any]) -> Iterator[Mapping[str, Any]]:
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, Mapping):
            raise InputError(f"a {_KIND} is a mapping, not {type(document).__name__}")
        items = document.get("items")
        if str(document.get("kind", "")).endswith("List") and isinstance(items, list):
            yield from _objects(items)
        else:
            yield document


def _name(profile: Mapping[str, Any]) -> str:
    metadata = profile.get("metadata")
    return str(metadata.get("name", "unnamed")) if isinstance(metadata, Mapping) else "unnamed"
