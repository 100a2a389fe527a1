"""Container logs: one file a start, each line with its time, as container runtimes write them.

A line is `TIME F TEXT`, or `TIME P TEXT` when the container wrote no line end after it.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2
LINE_LIMIT = 2**20


def timestamp() -> str:
    """Now, as RFC 3339 in UTC with microseconds."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def record(stream: asyncio.StreamReader, path: Path) -> None:
    """Copy a container's output to its log until it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the reader's limit: it dropped the line
                continue
            if not line:
                return
            mark = b" F " if line.endswith(b"\n") else b" P "
            file.write(timestamp().encode() + mark + line.removesuffix(b"\n") + b"\n")
            file.flush()


def tail_text(path: Path, lines: int, limit: int) -> str:
    """The last `lines` lines of a log without their times, at most `limit` bytes."""
    try:
        content = path.read_bytes()[-(limit + lines * 40) :]
    except OSError:
        return ""
    kept = [line.partition(b" ")[2][2:] for line in content.split(b"\n")[:-1][-lines:]]
    return b"\n".join(kept)[-limit:].decode(errors="replace")


@dataclass(frozen=True)
class Selection:
    """Which lines of a log are wanted; `since`: RFC 3339 in UTC."""

    follow: bool = False
    tail: int | None = None
    since: str = ""
    timestamps: bool = False
    limit: int | None = None


async def read(path: Path, selection: Selection, running: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield the selected lines; with `follow`, go on until `running` is cleared and all is read."""
    sent = 0
    position = 0
    first = True
    while True:
        last_round = not running.is_set()
        chunk = await asyncio.to_thread(_read_from, path, position)
        whole = chunk.rfind(b"\n") + 1
        position += whole
        whole_lines = chunk[:whole].split(b"\n")[:-1]
        lines = [line for line in whole_lines if line[: len(selection.since)].decode() >= selection.since]
        if first and selection.tail is not None:
            lines = lines[max(0, len(lines) - selection.tail) :]
        first = False
        for line in lines:
            text = _shown(line, selection.timestamps)
            if selection.limit is not None:
                text = text[: selection.limit - sent]
            sent += len(text)
            if text:
                yield text
        if not selection.follow or last_round:
            return
        await asyncio.sleep(POLL)


def _shown(line: bytes, timestamps: bool) -> bytes:
    """What a reader gets of a line of the file."""
    time, mark, text = line.split(b" ", 2)
    return (time + b" " if timestamps else b"") + text + (b"\n" if mark == b"F" else b"")


def _read_from(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read()
    except OSError:
        return b""
