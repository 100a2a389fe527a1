"""What happened on the nodes since the last look, as entries of a journal.

Hollow nodes keep the journal themselves. Of real processes the replicas' own logs tell when an engine was starting, and on which GPU; a start
that was cut short has no end there and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tightship.sandbox.agent.hollow import journal
from tightship.sandbox.agent.hollow.journal import Entry

_LINE = re.compile(r"(?m)^\S+ F (\S+) tightship: (?:.* (GPU-\S+): \d+ of|(starting)|(the engine is healthy))")


class News(Protocol):
    """A place to look at again and again."""

    def read(self) -> list[Entry]:
        """What has come since the last time."""


class JournalNews:
    """The journal of hollow nodes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[Entry]:
        """See News."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        return journal.read(whole.decode().splitlines(keepends=True))


class LogNews:
    """The logs of replicas on nodes whose directories these are."""

    def __init__(self, nodes: Iterable[Path]) -> None:
        self._nodes = list(nodes)
        self._starts: dict[tuple[str, float], list[Entry]] = {}

    def read(self) -> list[Entry]:
        """See News. Every start that was ever seen, in order, since logs of different pods come in any order."""
        for node in self._nodes:
            for path in node.glob("pods/*/containers/engine/*.log"):
                # a pod that goes takes its logs along
                text = path.read_text(errors="replace") if path.exists() else ""
                for start in starts(text, path.parents[2].name):
                    self._starts[start[0].uid, start[0].at] = start
        # a start ends before the next begins, if both are of the same moment
        entries = [entry for start in self._starts.values() for entry in start]
        entries.sort(key=lambda entry: (entry.at, entry.what != journal.HEALTHY))
        return [Entry(journal.AGENT, 0.0), *entries]


def starts(log: str, uid: str) -> list[list[Entry]]:
    """The engine starts in a replica's log that came to their end, as pairs of entries."""
    found, gpu, since = list[list[Entry]](), "", 0.0
    for time, seen, starting, healthy in _LINE.findall(log):
        if seen:
            gpu = seen
        elif starting:
            since = _seconds(time)
        elif healthy and since:
            pair = ((journal.START, since), (journal.HEALTHY, _seconds(time)))
            found.append([Entry(what, at, gpu=gpu, pod=uid, uid=uid) for what, at in pair])
            since = 0.0
    return found


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
