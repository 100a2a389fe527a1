"""The container runtime as the pod workers see it, and the one that runs containers as local processes.

A pod has one network namespace for its life; each start of a container has a process tree of its own below a shim
(shim.py), with private mounts. Another runtime only has to keep the promises of the protocols: `exit` completes exactly
once, after nothing of the container is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tightship.sandbox.agent import logs, rootfs
from tightship.sandbox.agent.netns import PodNetwork

SHIM = Path(__file__).with_name("shim.py")


class StartError(Exception):
    """The container's command could not be executed."""


@dataclass(frozen=True)
class Exit:
    """How a container ended."""

    code: int
    reason: str


@dataclass(frozen=True)
class ContainerSpec:
    """One start of one container, everything resolved."""

    pod_uid: str
    name: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    hostname: str
    mounts: list[rootfs.Mount]
    cpus: frozenset[int]
    log: Path
    network: PodNetwork | None
    directory: Path
    """A directory of this container's own, for the shim's files."""


class Running(Protocol):
    """A started container."""

    id: str
    exit: asyncio.Future[Exit]

    def terminate(self) -> None:
        """Send SIGTERM to the command."""

    def kill(self, reason: str | None = None) -> None:
        """Kill everything; `reason` (for example OOMKilled) is what the exit will say instead of Error."""

    async def execute(self, argv: list[str], deadline: float) -> tuple[int, str]:
        """Run a command inside; returns exit code and output. Raises asyncio.TimeoutError after `deadline` seconds."""

    async def open(self, argv: list[str]) -> asyncio.subprocess.Process:
        """Start a command inside with its three streams piped."""

    def processes(self) -> list[int]:
        """The process IDs of the container now."""


class Runtime(Protocol):
    """Starts containers."""

    async def start(self, spec: ContainerSpec) -> Running:
        """Start a container; raises StartError when its command cannot be executed."""


@dataclass
class _Process:
    id: str
    exit: asyncio.Future[Exit]
    shim: asyncio.subprocess.Process
    main: int
    env: dict[str, str]
    cwd: str
    namespace: str
    reason: str | None = None
    follower: asyncio.Task[None] | None = None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self, reason: str | None = None) -> None:
        self.reason = self.reason or reason
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        if self.shim.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.shim.send_signal(number)

    async def execute(self, argv: list[str], deadline: float) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *enter_command(self.main, self.cwd),
            *argv,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), deadline)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        code = process.returncode or 0
        return (code if code >= 0 else 128 - code), output.decode(errors="replace")

    async def open(self, argv: list[str]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *enter_command(self.main, self.cwd),
            *argv,
            env=self.env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        return descendants(self.shim.pid)


def enter_command(pid: int, cwd: str) -> list[str]:
    """The command line that runs what follows it in the namespaces of `pid`."""
    script = f'cd {shlex.quote(cwd)} 2>/dev/null; exec "$@"'
    nsenter = shutil.which("nsenter") or "/usr/bin/nsenter"
    return [nsenter, "-t", str(pid), "-m", "-u", "-i", "-n", "--root", "--", "/bin/sh", "-c", script, "sh"]


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`, without it."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{current}/task"):
                text = Path(f"/proc/{current}/task/{task}/children").read_text()
                inner = [int(child) for child in text.split()]
                found += inner
                waiting += inner
    return found


class ProcessRuntime:
    """Runs each container as a process tree of this machine."""

    async def start(self, spec: ContainerSpec) -> Running:
        """See Runtime."""
        spec.directory.mkdir(parents=True, exist_ok=True)
        root = spec.directory / "root"
        root.mkdir(exist_ok=True)
        reading, writing = os.pipe()
        netns = None if spec.network is None else spec.network.descriptor
        plan = await asyncio.to_thread(rootfs.plan, spec.mounts)
        path = spec.directory / "shim.json"
        path.write_text(json.dumps(_shim_spec(spec, str(root), plan, writing, netns)))
        output, sink = await _pipe()
        try:
            shim = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(SHIM),
                str(path),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                # a signal to the agent's process group must not take the shim before it has cleaned up
                start_new_session=True,
                pass_fds=[writing] if netns is None else [writing, netns],
            )
        finally:
            os.close(writing)
            os.close(sink)
        answer = await asyncio.to_thread(_read_status, reading)
        if "started" not in answer:
            said = (await output.read()).decode(errors="replace")
            await shim.wait()
            raise StartError(str(answer.get("error") or said[-500:] or "the shim died"))
        future: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        main = int(answer["started"])
        running = _Process(uuid.uuid4().hex, future, shim, main, spec.env, spec.cwd, _namespace(shim.pid))
        running.follower = asyncio.create_task(_follow(running, output, spec.log))
        return running


def _shim_spec(spec: ContainerSpec, root: str, plan: list[list[str]], status: int, netns: int | None) -> dict[str, Any]:
    return {
        "parent": os.getpid(),
        "status": status,
        "netns": netns,
        "hostname": spec.hostname[:63],
        "root": root,
        "operations": plan,
        "argv": spec.argv,
        "env": spec.env,
        "cwd": spec.cwd,
        "cpus": sorted(spec.cpus),
    }


def _read_status(descriptor: int) -> dict[str, Any]:
    with os.fdopen(descriptor) as pipe:
        line = pipe.readline()
    return dict(json.loads(line)) if line else {}


def _namespace(pid: int | str) -> str:
    """What tells the mount namespace of a process from all others; empty when the process is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def _kill_namespace(namespace: str) -> None:
    """Kill every process that has a container's mount namespace."""
    while namespace:
        found = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _namespace(pid) == namespace]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


async def _pipe() -> tuple[asyncio.StreamReader, int]:
    """A pipe for a container's output; the end of the shim and the end of the output are two things to wait for."""
    reading, writing = os.pipe()
    reader = asyncio.StreamReader(limit=logs.LINE_LIMIT)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(reading, "rb", 0))
    return reader, writing


async def _follow(running: _Process, output: asyncio.StreamReader, log: Path) -> None:
    """Copy the output and complete `exit` when the shim is gone."""
    recording = asyncio.create_task(logs.record(output, log))
    code = await running.shim.wait()
    if code < 0:  # the shim itself was killed, and has not cleaned up
        await asyncio.to_thread(_kill_namespace, running.namespace)
    await recording
    code = code if code >= 0 else 128 - code
    reason = running.reason or ("Completed" if code == 0 else "Error")
    running.exit.set_result(Exit(code, reason))
