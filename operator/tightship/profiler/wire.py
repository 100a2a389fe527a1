"""The load's way to an engine: one streaming completion per keep-alive connection, parsed with as little Python as will do.

The client shares two cores' worth of time with the server it measures, so it does per token only what the measurement needs. It is an
asyncio protocol, not a stream reader: a token wakes one callback and no task. Sockets are read into one buffer that is never allocated
anew. Nearly always a read brings one whole HTTP chunk with one whole event and a running token count: that is recognised with a
few searches and goes no further (`_quick`). Whatever else comes, split or merged anyhow, takes the general way.

What must hold: every request ends in exactly one of `finished` and `failed`, or was cancelled and hears nothing more; a token is
counted when it is read from the socket, and all tokens of one read are handed over together; both ways count alike.

Exact lengths rest on `ignore_eos` and are checked: an answer with another number of tokens is a failure. `min_tokens` is left out on
purpose, since it makes the engine run a logits processor that a user's requests don't.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

_BUFFER: Final = 1 << 16
_NEWLINE: Final = 10
_COUNT: Final = b'"completion_tokens":'
_COUNT_LENGTH: Final = len(_COUNT)
_USAGE: Final = re.compile(rb'"completion_tokens":\s*(\d+)')
_STATUS: Final = re.compile(rb"^HTTP/1\.[01] (\d{3})")
_LENGTH: Final = re.compile(rb"^content-length:\s*(\d+)\s*$", re.IGNORECASE | re.MULTILINE)
_CHUNKED: Final = re.compile(rb"^transfer-encoding:.*chunked", re.IGNORECASE | re.MULTILINE)
_NO_CHOICE: Final = re.compile(rb'"choices":\s*\[\s*\]')
_RETRIED: Final = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Completion:
    """A request for an exact number of tokens."""

    prompt: bytes
    """JSON list of token ids."""
    output: int
    """Tokens to generate."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request, such as top_p and logprobs."""


class Listener(Protocol):
    """Who asked."""

    def tokens(self, count: int) -> None:
        """`count` tokens arrived together."""

    def finished(self) -> None:
        """All tokens asked for have arrived."""

    def failed(self, reason: str, final: bool) -> None:
        """The request came to nothing; `final` when the engine refused it and would again."""


class Ticket(Protocol):
    """A request that was sent."""

    def cancel(self) -> None:
        """Drop it, if it is still in flight: the engine aborts it, its listener hears nothing more."""


class Channel(Protocol):
    """Carries requests to an engine."""

    def submit(self, request: Completion, listener: Listener) -> Ticket:
        """Send a request; returns at once, the listener hears the rest."""

    async def close(self) -> None:
        """Drop all connections; listeners hear nothing more."""


class HttpChannel:
    """Streaming `/v1/completions` over HTTP/1.1 to one address."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self._host = host
        self._port = port
        self._model = json.dumps(model).encode()
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False
        # One for all connections: event loops that wait for readiness ask for a buffer, read and hand over in one go.
        self._buffer = bytearray(_BUFFER)

    def submit(self, request: Completion, listener: Listener) -> Ticket:
        """Send a request on an idle connection, or on a new one."""
        ticket = _Ticket()
        if self._idle:
            self._idle.pop().send(self._encode(request), request.output, listener, ticket)
            return ticket
        task = asyncio.get_running_loop().create_task(self._connect(request, listener, ticket))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return ticket

    async def _connect(self, request: Completion, listener: Listener, ticket: _Ticket) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, protocol = await loop.create_connection(lambda: _Connection(self, self._buffer), self._host, self._port)
        except OSError as error:
            if not self._closed and not ticket.cancelled:
                listener.failed(f"no connection to {self._host}:{self._port}: {error}", final=False)
            return
        if ticket.cancelled:
            self.released(protocol)  # nothing was sent on it: the next request may take it
        else:
            protocol.send(self._encode(request), request.output, listener, ticket)

    def _encode(self, request: Completion) -> bytes:
        more = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in request.sampling.items()).encode()
        body = (
            b'{"model":%s,"prompt":%s,"max_tokens":%d,"ignore_eos":true,"temperature":%s,"stream":true,'
            b'"stream_options":{"include_usage":true,"continuous_usage_stats":true}%s}'
        ) % (self._model, request.prompt, request.output, b"1" if "top_p" in request.sampling else b"0", more)
        return (
            b"POST /v1/completions HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        ) % (self._host.encode(), self._port, len(body), body)

    def opened(self, connection: _Connection) -> None:
        """A connection stands."""
        self._open.add(connection)

    def released(self, connection: _Connection) -> None:
        """A connection's request is done; it can carry the next."""
        if connection in self._open:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def close(self) -> None:
        """Drop all connections; listeners hear nothing more."""
        self._closed = True
        for task in list(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self._open):
            connection.abandon()
        self._idle.clear()
        await asyncio.sleep(0)


class _Ticket:
    """One request, wherever it is: waiting for its connection, on it, or over."""

    __slots__ = ("cancelled", "connection")

    def __init__(self) -> None:
        self.connection: _Connection | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Close the request's connection; without one, don't send it."""
        self.cancelled = True
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abandon()


class _Connection(asyncio.BufferedProtocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self, channel: HttpChannel, buffer: bytearray) -> None:
        self._channel = channel
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._plain = False  # whether an event stream is under way, with nothing kept of what came before
        self._ticket: _Ticket | None = None
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._asked = 0
        self._seen = 0
        self._rest = b""
        self._event = b""
        self._status = 0  # 0 until the head of the answer is read
        self._length: int | None = None
        self._body = b""
        self._error = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._channel.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel.lost(self)
        listener = self._over()
        if listener is not None:
            listener.failed(
                f"connection lost after {self._seen} of {self._asked} tokens: {exc or 'closed by the engine'}",
                final=False,
            )

    def send(self, message: bytes, asked: int, listener: Listener, ticket: _Ticket) -> None:
        """Put a request on the connection."""
        self._listener = listener
        self._ticket = ticket
        ticket.connection = self
        self._plain = False
        self._asked = asked
        self._seen = 0
        self._rest = self._event = self._body = self._error = b""
        self._status = 0
        self._length = None
        assert self._transport is not None
        self._transport.write(message)

    def abandon(self) -> None:
        """Close without telling the listener."""
        self._over()
        self._channel.lost(self)
        if self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next read goes."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes were read."""
        if self._listener is None:
            return
        if self._plain:
            count = self._quick(nbytes)
            if count >= 0:
                new = count - self._seen
                self._seen = count
                if new > 0:
                    self._listener.tokens(new)
                return
        self._received(self._listener, bytes(self._view[:nbytes]))

    def _quick(self, size: int) -> int:
        """The running token count, if what was read is one chunk with one event that carries it; else -1."""
        data = self._buffer
        line = data.find(b"\r\n", 0, 10)
        if line < 0 or data.find(b"\n", line + 2, size) != size - 4 or data[size - 3] != _NEWLINE:
            return -1  # more than one event, or none that ends here: its JSON is one line
        try:
            if int(data[:line], 16) != size - line - 4:
                return -1
            return int(data[data.rindex(_COUNT, line, size) + _COUNT_LENGTH : size - 6])  # up to }}\n\n\r\n
        except ValueError:
            return -1

    def _over(self) -> Listener | None:
        """The request is done with; returns who waits for it."""
        listener, self._listener = self._listener, None
        self._plain = False
        if self._ticket is not None:
            self._ticket.connection = None
            self._ticket = None
        return listener

    def _received(self, listener: Listener, data: bytes) -> None:
        buffer = self._rest + data if self._rest else data
        position = 0
        if not self._status:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._rest = buffer
                return
            self._read_head(buffer[:end])
            position = end + 4
        before = self._seen
        try:
            position, ended = self._read_body(buffer, position)
        except ValueError:
            self._break(f"the engine's answer is no chunked HTTP: {buffer[position : position + 80]!r}")
            return
        self._rest = buffer[position:]
        self._plain = self._status == 200 and self._length is None and not self._rest and not self._event
        if self._seen > before:
            listener.tokens(self._seen - before)
        if ended and self._listener is listener:
            self._end(listener)

    def _read_head(self, head: bytes) -> None:
        status = _STATUS.match(head)
        length = _LENGTH.search(head.replace(b"\r\n", b"\n"))
        self._status = int(status[1]) if status else 599
        self._length = int(length[1]) if length and not _CHUNKED.search(head) else None

    def _read_body(self, buffer: bytes, position: int) -> tuple[int, bool]:
        """Consume what is complete; return the position of the rest, and whether the answer ended."""
        size = len(buffer)
        if self._length is not None:
            self._body += buffer[position:]
            return size, len(self._body) >= self._length
        while position < size:
            line = buffer.find(b"\r\n", position)
            if line < 0:
                break
            length = int(buffer[position:line].partition(b";")[0], 16)
            start = line + 2
            stop = start + length
            if stop + 2 > size:
                break
            position = stop + 2
            if length == 0:
                return position, True
            if self._status == 200:
                self._read_events(buffer[start:stop])
            else:
                self._body += buffer[start:stop]
        return position, False

    def _read_events(self, block: bytes) -> None:
        text = self._event + block if self._event else block
        end = text.rfind(b"\n\n")
        if end < 0:
            self._event = text
            return
        self._event = text[end + 2 :]
        for event in text[:end].split(b"\n\n"):
            usage = _USAGE.search(event)
            if usage is not None:
                self._seen = int(usage[1])
            elif b'"choices"' in event and not _NO_CHOICE.search(event):
                self._seen += 1  # an engine without running counts: one token an event
            elif b'"error"' in event:
                self._error = event

    def _end(self, listener: Listener) -> None:
        self._over()
        if self._status != 200:
            text = self._body[:500].decode(errors="replace")
            refused = 400 <= self._status < 500 and self._status not in _RETRIED
            self._channel.released(self)
            listener.failed(f"the engine answered {self._status}: {text}", final=refused)
        elif self._error or self._seen != self._asked:
            self._channel.released(self)
            detail = self._error[:500].decode(errors="replace") or "no reason given"
            listener.failed(f"the engine sent {self._seen} of {self._asked} tokens: {detail}", final=False)
        else:
            self._channel.released(self)
            listener.finished()

    def _break(self, reason: str) -> None:
        listener = self._over()
        if self._transport is not None:
            self._transport.abort()
        if listener is not None:
            listener.failed(reason, final=False)
