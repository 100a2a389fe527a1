"""Who asked the API server for what, from its audit log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True)
class Request:
    """One request that was answered: its verb, resource with subresource ("pods/status"), the client's user agent, and the object's name."""

    verb: str
    resource: str
    agent: str
    name: str
    dry_run: bool

    @property
    def writes(self) -> bool:
        """Whether it was to change something."""
        return self.verb in WRITES and not self.dry_run


class Audit:
    """Reads a growing audit log from where it was left."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[Request]:
        """What was answered since the last look."""
        found = []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                found.append(_request(line))
        return found


def _request(line: bytes) -> Request:
    entry = json.loads(line)
    target = entry.get("objectRef") or {}
    resource = "/".join(filter(None, (target.get("resource"), target.get("subresource")))) or entry["requestURI"]
    return Request(
        entry["verb"],
        resource,
        str(entry.get("userAgent") or "").split(" ")[0].split("/")[0],
        str(target.get("name") or ""),
        "dryRun=" in entry["requestURI"],
    )


def counts(requests: Iterable[Request]) -> dict[str, int]:
    """How many, by "verb resource"; dry runs apart."""
    found = Counter(f"{'dry-run ' if each.dry_run else ''}{each.verb} {each.resource}" for each in requests)
    return dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))
