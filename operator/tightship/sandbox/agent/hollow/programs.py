"""What a hollow container does: the programs that Tightship puts into pods, as state machines.

Each keeps the promises of the real one, in the same order: the holder's daemon publishes its GPU, takes the lock, serves, and on
SIGTERM waits for its clients before it lets go (`node/daemon.py`); the watcher says on its own pod what it sees (`node/watch.py`); a
replica needs the holder's lock, takes the pack's start lock for the time of its start, refuses without GPU, MPS or memory, and
ends itself when the holder is gone (`replica/supervisor.py`); one without a holder tells which GPU it got (`replica/report.py`). A
program learns of everything through one event, `woken`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tightship.api.v1alpha1 import labels
from tightship.manifests.claims import SHARING_VARIABLE
from tightship.replica.outcome import EXIT_STATUS, Reason, RefusalError
from tightship.sandbox.agent.api import Api, ApiError
from tightship.sandbox.agent.hollow import journal
from tightship.sandbox.agent.hollow.board import DOWN, Board, Pack, new_pid
from tightship.sandbox.agent.hollow.journal import Journal
from tightship.sandbox.agent.hollow.settings import HollowSettings

log = logging.getLogger(__name__)

HOST_PROBLEM = "CUDA error: an illegal memory access was encountered"
_RETRY = 1.0


class Stopped(Exception):
    """Somebody sent SIGTERM."""


@dataclass(frozen=True)
class Node:
    """What all programs of a node use."""

    name: str
    board: Board
    settings: HollowSettings
    api: Api
    journal: Journal


@dataclass
class Program:
    """One run of one container of a pod, by name and UID. `healthy` is what its probes answer; `message` the file of its last words."""

    node: Node
    env: Mapping[str, str]
    pod: str
    uid: str
    message: Path | None
    healthy: bool = True
    asked: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    health_changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str | None = None
    """A fatal error that a test, or the GPU, has given to the program."""
    pid: int = field(default_factory=new_pid)

    async def run(self) -> int:
        """Until the end; returns the exit status. This one does nothing until it is asked to end, as any program would."""
        while not self.asked:
            await self.sleep(None)
        return 0

    def stop(self) -> None:
        """SIGTERM."""
        self.asked = True
        self.woken.set()

    def fail(self, why: str) -> None:
        """Give the program a fatal error; those that have nothing to do with a GPU don't mind."""
        self.failure = why
        self.woken.set()

    def hang(self, hangs: bool) -> None:
        """Answer probes no more, or again."""
        self.say_healthy(not hangs)

    def say_healthy(self, healthy: bool) -> None:
        """Change what probes answer."""
        self.healthy = healthy
        self.health_changed.set()

    async def sleep(self, seconds: float | None) -> None:
        """Wait until woken, at most `seconds`."""
        if seconds is not None and seconds <= 0:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.woken.wait(), seconds)
        self.woken.clear()

    def now(self) -> float:
        """The event loop's time, in seconds."""
        return asyncio.get_running_loop().time()

    def tell(self, words: str) -> None:
        """Leave the termination message."""
        if self.message is not None:
            self.message.write_text(words, encoding="utf-8")

    def note(self, what: str, gpu: str, pack: str, memory: int = 0) -> None:
        """Write into the journal."""
        self.node.journal.write(
            what, node=self.node.name, gpu=gpu, pack=pack, pod=self.pod, uid=self.uid, memory=memory
        )

    @property
    def visible(self) -> str:
        """The GPU that the container sees, named by its UUID or by a CDI name that ends in it."""
        return self.env.get("NVIDIA_VISIBLE_DEVICES", "").rpartition("=")[2]

    @property
    def pack(self) -> Pack:
        """The pack of the pod."""
        return self.node.board.pack(self.env["TIGHTSHIP_PACK_UID"])


class Done(Program):
    """An init container's work: there is nothing to prepare or to copy."""

    async def run(self) -> int:
        """See Program."""
        return 0


class Daemon(Program):
    """`tightship node mps`."""

    async def run(self) -> int:
        """See Program."""
        pack, board, gpu = self.pack, self.node.board, self.visible
        if gpu not in board.gpus or gpu in board.lost:
            self.tell(f"0 GPUs are this container's by nvidia-smi and NVIDIA_VISIBLE_DEVICES ({gpu or 'unset'}), not 1")
            return 1
        pack.gpu = dict(board.gpus[gpu])
        pack.changed()
        pack.listen(self.woken)
        try:
            while pack.holder is not None:
                if self.asked:
                    return 0
                await self.sleep(None)
            return await self._hold(pack, gpu)
        finally:
            pack.forget(self.woken)

    async def _hold(self, pack: Pack, gpu: str) -> int:
        settings = self.node.settings
        pack.holder = self.uid
        self.note(journal.HOLD, gpu, pack.uid)
        try:
            pack.changed()
            await self.sleep(settings.daemon_seconds)
            pack.daemon = True
            pack.changed()
            while not self.asked:
                if gpu in self.node.board.lost:
                    self.tell(f"nvidia-cuda-mps-control ended by itself: {gpu} is lost")
                    return 1
                await self.sleep(None)
            if not await self._wait(pack, settings.leave_seconds):
                self._let_go(pack, gpu)
                await self._wait(pack, settings.fenced_seconds)
            return 0
        finally:
            self._let_go(pack, gpu)
            if pack.starter == self.uid:
                pack.starter = None
            pack.daemon, pack.server, pack.fault = False, None, False
            pack.clients.clear()  # a client of a daemon that dies dies with it, and has nothing to detach from
            pack.changed()

    async def _wait(self, pack: Pack, seconds: float) -> bool:
        """Wait for the clients and for who starts to leave, and let nobody start; False when the time is over."""
        end = self.now() + seconds
        while not self._left(pack) and self.now() < end:
            await self.sleep(end - self.now())
        return self._left(pack)

    def _left(self, pack: Pack) -> bool:
        pack.starter = pack.starter or self.uid
        return pack.starter == self.uid and not pack.clients

    def _let_go(self, pack: Pack, gpu: str) -> None:
        if pack.holder == self.uid:
            pack.holder = None
            self.note(journal.RELEASE, gpu, pack.uid)
            pack.changed()


class Watch(Program):
    """`tightship node watch`."""

    async def run(self) -> int:
        """See Program."""
        pack, published, answered = self.pack, dict[str, str](), False
        namespace, name = self.env["TIGHTSHIP_POD_NAMESPACE"], self.env["TIGHTSHIP_POD_NAME"]
        pack.listen(self.woken)
        try:
            while not self.asked:
                # a daemon that is just starting is not one that is down
                answered = answered or pack.state != DOWN
                seen = self._look(pack, answered)
                changed = {key: value for key, value in seen.items() if published.get(key) != value}
                try:
                    if changed:
                        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
                        await self.node.api.merge(path, {"metadata": {"uid": self.uid, "annotations": changed}})
                        published |= changed
                except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                    log.info("%s: publishing failed, will try again: %s", self.pod, error)
                    await self.sleep(_RETRY)
                    continue
                await self._pause(self.node.settings.watch_seconds)
            return 0
        finally:
            pack.forget(self.woken)

    async def _pause(self, seconds: float) -> None:
        """Wait for a change, and then for the next look."""
        await self.sleep(None)
        end = self.now() + seconds
        while not self.asked and self.now() < end:
            await self.sleep(end - self.now())

    def _look(self, pack: Pack, answered: bool) -> dict[str, str]:
        seen = {}
        if pack.gpu is not None:
            seen[labels.ANNOTATION_GPU] = _json(pack.gpu)
        if answered:
            clients = [{"pid": pid, "podUID": uid} for pid, uid in sorted(pack.clients.items())]
            seen[labels.ANNOTATION_MPS] = _json({"state": pack.state, "server": pack.server, "clients": clients})
        return seen


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class Report(Program):
    """`python3 -m tightship.replica.report`: tells which GPU a pod of a pack without a holder got."""

    async def run(self) -> int:
        """See Program."""
        board, seen = self.node.board, self.visible
        if seen not in board.gpus or seen in board.lost:
            self.tell(str(RefusalError(Reason.GPU_NOT_VISIBLE, "the container sees no GPU")))
            return EXIT_STATUS[Reason.GPU_NOT_VISIBLE]
        gpu = board.gpus[seen]
        self.tell(
            _json({"uuid": seen, "name": gpu["product"], "total": gpu["memory"], "free": board.free(seen), "mps": None})
        )
        return 0


class Replica(Program):
    """`python3 -m tightship.replica -- ...`: supervisor and engine in one. One that has its GPU alone needs no holder and no MPS."""

    _lost_since: float | None = None
    _attached: bool = False
    """Whether the engine is, or was, a client of the daemon."""

    async def run(self) -> int:
        """See Program."""
        self.healthy = False
        pack = self.pack
        pack.listen(self.woken)
        try:
            await self._live(pack)
        except Stopped:
            if self.healthy:
                await asyncio.sleep(self.node.settings.drain_seconds)
            return 0
        except RefusalError as refusal:
            self.tell(str(refusal))
            return EXIT_STATUS.get(refusal.reason, 1)
        finally:
            self._give_back(pack)
            pack.forget(self.woken)
        return 0

    async def _live(self, pack: Pack) -> None:
        self._require_holder(pack)
        while pack.starter is not None:
            await self._tick(pack)
        pack.starter = self.uid
        self._require_holder(pack)
        gpu = await self._preflight(pack)
        memory = int(self.env.get("TIGHTSHIP_MEMORY_BYTES") or 0)
        self.note(journal.START, gpu, pack.uid, memory)
        if self._cuda:
            self.node.board.engines[self.pid] = (gpu, memory)
        end = self.now() + self.node.settings.start_seconds
        if self._held:
            await self._attach(pack)
        while self.now() < end:
            await self._tick(pack, end - self.now())
        self.note(journal.HEALTHY, gpu, pack.uid, memory)
        pack.starter = None
        pack.changed()
        self.say_healthy(True)
        while True:
            await self._tick(pack)

    async def _attach(self, pack: Pack) -> None:
        """The engine's first CUDA context; without a daemon it would quietly have the GPU without MPS."""
        attached = self.now() + self.node.settings.attach_seconds
        while self.now() < attached:
            await self._tick(pack, attached - self.now())
        if pack.daemon:
            pack.attach(self.pid, self.uid)
            self._attached = True

    @property
    def _cuda(self) -> bool:
        return self.env.get("TIGHTSHIP_DEVICE") != "cpu"

    @property
    def _held(self) -> bool:
        """Whether a holder has the GPU; else it is the pod's own."""
        return self._cuda and SHARING_VARIABLE not in self.env

    async def _tick(self, pack: Pack, seconds: float | None = None) -> None:
        """Wait for a change, at most `seconds`; raises what ends the replica."""
        if self._lost_since is not None:
            left = self._lost_since + self.node.settings.fence_seconds - self.now()
            seconds = left if seconds is None else min(left, seconds)
        await self.sleep(seconds)
        self._look(pack)

    def _look(self, pack: Pack) -> None:
        if self.asked:
            raise Stopped
        if self.failure is not None:
            raise RefusalError(Reason.ENGINE_FAILED, f"the engine ended with status 1 while serving: {self.failure}")
        if not self._held:
            return
        if self._attached and self.pid not in pack.clients:
            raise RefusalError(Reason.ENGINE_FAILED, "the engine ended with status 1 while serving: MPS server died")
        if pack.fault and self.pid in pack.clients:
            raise RefusalError(Reason.ENGINE_FAILED, f"the engine ended with status 1 while serving: {HOST_PROBLEM}")
        if pack.holder is not None:
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = self.now()
        elif self.now() - self._lost_since >= self.node.settings.fence_seconds:
            self._require_holder(pack)

    def _require_holder(self, pack: Pack) -> None:
        if self._held and pack.holder is None:
            raise RefusalError(
                Reason.HOLDER_LOST,
                "nobody holds the pack's holder.lock: the GPU may belong to another pod by now; the pack's holder pod tells why",
            )

    async def _preflight(self, pack: Pack) -> str:
        """The GPU's UUID, once everything the engine needs is there."""
        if not self._cuda:
            return ""
        if "CUDA_MPS_PIPE_DIRECTORY" in self.env and not pack.daemon:
            raise RefusalError(
                Reason.MPS_NOT_ATTACHED, "no MPS daemon at /mps/pipe: the holder pod's container `mps` tells why"
            )
        board, seen = self.node.board, self.visible
        wanted = self.env.get("TIGHTSHIP_GPU_UUID", seen)
        if seen not in board.gpus or seen in board.lost:
            raise RefusalError(Reason.GPU_NOT_VISIBLE, f"the container sees no GPU, but should see {wanted}")
        held = str((pack.gpu or {}).get("uuid", seen)) if self._held else wanted
        if held != wanted:
            raise RefusalError(Reason.GPU_MISMATCH, f"the container sees {held}, the pack holds {wanted}")
        memory = int(self.env.get("TIGHTSHIP_MEMORY_BYTES") or 0)
        end = self.now() + self.node.settings.memory_seconds
        while board.free(seen) < memory:
            if self.now() >= end or memory > int(board.gpus[seen]["memory"]):
                raise RefusalError(
                    Reason.INSUFFICIENT_MEMORY, f"{memory} bytes are granted, {board.free(seen)} are free on {seen}"
                )
            await self._tick(pack, _RETRY)
        return seen

    def _give_back(self, pack: Pack) -> None:
        gpu, memory = self.node.board.engines.pop(self.pid, ("", 0))
        if gpu:
            self.note(journal.END, gpu, pack.uid, memory)
        if pack.starter == self.uid:
            pack.starter = None
            pack.changed()
        pack.detach(self.pid)


class Profiler(Program):
    """`python3 -m tightship.profiler`: nothing can be measured here, and it says so."""

    async def run(self) -> int:
        """See Program."""
        self.tell("JobFailed: hollow nodes measure nothing: give the profile its measurements by spec.results")
        return 1


PROGRAMS: Sequence[tuple[tuple[str, ...], type[Program]]] = (
    (("tightship", "inject"), Done),
    (("tightship", "node", "prepare"), Done),
    (("tightship", "node", "mps"), Daemon),
    (("tightship", "node", "watch"), Watch),
    (("python3", "-m", "tightship.replica"), Replica),
    (("python3", "-m", "tightship.replica.report"), Report),
    (("python3", "-m", "tightship.profiler"), Profiler),
)
"""What a command begins with, and what then runs; anything else runs until it is asked to end."""


def program_of(argv: Sequence[str]) -> Callable[..., Program]:
    """The program that a command line is."""
    for beginning, program in PROGRAMS:
        if tuple(argv[: len(beginning)]) == beginning:
            return program
    return Program
