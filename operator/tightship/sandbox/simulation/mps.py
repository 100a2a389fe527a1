"""A stand-in for `nvidia-cuda-mps-control`: the daemon (`-f`), and the commands it takes on standard input.

Semantics kept from NVIDIA's: the daemon owns the pipe directory (CUDA_MPS_PIPE_DIRECTORY); there is no server before the
first client; a client that finds no daemon silently runs without MPS, and one that does sees the daemon's GPU alone, as its
device 0, whatever number it has on the node (the server remaps the devices: NVIDIA's MPS documentation, Environment
Variables); a fatal fault takes every client with it, the server is then in FAULT and takes no new client until every old one
has left; clients of a daemon that dies, die.

Clients hold a connection to the socket `control` in the pipe directory while they live; the kernel says who they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .client import NODE_VARIABLE, SOCKET_VARIABLE, DeviceUnavailableError, list_visible
from .device import peer_pid

DEFAULT_PIPE_DIRECTORY = "/tmp/nvidia-mps"
CONTROL = "control"
MAX_CLIENTS = 60
NOT_READY = "the MPS server is not ready to accept new MPS client requests"
TOO_MANY = "the hardware resources required to create MPS client have been exhausted"


class MpsRefusedError(Exception):
    """The daemon takes no clients now; the message is CUDA's."""


def pipe_directory(environ: Mapping[str, str]) -> Path:
    """Return where daemon and clients meet."""
    return Path(environ.get("CUDA_MPS_PIPE_DIRECTORY", DEFAULT_PIPE_DIRECTORY))


@dataclass
class State:
    """The daemon's memory: its GPU, the server's process number once there is one, and the clients by theirs."""

    uuid: str
    pid: int
    server: int | None = None
    fault: bool = False
    clients: dict[int, Client] = field(default_factory=dict)

    def attach(self, client: Client) -> str | None:
        """Take a client in; return why not."""
        if self.fault:
            return NOT_READY
        if len(self.clients) >= MAX_CLIENTS:
            return TOO_MANY
        # One process stands for control daemon and server: there is nothing to serve here but state.
        self.server = self.pid
        self.clients[client.pid] = client
        return None

    def detach(self, client: Client) -> None:
        """Forget a client; with the last one a fault is over."""
        if self.clients.get(client.pid) is client:
            del self.clients[client.pid]
        if not self.clients:
            self.fault = False

    def fail(self) -> None:
        """Have a fatal fault, which every client gets."""
        self.fault = bool(self.clients)
        for client in list(self.clients.values()):
            client.send({"event": "fault"})

    def answer(self, command: str) -> str:
        """Return what a control command prints."""
        words = command.split()
        name, arguments = (words[0], words[1:]) if words else ("", [])
        if name == "get_server_list":
            return f"{self.server}\n" if self.server else ""
        if name == "ps":
            return self._ps()
        if name == "get_default_active_thread_percentage":
            return "100.0\n"
        if name not in ("get_server_status", "get_client_list", "terminate_client"):
            return f"Invalid command: {command}\n"
        if not arguments or arguments[0] != str(self.server):
            return f"Server {arguments[0] if arguments else ''} not found\n"
        if name == "get_server_status":
            return "FAULT\n" if self.fault else "ACTIVE\n"
        if name == "get_client_list":
            return "".join(f"{pid}\n" for pid in self.clients)
        return self._terminate(arguments[1:])

    def _ps(self) -> str:
        lines = ["PID       ID    SERVER    DEVICE             NAMESPACE     COMMAND"]
        for number, (pid, client) in enumerate(self.clients.items()):
            device = self.uuid[:16]
            lines.append(f"{pid:<9} {number:<5} {self.server:<9} {device:<18} {_namespace(pid):<13} {client.command}")
        return "\n".join(lines) + "\n" if self.clients else ""

    def _terminate(self, arguments: list[str]) -> str:
        client = self.clients.get(int(arguments[0])) if arguments and arguments[0].isdigit() else None
        if client is None:
            return f"Client {' '.join(arguments)} not found\n"
        client.send({"event": "terminated"})
        return ""


class Client(asyncio.Protocol):
    """A connection to the control socket: one command, or a client that stays."""

    def __init__(self, state: State, stop: asyncio.Event) -> None:
        self._state = state
        self._stop = stop
        self._buffer = b""
        self.pid = 0
        self.command = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.pid = peer_pid(transport)
        with contextlib.suppress(OSError):
            # The thread's name is what ps shows of a process too: without a path, and cut to 15 bytes.
            self.command = Path(f"/proc/{self.pid}/comm").read_text().strip()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has left, however."""
        self._state.detach(self)

    def data_received(self, data: bytes) -> None:
        """Serve each complete line."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("attach"):
                refusal = self._state.attach(self)
                self.send({"error": refusal} if refusal else {"server": self._state.server, "uuid": self._state.uuid})
            elif str(message.get("command")).split()[:1] == ["quit"]:
                self._stop.set()
                self.send({"output": ""})
            else:
                self.send({"output": self._state.answer(str(message.get("command")))})

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one object."""
        self._transport.write(json.dumps(message).encode() + b"\n")


def command(directory: Path, text: str) -> str:
    """Send one control command to the daemon of a pipe directory and return what it prints.

    Raises:
        OSError: there is no daemon.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(directory / CONTROL))
        connection.sendall(json.dumps({"command": text}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            return str(json.loads(lines.readline())["output"])


def probe(environ: Mapping[str, str]) -> str | None:
    """Be a client for a moment; return the UUID of the daemon's GPU, None without a daemon.

    Raises:
        MpsRefusedError: it takes no clients.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(str(pipe_directory(environ) / CONTROL))
            connection.sendall(b'{"attach": true}\n')
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline())
        except OSError:
            return None
    if "error" in answer:
        raise MpsRefusedError(answer["error"])
    return str(answer["uuid"])


async def run_daemon(directory: Path, environ: Mapping[str, str]) -> int:
    """Be the daemon of the one GPU this process sees until SIGTERM or `quit`; return its exit status."""
    try:
        gpus = list_visible(environ)
    except DeviceUnavailableError as error:
        return _fail(f"cannot initialise the driver: {error}")
    if len(gpus) != 1:
        return _fail(f"this stand-in serves exactly one GPU; {len(gpus)} are visible")
    directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - once, at the start
    with (directory / "nvidia-cuda-mps-control.pid").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _fail("An instance of this daemon is already running")
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        return await _serve(directory, gpus[0]["uuid"], environ)


async def _serve(directory: Path, uuid: str, environ: Mapping[str, str]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    state = State(uuid, os.getpid())
    faults = asyncio.create_task(_listen(state, environ[SOCKET_VARIABLE], environ.get(NODE_VARIABLE), stop))
    path = directory / CONTROL
    path.unlink(missing_ok=True)
    # Replicas run as the daemon's user, so nobody else may connect.
    server = await loop.create_unix_server(lambda: Client(state, stop), str(path))
    path.chmod(0o600)
    print(f"[{os.getpid()}] Starting control daemon for {uuid}", flush=True)
    await stop.wait()
    faults.cancel()
    server.close()
    path.unlink(missing_ok=True)
    return 0


async def _listen(state: State, path: str, node: str | None, stop: asyncio.Event) -> None:
    """Hear of faults from the device server; without the driver there is no daemon."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(json.dumps({"op": "mps", "uuid": state.uuid, "node": node}).encode() + b"\n")
        while line := await reader.readline():
            if json.loads(line).get("event") == "fault":
                state.fail()
    except OSError as error:
        print(f"lost the driver: {error}", file=sys.stderr)
    stop.set()


def _control(directory: Path, commands: TextIO) -> int:
    for line in commands:
        if not line.strip():
            continue
        try:
            sys.stdout.write(command(directory, line.strip()))
        except OSError:
            return _fail("Cannot find MPS control daemon process")
        sys.stdout.flush()
    return 0


def _namespace(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "ns" / "pid").readlink().name.strip("pid:[]")
    except OSError:
        return "0"


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


def main(arguments: list[str]) -> int:
    """Behave as the program does; return its exit status."""
    directory = pipe_directory(os.environ)
    if arguments == ["-f"]:
        return asyncio.run(run_daemon(directory, os.environ))
    if arguments:
        return _fail(f"this stand-in knows -f and commands on standard input, not {' '.join(arguments)}")
    return _control(directory, sys.stdin)
