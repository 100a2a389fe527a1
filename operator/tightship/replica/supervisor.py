"""One replica's life: wait for the turn, look before starting, start, serve, drain, stop.

The supervisor is one thread that ticks. Each tick looks, in this order, at the request to stop, the engine, the holder, and whether
the engine still computes; what it finds leaves the normal course by an exception, and `run` turns that into an orderly end. Threads
only copy output.

What must hold of a GPU: no engine runs while nobody holds the GPU, while somebody holds another one, or beyond the end of the MPS daemon
it is a client of, whose next one may be there before anybody noticed; and an engine that doesn't stop is taken out of MPS before
it is killed, because SIGKILL with work on the GPU leaves the other clients undefined.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from tightship.replica import preflight
from tightship.replica.engine import Engine, option
from tightship.replica.locks import FileLock, content, is_held
from tightship.replica.outcome import EXIT_STATUS, Reason, RefusalError, leave_message, say
from tightship.replica.packfiles import ask_to_terminate, leave_preflight, remove_preflight
from tightship.replica.progress import Watchdog
from tightship.replica.settings import Settings

_FORWARDED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_STOPPING = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Pace:
    """Intervals and patience, in seconds."""

    tick: float = 0.2
    holder: float = 1.0
    """Between looks at the holder's lock; two misses in a row end the replica."""
    session: float = 10.0
    """What a holder gets to write into its lock which daemon it has started."""
    health: float = 0.5
    memory: float = 30.0
    """How long free memory may still be missing: a replica that just ended lets go of it late."""
    memory_retry: float = 2.0
    settle: float = 2.0
    """How long the engine must stay idle before it is told to stop: endpoints learn late that a pod is leaving."""
    orphaned_drain: float = 5.0
    """What in-flight requests get when the GPU is no longer the pack's."""
    stop: float = 8.0
    """Between SIGTERM and SIGKILL."""
    terminate: float = 6.0
    """What the holder gets to have MPS end the engine's clients before SIGKILL."""
    progress: float = 5.0
    """Between looks at the engine's counters."""


class _StopRequested(Exception):
    """Somebody asked the replica to end."""


class _EngineEnded(Exception):
    """The engine ended by itself."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Supervisor:
    """Runs one engine; `run` returns the exit status of the pod's container."""

    def __init__(
        self, settings: Settings, command: Sequence[str], env: Mapping[str, str], pace: Pace | None = None
    ) -> None:
        self._settings = settings
        self._command = list(command)
        self._env = dict(env)
        self._pace = pace or Pace()
        self._lock = FileLock(settings.start_lock)
        self._engine: Engine | None = None
        self._stops = 0
        self._next_holder_look = 0.0
        self._holder_misses = 0
        self._healthy = False
        self._session: object = None
        self._next_progress_look = 0.0
        self._watchdog = Watchdog(settings.hang_timeout, self._pace.progress)

    def run(self) -> int:
        """Live the replica's life; returns the exit status."""
        self._handle_signals()
        try:
            self._start()
            while True:
                self._tick()
        except _StopRequested:
            return self._end_on_request()
        except _EngineEnded as ended:
            return self._end_with_engine(ended.status)
        except RefusalError as refusal:
            return self._end_refused(refusal)
        finally:
            if self._engine is not None:
                self._engine.kill_group()
            self._lock.release()
            remove_preflight(self._settings.pack_dir, self._settings.pod_uid)

    def _handle_signals(self) -> None:
        for number in _STOPPING:
            signal.signal(number, self._on_stop)
        for number in _FORWARDED:
            signal.signal(number, self._on_forward)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _on_forward(self, number: int, frame: FrameType | None) -> None:
        if self._engine is not None:
            self._engine.signal(number)

    # Starting

    def _start(self) -> None:
        self._require_holder()
        self._wait_for_turn()
        # A holder that leaves keeps the start lock until it has let its own go; who waited for that must not go on.
        self._require_holder()
        arguments = self._preflight()
        say(f"starting {' '.join([*self._command, *arguments])}")
        try:
            self._engine = Engine([*self._command, *arguments], self._engine_environment())
        except OSError as error:
            raise RefusalError(Reason.ENGINE_FAILED, f"{self._command[0]} does not start: {error}") from error
        self._wait_until_healthy(self._engine)
        # Said first: in the logs of a GPU's replicas no start then begins before the one before it has ended.
        say("the engine is healthy; the next replica may start")
        self._lock.release()

    def _wait_for_turn(self) -> None:
        text = json.dumps({"pod": self._settings.pod_name, "since": int(time.time())})
        said: object = None
        try:
            while not self._lock.try_acquire(text):
                starter = content(self._lock.path).get("pod")
                if starter != said:
                    say(f"waiting for the start slot, which {starter or 'another replica'} has")
                    said = starter
                self._tick()
        except OSError as error:
            raise RefusalError(
                Reason.INVALID_SETTINGS, f"the start lock {self._lock.path} can't be used: {error.strerror}"
            ) from error

    def _preflight(self) -> list[str]:
        """Arguments for the engine that depend on the GPU it will see."""
        settings = self._settings
        if not settings.cuda:
            return []
        self._session = self._holder_session() if settings.held else None
        preflight.check_pipe(settings)
        give_up = time.monotonic() + self._pace.memory
        while True:
            gpu = self._probe(give_up)
            preflight.check_gpu(settings, gpu)
            say(f"{gpu.name} {gpu.uuid}: {gpu.free} of {gpu.total} bytes free")
            try:
                arguments = self._memory_arguments(gpu)
            except RefusalError:
                if time.monotonic() > give_up or (settings.memory_bytes or 0) > gpu.total:
                    raise
            else:
                self._report(gpu)
                return arguments
            self._pause(self._pace.memory_retry)

    def _holder_session(self) -> object:
        """The session of the daemon that the engine becomes a client of; a holder writes it a moment after it has taken its lock."""
        give_up = time.monotonic() + self._pace.session
        while not (session := content(self._settings.holder_lock).get("session")):
            if time.monotonic() > give_up:
                raise RefusalError(
                    Reason.HOLDER_LOST,
                    f"{self._settings.holder_lock} has named no session of the MPS daemon for {self._pace.session:g} s, so its end "
                    "would not be noticed; the pack's holder pod tells why",
                )
            self._tick()
        return session

    def _memory_arguments(self, gpu: preflight.Gpu) -> list[str]:
        memory = self._settings.memory_bytes
        if memory is None or option(self._command, "--gpu-memory-utilization") is not None:
            return []
        return ["--gpu-memory-utilization", f"{preflight.memory_share(memory, gpu):.4f}"]

    def _report(self, gpu: preflight.Gpu) -> None:
        """Tell the holder what the engine is about to see; without that it starts all the same."""
        settings = self._settings
        if settings.pod_uid and not leave_preflight(settings.pack_dir, settings.pod_uid, settings.pod_name, gpu):
            say(f"what the preflight saw can't be written to {settings.pack_dir}; the pack's status will lack it")

    def _probe(self, give_up: float) -> preflight.Gpu:
        """What the engine will see; while MPS takes no clients it is asked again, until `give_up`."""
        while True:
            try:
                return preflight.run_probe(self._settings.probe)
            except RefusalError as refusal:
                if refusal.reason is not Reason.MPS_FAULT or time.monotonic() > give_up:
                    raise
            self._pause(self._pace.memory_retry)

    def _engine_environment(self) -> dict[str, str]:
        """The pod's environment; on a CPU with what vLLM's back end there would else decide by itself.

        Unbound, it takes cores by its own rule, the same ones in every replica of a node; so it is bound to the cores this
        process may use, unless the pod binds it already. And it lets VLLM_CPU_KVCACHE_SPACE override the size on the
        command line, which is the ledger's. Of several cores the lowest is left for the engine's API server, as in the
        profiler, which measured it so.
        """
        env = dict(self._env)
        if not self._settings.cuda:
            if not env.get("VLLM_CPU_OMP_THREADS_BIND"):
                cores = sorted(os.sched_getaffinity(0))
                env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[1:] or cores))
            if option(self._command, "--kv-cache-memory-bytes") is not None:
                env.pop("VLLM_CPU_KVCACHE_SPACE", None)
        return env

    def _wait_until_healthy(self, engine: Engine) -> None:
        give_up = time.monotonic() + self._settings.start_timeout
        while not engine.healthy():
            if time.monotonic() > give_up:
                raise RefusalError(
                    Reason.START_TIMEOUT,
                    f"the engine did not answer /health within {self._settings.start_timeout:g} s; its last words:\n"
                    + engine.last_words(),
                )
            self._pause(self._pace.health)
        self._healthy = True

    # Ticking

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._tick()

    def _tick(self) -> None:
        """Wait a moment, then look at everything that may end the replica."""
        time.sleep(self._pace.tick)
        if self._stops:
            raise _StopRequested
        if self._engine is not None and (status := self._engine.poll()) is not None:
            raise _EngineEnded(status)
        if self._settings.held and time.monotonic() >= self._next_holder_look:
            self._next_holder_look = time.monotonic() + self._pace.holder
            refusal = self._without_holder()
            self._holder_misses = self._holder_misses + 1 if refusal else 0
            if refusal is not None and self._holder_misses > 1:
                raise refusal
        if self._engine is not None and self._healthy and time.monotonic() >= self._next_progress_look:
            self._next_progress_look = time.monotonic() + self._pace.progress
            hung = self._watchdog.look(self._engine.activity(), time.monotonic())
            if hung is not None:
                raise RefusalError(Reason.ENGINE_HUNG, hung)

    def _require_holder(self) -> None:
        if self._settings.held and (refusal := self._without_holder()) is not None:
            raise refusal

    def _without_holder(self) -> RefusalError | None:
        """What is wrong with who holds the GPU: nobody does, another one is held, or the MPS daemon is not the engine's any more."""
        settings = self._settings
        if not is_held(settings.holder_lock):
            return RefusalError(
                Reason.HOLDER_LOST,
                f"nobody holds {settings.holder_lock}: the GPU may belong to another pod by now; "
                "the pack's holder pod tells why",
            )
        told = content(settings.holder_lock)
        held, session = told.get("gpu"), told.get("session")
        if settings.gpu_uuid and held and str(held).lower() != settings.gpu_uuid.lower():
            return RefusalError(
                Reason.GPU_MISMATCH, f"the pack's holder has {held}, this replica is made for {settings.gpu_uuid}"
            )
        if self._session and session and session != self._session:
            return RefusalError(
                Reason.HOLDER_LOST,
                "the MPS daemon that this engine was a client of has ended, and another one has taken its place: "
                "the engine is started anew under that one",
            )
        return None

    # Ending

    def _end_on_request(self) -> int:
        say("asked to stop")
        self._stop_engine(self._settings.drain_timeout if self._healthy else 0)
        return 0

    def _end_with_engine(self, status: int) -> int:
        engine = self._engine
        how = f"status {status}" if status >= 0 else f"signal {_signal_name(-status)}"
        hint = " (killed: out of memory?)" if status == -signal.SIGKILL else ""
        when = "while serving" if self._healthy else "before it was healthy"
        words = engine.last_words() if engine is not None else ""
        self._tell(f"{Reason.ENGINE_FAILED.value}: the engine ended with {how}{hint} {when}; its last words:\n{words}")
        # A status of 0 would read as a replica that is done.
        return 128 - status if status < 0 else status or 1

    def _end_refused(self, refusal: RefusalError) -> int:
        self._tell(str(refusal))
        # What runs in a hung engine never ends, so nobody waits for it.
        finishing = self._healthy and refusal.reason is not Reason.ENGINE_HUNG
        drain = min(self._pace.orphaned_drain, self._settings.drain_timeout) if finishing else 0
        self._stop_engine(drain)
        return EXIT_STATUS.get(refusal.reason, 1)

    def _tell(self, text: str) -> None:
        say(text)
        leave_message(self._settings.termination_message, text)

    def _stop_engine(self, drain: float) -> None:
        engine = self._engine
        if engine is None or engine.poll() is not None:
            return
        stops = self._stops
        self._drain(engine, drain, stops)
        engine.signal(signal.SIGTERM)
        give_up = time.monotonic() + self._pace.stop
        while engine.poll() is None and time.monotonic() < give_up:
            time.sleep(self._pace.tick)
        if engine.poll() is None:
            self._leave_mps(engine)
            say(f"the engine did not stop within {self._pace.stop:g} s of SIGTERM and is killed")

    def _leave_mps(self, engine: Engine) -> None:
        """Have the holder end the engine's MPS clients, in bounded time: it may be gone, or have nobody of ours in its list."""
        settings = self._settings
        if not settings.held or settings.mps_pipe is None or not settings.pod_uid or not is_held(settings.holder_lock):
            return
        words = f"{settings.pod_name}: did not stop within {self._pace.stop:g} s"
        asked = ask_to_terminate(settings.pack_dir, settings.pod_uid, words)
        give_up = time.monotonic() + self._pace.terminate
        while asked is not None and asked.exists() and engine.poll() is None and time.monotonic() < give_up:
            time.sleep(self._pace.tick)
        if asked is not None and asked.exists():
            say(f"its MPS clients were not ended within {self._pace.terminate:g} s: the holder does not answer")
            asked.unlink(missing_ok=True)

    def _drain(self, engine: Engine, timeout: float, stops: int) -> None:
        """Wait until the engine has been idle for a while; a further request to stop cuts it short."""
        give_up, idle_since = time.monotonic() + timeout, None
        while time.monotonic() < give_up and engine.poll() is None and self._stops == stops:
            in_flight = engine.requests_in_flight()
            if in_flight:
                idle_since = None
            else:
                idle_since = idle_since or time.monotonic()
                if time.monotonic() - idle_since >= self._pace.settle:
                    return
            time.sleep(self._pace.tick)
        in_flight = engine.requests_in_flight() if timeout else None
        if in_flight:
            say(f"{in_flight} requests are still in flight after {timeout:g} s and will be cut off")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
