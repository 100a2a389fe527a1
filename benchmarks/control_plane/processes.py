"""CPU time and memory of a sandbox's processes, from /proc, by what their command lines name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_MARKS = {
    "etcd": "etcd --data-dir",
    "kube-apiserver": "kube-apiserver ",
    "kube-controller-manager": "kube-controller-manager ",
    "kube-scheduler": "kube-scheduler ",
    "node agent": "tightship.sandbox.agent ",
    "operator": "tightship run ",
}


@dataclass(frozen=True)
class Usage:
    """CPU seconds used so far; resident memory now and at most so far, in MiB."""

    cpu: float
    memory: float
    peak: float


def usage(state: Path) -> dict[str, Usage]:
    """What each process of the sandbox in `state` uses."""
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            name = next((name for name, mark in _MARKS.items() if mark in line and str(state) in line), None)
            if name is not None:
                found[name] = _usage(directory)
        except OSError:
            continue  # it ended meanwhile
    return found


def _usage(directory: Path) -> Usage:
    fields = (directory / "stat").read_text().rpartition(")")[2].split()
    sizes = dict(
        line.split(":", 1) for line in (directory / "status").read_text().splitlines() if line.startswith("Vm")
    )
    return Usage(
        (int(fields[11]) + int(fields[12])) / _TICK,
        int(sizes["VmRSS"].split()[0]) / 1024,
        int(sizes["VmHWM"].split()[0]) / 1024,
    )
