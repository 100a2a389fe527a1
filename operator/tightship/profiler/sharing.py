"""How the engines of a packing trial share the device: a GPU through an MPS daemon of the Job's own, CPUs by cores.

What must hold. Under MPS: to CUDA a missing daemon is no error, the engines would silently take turns; so nothing counts as packed
under MPS before the daemon itself has listed a process of each engine. The daemon serves the trials' engines alone: the sweep and
the confirmation run know nothing of it. It outlives its clients (those of a daemon that dies, die with it), so engines are
stopped first, and it ends with the profiler however that ends. On CPUs: engine i computes on its own slice of the cores; where
there are fewer cores than slices they overlap, and what is measured then says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Final, Protocol

from tightship.profiler.clock import Clock
from tightship.profiler.engine import die_with_parent
from tightship.profiler.errors import ProfilerError
from tightship.profiler.gpu import DeviceIdentity

log = logging.getLogger(__name__)

PROGRAM: Final = "nvidia-cuda-mps-control"
ANSWER_SECONDS: Final = 20.0
START_SECONDS: Final = 20.0
ATTACH_SECONDS: Final = 15.0
QUIT_SECONDS: Final = 10.0
WORDS_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.25


class SharingError(ProfilerError):
    """The device can't be shared here; the message says what to do."""


class NotAttachedError(SharingError):
    """Engines run, but not all of them as clients of the MPS daemon: what they would show is time slicing."""


class Owner(Protocol):
    """An engine, as far as it can be told from others."""

    def owns(self, pid: int) -> bool:
        """Whether a process is one of its own."""


class Sharing(Protocol):
    """A way to put several engines on one device."""

    async def open(self) -> None:
        """Make ready for engines. Raises SharingError."""

    def environment(self, index: int) -> Mapping[str, str | None]:
        """Changes to the environment of engine `index`, 0 for the first; None removes a variable."""

    async def prove(self, engines: Sequence[Owner]) -> None:
        """Return once all these running engines are seen to share the device as they should. Raises NotAttachedError."""

    async def condition(self) -> str | None:
        """What is wrong with the sharing itself, in words; None when nothing is known to be."""

    def doubt(self, engines: int) -> str | None:
        """What a reader must know about `engines` engines sharing here, in words."""

    async def close(self) -> None:
        """Take down what `open` set up; the engines are stopped by then. May be called twice."""


class MpsControl:
    """Questions to the MPS daemon of one pipe directory.

    Its answers are text for people; relied on is the least there is: server PIDs are lines of digits, a status has FAULT in it or not,
    and `ps` prints a table whose first column is a client's PID.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ`: with the pipe directory, and the PATH that the program is on."""
        self._environ = dict(environ)

    async def ask(self, command: str) -> str:
        """The answer to one control command. Raises SharingError when there is none."""
        try:
            process = await asyncio.create_subprocess_exec(
                PROGRAM,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environ,
            )
        except OSError as error:
            raise SharingError(f"{PROGRAM} does not start: {error}") from error
        try:
            said, complained = await asyncio.wait_for(process.communicate(f"{command}\n".encode()), ANSWER_SECONDS)
        except asyncio.TimeoutError:
            raise SharingError(f"{PROGRAM} did not answer {command!r} within {ANSWER_SECONDS:.0f} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            words = (complained or said).decode(errors="replace").strip()
            raise SharingError(words or f"{PROGRAM} ended with {process.returncode}")
        return said.decode(errors="replace")

    async def servers(self) -> list[int]:
        """PIDs of the servers; none before the first client."""
        return parse_servers(await self.ask("get_server_list"))

    async def clients(self) -> set[int]:
        """PIDs of all clients, as the daemon sees them; empty without a server."""
        return parse_clients(await self.ask("ps")) if await self.servers() else set()

    async def faulty(self) -> bool:
        """Whether a server is in FAULT: it takes no client until every old one has left."""
        return any([("FAULT" in (await self.ask(f"get_server_status {pid}")).upper()) for pid in await self.servers()])


def parse_servers(answer: str) -> list[int]:
    """The PIDs in an answer that lists one a line."""
    return [int(line) for line in answer.splitlines() if line.strip().isdecimal()]


def parse_clients(answer: str) -> set[int]:
    """The clients' PIDs in the table that `ps` prints."""
    firsts = (line.split()[0] for line in answer.splitlines() if line.strip())
    return {int(first) for first in firsts if first.isdecimal()}


class MpsSharing:
    """An MPS daemon of our own for the one GPU of this container."""

    def __init__(
        self, uuid: str | None, environ: Mapping[str, str], clock: Clock, preferred: Path = Path("/mps")
    ) -> None:
        """`uuid`: the GPU to serve; `preferred`: where pipe and log go if it can be written to, else a temporary directory."""
        self._uuid = uuid
        self._environ = environ
        self._clock = clock
        self._preferred = preferred
        self._home: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._words: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start the daemon and wait until it answers. Raises SharingError with the way out."""
        await self.close()
        self._home = _home(self._preferred)
        environ = self._daemon_environment(self._home)
        for name in ("pipe", "log"):
            (self._home / name).mkdir(mode=0o700, exist_ok=True)
        try:
            self._process = await asyncio.create_subprocess_exec(
                PROGRAM,
                "-f",
                stdin=asyncio.subprocess.DEVNULL,
                # Through us into the log: our own output may be a terminal's, or a pipe whose reader has left, and end the daemon.
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environ,
                # A terminal's Ctrl-C is for us to act on: the daemon must outlive its clients.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            self._words = asyncio.get_running_loop().create_task(_log_words(self._process))
        except OSError as error:
            await self.close()
            raise SharingError(
                f"no {PROGRAM} in this container ({error}), so no packing could be tried: the NVIDIA container toolkit mounts "
                "it into containers with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            ) from error
        try:
            await self._wait_for_answer(self._process)
        except BaseException:
            await self.close()
            raise

    def environment(self, index: int) -> Mapping[str, str | None]:
        """The pipe directory, which makes a process a client, and the GPU as clients count.

        A daemon's clients count its devices anew: "when a client connects to the server it will see the remapped devices", and the
        daemon's own CUDA_VISIBLE_DEVICES in a client "would lead to an error" (NVIDIA's MPS documentation, Environment Variables). So
        whatever number or UUID chose the GPU before, to the clients of a daemon with one GPU it is 0 (seen on an
        H200, as is that a UUID works too). That UUIDs are recommended there is no help: many releases of vLLM read the variable's
        entries as numbers (vllm-project/vllm issues 13815 and 20939).
        """
        home = self._opened()
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(home / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(home / "log"),
            "CUDA_VISIBLE_DEVICES": "0",
        }

    async def prove(self, engines: Sequence[Owner]) -> None:
        """Return once the daemon lists a process of each engine. Raises NotAttachedError after 15 s.

        Their number alone proves nothing: one vLLM is two clients, its engine core and its API server (0.24 on an H200).
        """
        control = MpsControl(self._daemon_environment(self._opened()))
        deadline = self._clock.now() + ATTACH_SECONDS
        while True:
            try:
                clients = await control.clients()
                strangers = [
                    str(number)
                    for number, engine in enumerate(engines, 1)
                    if not any(engine.owns(pid) for pid in clients)
                ]
                if not strangers:
                    return
                seen = f"{len(clients)} clients, none of them of engine {', '.join(strangers)}"
            except SharingError as error:
                seen = str(error)
            if self._clock.now() >= deadline:
                raise NotAttachedError(
                    f"MPSNotAttached: {len(engines)} engines run, but the MPS daemon says: {seen}; without MPS they take turns, "
                    "which is not what replicas do: daemon and engines must run as one user and share /dev/shm"
                )
            await self._clock.sleep(POLL_SECONDS)

    async def condition(self) -> str | None:
        """FAULT of the server, or the daemon's end."""
        if self._process is None or self._home is None:
            return None
        if self._process.returncode is not None:
            return f"the MPS daemon ended with {self._process.returncode}"
        try:
            faulty = await MpsControl(self._daemon_environment(self._home)).faulty()
        except SharingError as error:
            return f"the MPS daemon does not answer: {error}"
        return "the MPS server is in FAULT: one engine's fatal fault took all of them" if faulty else None

    def doubt(self, engines: int) -> str | None:
        """Nothing: attachment is proven, or there is no trial."""
        return None

    async def close(self) -> None:
        """`quit`, SIGTERM after 10 s, SIGKILL after as much again."""
        process, self._process = self._process, None
        home, self._home = self._home, None
        if process is not None and home is not None:
            with contextlib.suppress(SharingError):
                if process.returncode is None:
                    await MpsControl(self._daemon_environment(home)).ask("quit")
            await _end(process)
        words, self._words = self._words, None
        if words is not None:
            # Its server may hold the pipe a moment longer, and has nothing to say that is waited for.
            await asyncio.wait({words}, timeout=WORDS_SECONDS)
            words.cancel()
        if home is not None:
            shutil.rmtree(home, ignore_errors=True)

    def _opened(self) -> Path:
        if self._home is None:
            raise SharingError("the MPS daemon was not started")
        return self._home

    def _daemon_environment(self, home: Path) -> dict[str, str]:
        places = {"CUDA_MPS_PIPE_DIRECTORY": str(home / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(home / "log")}
        # A privileged container sees all of the node's GPUs: the daemon must keep to ours.
        return {**self._environ, **places, **({"CUDA_VISIBLE_DEVICES": self._uuid} if self._uuid else {})}

    async def _wait_for_answer(self, process: asyncio.subprocess.Process) -> None:
        control = MpsControl(self._daemon_environment(self._opened()))
        deadline = self._clock.now() + START_SECONDS
        while True:
            if process.returncode is not None:
                raise SharingError(
                    f"{PROGRAM} -f ended with {process.returncode}, so no packing could be tried; its words are in the log above"
                )
            try:
                await control.servers()
                return
            except SharingError as error:
                if self._clock.now() >= deadline:
                    raise SharingError(
                        f"{PROGRAM} -f did not answer within {START_SECONDS:.0f} s ({error}), so no packing could be tried"
                    ) from error
            await self._clock.sleep(POLL_SECONDS)


class CoreSharing:
    """Engines on CPUs: each on its own slice of the cores."""

    def __init__(self, cores: Set[int], per_replica: int) -> None:
        """`cores`: those this process may use; `per_replica`: cores of one engine."""
        self._cores = frozenset(cores)
        self._per_replica = per_replica

    async def open(self) -> None:
        """Nothing to set up."""

    def environment(self, index: int) -> Mapping[str, str | None]:
        """The binding of the engine's threads."""
        return {"VLLM_CPU_OMP_THREADS_BIND": engine_cores(self._cores, index, self._per_replica)}

    async def prove(self, engines: Sequence[Owner]) -> None:
        """Nothing to prove: the binding is on the engine's command."""

    async def condition(self) -> str | None:
        """Nothing that could go wrong by itself."""
        return None

    def doubt(self, engines: int) -> str | None:
        """That engines share cores, where there are too few for all of them."""
        if len(self._cores) >= engines * self._per_replica:
            return None
        return (
            f"{engines} engines of {self._per_replica} cores each shared the {len(self._cores)} cores this Job may use: "
            "replicas with cores of their own do better"
        )

    async def close(self) -> None:
        """Nothing to take down."""


def open_sharing(
    device: DeviceIdentity, cores_per_replica: int | None, environ: Mapping[str, str], clock: Clock
) -> Sharing:
    """The way to share that fits a device."""
    if device.kind == "cpu":
        cores = os.sched_getaffinity(0)
        return CoreSharing(cores, cores_per_replica or 1)
    return MpsSharing(device.uuid, environ, clock)


def engine_cores(cores: Set[int], index: int, per_replica: int) -> str:
    """The cores for the threads of engine `index`, as VLLM_CPU_OMP_THREADS_BIND takes them.

    Slices of `per_replica` cores are handed out from the highest core down, and begin anew at the top when there are no more. Of a
    slice of several cores the lowest is left for the engine's API server and the load: an engine on all its cores starves its own
    server, and then neither latency nor throughput means anything. Replicas are bound by the same rule (`tightship.replica`).

    Raises:
        ValueError: no cores, a negative index, or fewer than one core for a replica.
    """
    if not cores or index < 0 or per_replica < 1:
        raise ValueError(f"engine {index} can't have {per_replica} of {len(cores)} cores")
    ordered = sorted(cores, reverse=True)
    width = min(per_replica, len(ordered))
    start = index * width
    mine = sorted(ordered[(start + offset) % len(ordered)] for offset in range(width))
    return ",".join(map(str, mine[1:] or mine))


def _home(preferred: Path) -> Path:
    """A new directory for one daemon, readable by us alone."""
    parent = preferred if os.access(preferred, os.W_OK | os.X_OK) else None
    return Path(tempfile.mkdtemp(prefix="mps-", dir=parent))


async def _log_words(process: asyncio.subprocess.Process) -> None:
    """What a daemon prints, line by line."""
    assert process.stdout is not None
    async for line in process.stdout:
        log.info("%s: %s", PROGRAM, line.decode(errors="replace").rstrip())


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for the daemon's end, and help it along, its server with it: to asyncio it has not ended while that holds its output."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), QUIT_SECONDS)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    await process.wait()
