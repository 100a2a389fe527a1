"""What the commands print: aligned columns, and lines that a reader may stop reading.

Nothing that is only shown may end what is being done: where a reader has left (`| head`, a `tee` that died, a terminal that was
closed), the rest is said to nobody.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of as many cells each as lines, with the cells of a column as wide as its widest."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def show(lines: Iterable[str]) -> None:
    """Print lines to standard output; a reader that leaves early is no error.

    Raises:
        SystemExit: 2, where the lines can't be written for another cause (a full disk), which is then said.
    """
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        say(f"tightship: standard output can't be written: {error.strerror or error}")
        raise SystemExit(2) from error


def say(text: str) -> None:
    """Print a line to standard error, for as long as somebody reads there."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Have all that is written to a stream from now on go nowhere, what it still holds at exit too."""
    with contextlib.suppress(OSError, ValueError):  # no file is behind it, or it is closed already
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
