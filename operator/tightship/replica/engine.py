"""The engine as a child process: started in a group of its own, heard, signalled, reaped, and asked over HTTP."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from tightship.replica.progress import Activity

DEFAULT_PORT = 8000
_HTTP_TIMEOUT = 2.0
_TAIL_LINES = 400
_LINE_BYTES = 65536
_PR_SET_PDEATHSIG = 1
_EVERYWHERE = ("", "0.0.0.0", "::", "[::]")

# vLLM prints the cause long before its last line, in whichever of its processes failed.
_ERROR_LINE = re.compile(r"\b\w*(?:Error|Exception)\b: .*|\b(?:error|fatal): .*")
_GAUGE = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+]+)$", re.MULTILINE)
_RUNNING = re.compile(r"^vllm:num_requests_running(?:\{[^}]*\})? ([0-9.eE+]+)$", re.MULTILINE)
_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{[^}]*\})? ([0-9.eE+]+)$", re.MULTILINE)
# Each step moves one of these: also one that computes part of a prompt, or takes a request's memory away.
_COUNTERS = re.compile(
    r"^vllm:(?:prompt_tokens_total|generation_tokens_total|iteration_tokens_total_count|num_preemptions_total|request_success_total)"
    r"(?:\{[^}]*\})? ([0-9.eE+]+)$",
    re.MULTILINE,
)


class Engine:
    """One engine process, with everything it starts."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            OSError: the program can't be started.
        """
        self.address = address(command)
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._status: int | None = None
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent(),  # noqa: PLW1509 (no thread runs yet: the pumps come after)
        )
        self.pid = self._process.pid
        self._pumps = [
            self._pump(self._process.stdout, sys.stdout.buffer),
            self._pump(self._process.stderr, sys.stderr.buffer),
        ]

    def _pump(self, source: IO[bytes] | None, target: IO[bytes]) -> threading.Thread:
        """Pass the engine's output on, and remember the end of it."""

        def copy() -> None:
            if source is None:
                return
            for line in iter(lambda: source.readline(_LINE_BYTES), b""):
                self._lines.append(line.decode(errors="replace").rstrip())
                with contextlib.suppress(OSError, ValueError):
                    target.write(line)
                    target.flush()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        return thread

    def poll(self) -> int | None:
        """The engine's exit status (negative: the signal that ended it), or `None` while it runs.

        Reaps every child there is: as PID 1 of the container the supervisor inherits the orphans.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return self._status
            if pid == 0:
                return self._status
            if pid == self.pid:
                self._status = self._process.returncode = os.waitstatus_to_exitcode(status)

    def signal(self, number: int) -> None:
        """Signal the engine's first process, which tells its own."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL whatever of the engine is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def last_words(self, limit: int = 3000) -> str:
        """The error lines the engine printed and its last lines, at most `limit` characters."""
        for pump in self._pumps:
            pump.join(timeout=1)
        lines = [line for line in self._lines if line.strip()]
        serious = (line for line in lines if "WARNING" not in line)
        errors = list(dict.fromkeys(match.group() for line in serious if (match := _ERROR_LINE.search(line))))
        causes = "\n".join(errors[:3])[: limit // 2]
        end = "\n".join(lines)[-(limit - len(causes) - 1) :] if lines else ""
        return f"{causes}\n{end}".strip() or "it printed nothing"

    def healthy(self) -> bool:
        """Whether `/health` answers 200."""
        return self._get("/health") is not None

    def requests_in_flight(self) -> int | None:
        """Running and waiting requests by the engine's own metrics; `None` when it doesn't tell."""
        text = self._get("/metrics")
        values = [] if text is None else _GAUGE.findall(text)
        return int(sum(float(value) for value in values)) if values else None

    def activity(self) -> Activity | None:
        """What its metrics say of its work; `None` when it doesn't tell."""
        text = self._get("/metrics")
        running = _RUNNING.findall(text) if text is not None else []
        if text is None or not running:
            return None
        return Activity(
            running=int(sum(map(float, running))),
            tokens=int(sum(map(float, _TOKENS.findall(text)))),
            counters=tuple(map(float, _COUNTERS.findall(text))),
        )

    def _get(self, path: str) -> str | None:
        connection = http.client.HTTPConnection(*self.address, timeout=_HTTP_TIMEOUT)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return body if response.status == http.HTTPStatus.OK else None


def address(command: Sequence[str]) -> tuple[str, int]:
    """Where the engine of this command line listens, as seen from inside the pod."""
    host = option(command, "--host") or ""
    port = option(command, "--port")
    return ("127.0.0.1" if host in _EVERYWHERE else host, int(port) if port else DEFAULT_PORT)


def option(command: Sequence[str], name: str) -> str | None:
    """The value of an option in a command line, given as `--name value` or `--name=value`; the last one counts."""
    value = None
    for position, argument in enumerate(command):
        if argument == name and position + 1 < len(command):
            value = command[position + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def _die_with_parent() -> Callable[[], None]:
    """A hook that has the kernel end the engine when the supervisor is killed: nobody else could."""
    library = ctypes.CDLL(None)

    def hook() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return hook
