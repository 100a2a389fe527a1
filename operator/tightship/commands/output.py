"""What the commands print: aligned columns, and lines that a reader may stop reading."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of as many cells each as lines, with the cells of a column as wide as its widest."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def show(lines: Iterable[str]) -> None:
    """Print lines to standard output; a reader that leaves early is no error."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # The reader has what it wanted (`| head -1`). What is still buffered has nowhere to go, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
