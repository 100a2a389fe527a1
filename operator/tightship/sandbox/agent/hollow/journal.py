"""What happened on hollow nodes, in order: who held which GPU, whose engine started, served and ended on it.

An entry is one JSON line. Entries are written before the API server hears of what they tell, so whoever reads them after a status
finds everything that came before it. A journal that goes on in a file after the agent was killed says so by an `agent` entry:
nothing that was open before it still is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

AGENT, DOWN, HOLD, RELEASE, START, HEALTHY, END = "agent", "down", "hold", "release", "start", "healthy", "end"


@dataclass(frozen=True)
class Entry:
    """One thing that happened. `at`: epoch seconds; `pod`: its name; `memory`: bytes of an engine."""

    what: str
    at: float
    node: str = ""
    gpu: str = ""
    pack: str = ""
    pod: str = ""
    uid: str = ""
    memory: int = 0


class Journal:
    """Entries in memory, and in a file too where one is given.

    Args:
        path: the file that they are added to.
        clock: epoch seconds.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.entries: list[Entry] = []
        self._file: TextIO | None = None if path is None else path.open("a", encoding="utf-8")
        self._clock = clock

    def write(self, what: str, **fields: Any) -> None:
        """Add an entry that happens now."""
        entry = Entry(what, self._clock(), **fields)
        if self._file is None:
            self.entries.append(entry)
        else:
            self._file.write(json.dumps(asdict(entry)) + "\n")
            self._file.flush()


def read(lines: Iterable[str]) -> list[Entry]:
    """The entries of a journal's file; a last line that a kill cut short is left out."""
    found = []
    for line in lines:
        if line.endswith("\n"):
            fields: Mapping[str, Any] = json.loads(line)
            found.append(Entry(**fields))
    return found
