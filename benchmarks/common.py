"""What the benchmarks share: a table to read, and a JSON file that says where, when and how it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
"""Where results go unless told otherwise; not tracked."""


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, aligned to be read as text too.

    Args:
        columns: heading by the key of `rows` it shows; a heading that ends in `:` is of numbers, aligned right.
        rows: values are shown as they are, floats with four significant digits, None as a dash.
    """
    keys = list(columns)
    right = [columns[key].endswith(":") for key in keys]
    lines = [[columns[key].removesuffix(":") for key in keys], *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(keys))]
    rule = ["-" * (width - 1) + (":" if far else "-") for width, far in zip(widths, right, strict=True)]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(map(_pad, line, widths, right)) + " |" for line in lines)


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores this process may use, memory, kernel, Python."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memoryGiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def write_json(path: Path, name: str, results: Any, **more: Any) -> Path:
    """Write results with name, time, command and machine beside them; makes the folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]]),
        "version": _version(),
        "machine": machine(),
        **more,
        "results": results,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def _version() -> str | None:
    try:
        return metadata.version("tightship")
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
