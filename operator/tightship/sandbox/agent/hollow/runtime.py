"""The agent's runtime, prober and volumes for hollow nodes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tightship.sandbox.agent import rootfs
from tightship.sandbox.agent.events import Event, Recorder
from tightship.sandbox.agent.hollow.programs import Node, Program, program_of
from tightship.sandbox.agent.probes import Object
from tightship.sandbox.agent.runtime import ContainerSpec, Exit, Running
from tightship.sandbox.agent.volumes import Volumes

log = logging.getLogger(__name__)
_KILLED, _CRASHED = 137, 1


@dataclass
class HollowRunning:
    """A program's task as a container. Keeps the promise of `Running`: `exit` completes after the task's end."""

    program: Program
    exit: asyncio.Future[Exit]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    answered: dict[str, int] = field(default_factory=dict)
    """Successes in a row that each probe, by its text, was told; 0 after a failure."""
    task: asyncio.Task[int] | None = None
    reason: str | None = None

    def terminate(self) -> None:
        """See Running."""
        self.program.stop()

    def kill(self, reason: str | None = None) -> None:
        """See Running."""
        self.reason = self.reason or reason
        if self.task is not None:
            self.task.cancel()

    async def execute(self, argv: list[str], deadline: float) -> tuple[int, str]:
        """See Running."""
        return 126, "hollow containers have no processes to run a command in"

    async def open(self, argv: list[str]) -> asyncio.subprocess.Process:
        """See Running."""
        raise OSError("hollow containers have no processes to run a command in")

    def processes(self) -> list[int]:
        """See Running."""
        return []

    def ended(self, task: asyncio.Task[int]) -> None:
        """Complete `exit`."""
        if task.cancelled():
            outcome = Exit(_KILLED, self.reason or "Error")
        elif (error := task.exception()) is not None:
            log.error("program of %s", self.program.pod, exc_info=error)
            outcome = Exit(_CRASHED, "Error")
        else:
            outcome = Exit(task.result(), "Completed" if task.result() == 0 else "Error")
        if not self.exit.done():
            self.exit.set_result(outcome)


@dataclass
class HollowRuntime:
    """Starts programs on one node; `running` has those that run, by pod UID and container."""

    node: Node
    running: dict[tuple[str, str], HollowRunning] = field(default_factory=dict)

    async def start(self, spec: ContainerSpec) -> Running:
        """See Runtime."""
        program = program_of(spec.argv)(
            self.node,
            spec.env,
            spec.hostname,
            spec.pod_uid,
            _message_file(spec.mounts),
        )
        loop = asyncio.get_running_loop()
        running = HollowRunning(program, loop.create_future())
        key = spec.pod_uid, spec.name
        running.task = loop.create_task(program.run())
        self.running[key] = running

        def end(task: asyncio.Task[int]) -> None:
            if self.running.get(key) is running:
                del self.running[key]
            running.ended(task)

        running.task.add_done_callback(end)
        return running


def _message_file(mounts: list[rootfs.Mount]) -> Path | None:
    """The file behind the container's terminationMessagePath."""
    return next((Path(m.source) for m in mounts if m.source and m.source.endswith("/termination-log")), None)


class HollowProber:
    """Answers a probe when there is something new to say, so that a healthy pod costs nothing."""

    async def attempt(self, probe: Object, container: Object, address: str, running: Running) -> str | None:
        """See Prober."""
        assert isinstance(running, HollowRunning)
        program, key = running.program, str(sorted(probe.items(), key=str))
        enough = int(probe.get("successThreshold") or 1)
        while _is_old(running.answered.get(key), program.healthy, enough):
            program.health_changed.clear()
            await program.health_changed.wait()
        running.answered[key] = running.answered.get(key, 0) + 1 if program.healthy else 0
        return None if program.healthy else "context deadline exceeded"


def _is_old(answered: int | None, healthy: bool, enough: int) -> bool:
    """Whether a probe knows already: that it is well, or (nothing answered yet) that the start isn't over, which is no failure."""
    return answered is None if not healthy else (answered or 0) >= enough


class HollowVolumes(Volumes):
    """Volumes without content; what the environment refers to is read as ever."""

    async def set_up(self) -> None:
        """See Volumes."""

    async def refresh(self) -> None:
        """See Volumes."""

    def mounts(self, container: Object, variables: object) -> list[rootfs.Mount]:
        """See Volumes."""
        return []


class NoRecorder(Recorder):
    """Drops events."""

    def emit(self, event: Event) -> None:
        """See Recorder."""
