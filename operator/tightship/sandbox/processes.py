"""The sandbox's processes: started in order, restarted where that is their contract, watched, ended.

A process that is `vital` takes the sandbox down with it; one that is not is started again after a pause, as a
Deployment would. One that was stopped on purpose stays down until it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

RESTART_PAUSE = 1.0
STOP_PATIENCE = 10.0
_PR_SET_PDEATHSIG = 1


class ProcessError(Exception):
    """A process of the sandbox failed; the text has the end of its log."""


@dataclass(frozen=True)
class Command:
    """What to run; `vital`: the sandbox cannot go on without it."""

    name: str
    argv: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    vital: bool = True
    cores: frozenset[int] = frozenset()


def die_with_parent() -> None:
    """For a child between fork and exec: be killed when the parent is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Processes:
    """All processes of one sandbox, with a log file each."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._commands: dict[str, Command] = {}
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._wanted: set[str] = set()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, command: Command) -> None:
        """Start a process and keep it."""
        self._commands[command.name] = command
        await self.resume(command.name)

    async def resume(self, name: str) -> None:
        """Start a stopped process again; nothing happens when it runs.

        Raises:
            KeyError: there never was a process of that name.
        """
        command = self._commands[name]
        if name in self._wanted:
            return
        self._wanted.add(name)
        process = await self._spawn(command)
        self._keepers[name] = asyncio.create_task(self._keep(command, process))

    async def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a process by a signal and leave it down; SIGKILL after STOP_PATIENCE seconds."""
        self._wanted.discard(name)
        process = self._running.get(name)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            try:
                await asyncio.wait_for(process.wait(), STOP_PATIENCE)
            except asyncio.TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        keeper = self._keepers.pop(name, None)
        if keeper is not None:
            keeper.cancel()

    def kill_all(self) -> None:
        """End all at once; nobody waits for an answer any more."""
        self._wanted.clear()
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def pid(self, name: str) -> int | None:
        """The process ID of a process that runs."""
        process = self._running.get(name)
        return None if process is None or process.returncode is not None else process.pid

    def tail(self, name: str, size: int = 2000) -> str:
        """The end of a process's log."""
        path = self._logs / f"{name}.log"
        return path.read_text(errors="replace")[-size:] if path.exists() else ""

    async def _spawn(self, command: Command) -> asyncio.subprocess.Process:
        def prepare() -> None:
            die_with_parent()
            if command.cores:
                os.sched_setaffinity(0, command.cores)

        with (self._logs / f"{command.name}.log").open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                env={**os.environ, **command.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=prepare,
            )
        self._running[command.name] = process
        return process

    async def _keep(self, command: Command, process: asyncio.subprocess.Process) -> None:
        while command.name in self._wanted:
            code = await process.wait()
            if command.name not in self._wanted:
                return
            log.warning("%s ended with %s", command.name, code)
            if command.vital:
                if not self.failed.done():
                    self.failed.set_result(f"{command.name} ended with {code}:\n{self.tail(command.name)}")
                return
            await asyncio.sleep(RESTART_PAUSE)
            process = await self._spawn(command)
