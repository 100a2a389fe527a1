"""`tightship node mps`: holds the pack's GPU and runs the MPS daemon on it.

The order is what keeps the GPU the pack's own. Start: identity, lock, daemon; so no replica sees the lock before the GPU is
known. End: on SIGTERM the clients get time to leave by themselves; then the lock is let go, which tells replicas to stop when
nobody else does (the operator may be down); the daemon is stopped last, because clients of a daemon that dies die with it; and what
is left in the pack's directory goes with it. An engine that starts will be a client, though MPS doesn't list it before its first context:
whoever has the start lock is waited for like a client, and once it is free the holder keeps it, so that no other engine starts.

The lock names a session, another one for each daemon: a replica whose engine is a client of a daemon that has ended must not take the
next one for its own, however fast that came. Beside the main loop a thread asks the daemon and nvidia-smi how they are; what lasts too
long (`patience`) ends the container, and so does a daemon that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tightship.node import control, gpu, pods, prepare
from tightship.node.lock import HolderLock
from tightship.node.patience import Patience

TERMINATION_MESSAGE_PATH = "/dev/termination-log"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Pace:
    """Intervals and patience in seconds; all waits together stay below the pod's grace period of 150 s."""

    tick: float = 0.2
    clients: float = 1.0
    leave: float = 75.0
    """What clients get to leave by themselves after SIGTERM."""
    fenced: float = 45.0
    """What they get once the lock is let go and they stop for want of a holder."""
    quit: float = 10.0
    """Between `quit` and SIGTERM, and between SIGTERM and SIGKILL."""
    look: float = 5.0
    """Between two questions to the daemon."""
    gpu: float = 30.0
    """Between two questions to nvidia-smi."""


class DaemonError(Exception):
    """The daemon can't run, or ended; the text is the container's last word."""


class Holder:
    """Holds one pack's GPU until told to stop."""

    def __init__(
        self, directory: Path, env: Mapping[str, str], pace: Pace | None = None, patience: Patience | None = None
    ) -> None:
        self._directory = directory
        self._env = dict(env)
        self._pace = pace or Pace()
        self._lock = HolderLock(directory / "holder.lock")
        self._starts = HolderLock(directory / "start.lock")
        self._daemon: subprocess.Popen[bytes] | None = None
        self._stop = False
        self._patience = patience or Patience()
        self._proc = Path(self._env.get("TIGHTSHIP_PROC_ROOT") or "/proc")
        self._finding: str | None = None
        self._over = threading.Event()

    def run(self) -> int:
        """Hold the GPU; returns the exit status: 0 after SIGTERM, 1 when the GPU or the daemon failed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        try:
            daemon = self._start()
            if daemon is not None:
                threading.Thread(target=self._look_after, daemon=True).start()
            while daemon is not None and not self._stop:
                self._require_alive(daemon)
                self._serve_replicas()
                time.sleep(self._pace.tick)
            if daemon is not None:
                self._leave_in_order(daemon)
        except DaemonError as error:
            self._tell(str(error))
            return 1
        except gpu.GPUError as error:
            self._tell(f"GPUNotVisible: {error}")
            return 1
        finally:
            self._over.set()
            self._lock.release()
            self._starts.release()  # after the lock: who starts next finds no holder
            if self._daemon is not None and self._daemon.poll() is None:
                self._daemon.kill()
                self._daemon.wait()
        return 0

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _start(self) -> subprocess.Popen[bytes] | None:
        """Identity, lock, daemon; `None` when told to stop meanwhile."""
        with contextlib.suppress(OSError):
            (self._directory / "gpu.json").unlink()  # the GPU of an earlier start, which may have been lost
        identity = gpu.identify(self._env)
        pack = self._env.get("TIGHTSHIP_PACK_UID", "")
        text = json.dumps({"pack": pack, "gpu": identity.uuid, "session": uuid.uuid4().hex})
        self._write_identity(identity)
        waiting = False
        while not self._lock.try_acquire(text):
            if self._stop:
                return None
            if not waiting:
                _say("another holder of this pack still has the lock; waiting")
            waiting = True
            time.sleep(self._pace.tick)
        if waiting:
            self._write_identity(identity)  # the other one took everything away when it left
        self._clean_pipe()
        _say(f"holding {identity.product} {identity.uuid}; starting {control.PROGRAM}")
        try:
            self._daemon = subprocess.Popen(
                [control.PROGRAM, "-f"],
                # Seen by a privileged container, the node's other GPUs must stay out of this daemon's hands.
                env={**self._env, "CUDA_VISIBLE_DEVICES": identity.uuid},
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent(),  # noqa: PLW1509 (there are no threads)
            )
        except OSError as error:
            raise DaemonError(
                f"{control.PROGRAM} does not start ({error}): the container toolkit mounts it with the capability `compute`"
            ) from error
        return self._daemon

    def _write_identity(self, identity: gpu.GPU) -> None:
        try:
            gpu.write(self._directory / "gpu.json", identity)
        except OSError as error:
            raise DaemonError(
                f"{self._directory} can't be written ({error}): `tightship node prepare` comes first"
            ) from error

    def _clean_pipe(self) -> None:
        """Remove what a daemon that was killed left in the pipe directory, since replicas take it for a live one's."""
        pipe = self._env.get("CUDA_MPS_PIPE_DIRECTORY")
        if pipe:
            with contextlib.suppress(OSError):
                (Path(pipe) / "control").unlink()

    def _require_alive(self, daemon: subprocess.Popen[bytes]) -> None:
        status = daemon.poll()
        if status is not None:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise DaemonError(f"{control.PROGRAM} ended by itself with {how}; its log is in CUDA_MPS_LOG_DIRECTORY")
        if self._finding is not None:
            with contextlib.suppress(control.ControlError):
                control.terminate(lambda pid: True)
            raise DaemonError(self._finding)

    def _look_after(self) -> None:
        """Ask daemon and GPU how they are, beside the main loop: an answer may take as long as the fault lasts."""
        next_gpu = time.monotonic() + self._pace.gpu
        while not self._over.wait(self._pace.look):
            finding = self._patience.daemon(control.health(), time.monotonic())
            if finding is None and time.monotonic() >= next_gpu:
                finding = self._patience.gpu(self._missing())
                next_gpu = time.monotonic() + self._pace.gpu
            self._finding = self._finding or finding

    def _missing(self) -> str | None:
        """What nvidia-smi says against the GPU; None while it shows it."""
        try:
            gpu.identify(self._env)
        except gpu.GPUError as error:
            return str(error)
        return None

    def _serve_replicas(self) -> None:
        try:
            for line in pods.terminate_asked(self._directory, self._proc):
                _say(line)
        except (control.ControlError, OSError) as error:
            _say(f"a replica's MPS clients could not be ended: {error}")

    def _leave_in_order(self, daemon: subprocess.Popen[bytes]) -> None:
        _say("asked to stop; waiting for the replicas to leave")
        in_order = self._wait(daemon, self._replicas_gone, self._pace.leave)
        if not in_order:
            _say("replicas are still there; letting the lock go, which stops them")
            self._lock.release()
            self._wait(daemon, self._replicas_gone, self._pace.fenced)
        with contextlib.suppress(control.ControlError):
            control.ask("quit")
        if not self._wait(daemon, lambda: daemon.poll() is not None, self._pace.quit):
            daemon.terminate()
            self._wait(daemon, lambda: daemon.poll() is not None, self._pace.quit)
        if in_order and self._no_more_starts():
            prepare.empty(self._directory)

    def _replicas_gone(self) -> bool:
        """Whether the daemon has no client, and none is to come."""
        return self._no_more_starts() and not control.health().clients

    def _no_more_starts(self) -> bool:
        """Whether no engine starts, nor can any more: from then on this holder has the start lock."""
        with contextlib.suppress(OSError):
            return self._starts.held or self._starts.try_acquire(json.dumps({"pod": "the holder, which leaves,"}))
        return False

    def _wait(self, daemon: subprocess.Popen[bytes], holds: Callable[[], bool], timeout: float) -> bool:
        give_up = time.monotonic() + timeout
        while daemon.poll() is None:
            self._serve_replicas()
            if holds():
                return True
            if time.monotonic() > give_up:
                return False
            time.sleep(self._pace.clients)
        return True

    def _tell(self, text: str) -> None:
        _say(text)
        path = Path(self._env.get("TIGHTSHIP_TERMINATION_MESSAGE") or TERMINATION_MESSAGE_PATH)
        with contextlib.suppress(OSError):
            path.write_text(text, encoding="utf-8")


def run(directory: Path) -> int:
    """Hold the GPU that this container was given; returns the exit status."""
    return Holder(directory, os.environ).run()


def _say(text: str) -> None:
    print(f"tightship: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> Callable[[], None]:
    """A hook that ends the daemon with this process: without the lock's holder it must not serve."""
    library = ctypes.CDLL(None)

    def hook() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return hook
