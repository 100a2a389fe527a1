"""The engine's lines to the outside: to the device server for memory and time, and to the MPS daemon where there is one.

CUDA's rule holds here too: a pipe directory without a daemon is no error, the process runs without MPS. Losing a line
means losing the driver or the MPS server, and is fatal for the engine; so is a fault the daemon tells of.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..mps import CONTROL, pipe_directory

FATAL = {
    "fault": "CUDA error: unspecified launch failure",
    "terminated": "CUDA error: MPS client has been terminated by MPS server",
    "lost": "CUDA error: GPU is lost",
}
_MPS_GONE = "CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server"
_DRIVER_GONE = "CUDA error: driver shutting down"


class RefusedError(Exception):
    """The other end refused a request; `answer` is what it said."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(str(answer["error"]))
        self.answer = answer


class Channel(asyncio.Protocol):
    """A connection on which each request gets one answer, in order, and events come in between."""

    def __init__(self, on_fatal: Callable[[str], None], gone: str) -> None:
        """`on_fatal` gets the message of what ends the engine; `gone` is the one for a connection that closes."""
        self._on_fatal = on_fatal
        self._gone = gone
        self._buffer = b""
        self._waiting: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail who waits, and say so unless we closed it ourselves."""
        for future in self._waiting:
            future.cancel()
        if not self._closing:
            self._on_fatal(self._gone)

    def data_received(self, data: bytes) -> None:
        """Hand each line to who waits for it."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "event" in message:
                self._on_fatal(FATAL.get(message["event"], str(message["event"])))
            elif self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_result(message)

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            RefusedError: the answer is an error.
        """
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._waiting.append(future)
        self._transport.write(json.dumps(message).encode() + b"\n")
        answer = await future
        if "error" in answer:
            raise RefusedError(answer)
        return answer

    async def run(self, ready: float, gpu: float, memory_share: float) -> float:
        """Queue a GPU part of `gpu` simulated seconds that is ready at `ready`; return when it ends (loop time)."""
        end: float = (await self.request({"op": "run", "ready": ready, "gpu": gpu, "memory": memory_share}))["end"]
        return end

    def close(self) -> None:
        """Let go without making it fatal."""
        self._closing = True
        self._transport.close()


async def open_device(path: str, on_fatal: Callable[[str], None]) -> Channel:
    """Connect to the device server.

    Raises:
        OSError: nobody listens.
    """
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_unix_connection(lambda: Channel(on_fatal, _DRIVER_GONE), path)
    return channel


async def attach_mps(environ: Mapping[str, str], on_fatal: Callable[[str], None]) -> tuple[Channel, str] | None:
    """Become a client of the MPS daemon; returns the line to it and the UUID of its GPU, or None where there is no daemon.

    Raises:
        RefusedError: the daemon takes no clients now.
    """
    path = str(pipe_directory(environ) / CONTROL)
    loop = asyncio.get_running_loop()
    try:
        _, channel = await loop.create_unix_connection(lambda: Channel(on_fatal, _MPS_GONE), path)
    except OSError:
        return None
    return channel, str((await channel.request({"attach": True}))["uuid"])
