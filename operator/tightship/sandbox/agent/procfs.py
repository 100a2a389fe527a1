"""`<node>/proc/<pid>/cgroup`: which pod a process belongs to, where a container has no cgroup to tell.

A real node's /proc shows the pod's UID in a process's cgroup path. The agent keeps the same lines in files of its own,
current to within one `PERIOD`, for every process of every pod, descendants included.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tightship.sandbox.agent.devices import qos_class
from tightship.sandbox.agent.pod import PodWorker

PERIOD = 0.3


async def keep(directory: Path, workers: Mapping[str, PodWorker]) -> None:
    """Keep the files of one node below `directory` until cancelled."""
    _clear(directory)
    known: dict[int, str] = {}
    while True:
        current = {
            pid: _line(worker, name)
            for worker in list(workers.values())
            for name, pids in worker.processes().items()
            for pid in pids
        }
        for pid in known.keys() - current.keys():
            shutil.rmtree(directory / str(pid), ignore_errors=True)
        for pid, line in current.items():
            if known.get(pid) != line:
                _write(directory / str(pid), line)
        known = current
        await asyncio.sleep(PERIOD)


def _clear(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _line(worker: PodWorker, container: str) -> str:
    kind = qos_class(worker.pod).lower()
    middle = "" if kind == "guaranteed" else f"/{kind}"
    return f"0::/kubepods{middle}/pod{worker.uid}/{container}\n"


def _write(directory: Path, line: str) -> None:
    directory.mkdir(exist_ok=True)
    fresh = directory / ".cgroup"
    fresh.write_text(line)
    os.replace(fresh, directory / "cgroup")
