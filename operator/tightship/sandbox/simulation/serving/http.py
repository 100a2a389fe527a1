"""HTTP/1.1 with as little between a token and its socket as possible: one asyncio protocol, no framework.

A connection serves one request at a time and keeps alive; a streamed answer is chunked, and each event is one chunk and
one write. Requests may have a Content-Length or be chunked themselves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

_MAX_HEAD = 64 * 1024
_MAX_BODY = 64 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """A request; header names in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


class BadRequestError(Exception):
    """What arrived isn't HTTP as we speak it."""


Handler = Callable[[Request, "Connection"], None]


class Connection(asyncio.Protocol):
    """One client. `handler` is called for each request and answers through this object, at once or later."""

    def __init__(self, handler: Handler, connections: set[Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._buffer = b""
        self._busy = False
        self._keep_alive = True
        self.on_close: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever answers that nobody listens any more."""
        self._connections.discard(self)
        if self.on_close is not None:
            self.on_close()

    def data_received(self, data: bytes) -> None:
        """Collect, and handle a request once it is whole."""
        self._buffer += data
        if not self._busy:
            self._next()

    def respond(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """Answer whole."""
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {content_type}\r\n"
            f"content-length: {len(body)}\r\n{self._connection_header()}\r\n"
        )
        self._transport.write(head.encode() + body)
        self._done()

    def respond_json(self, status: int, value: object) -> None:
        """Answer with JSON."""
        self.respond(status, json.dumps(value, ensure_ascii=False).encode())

    def begin_events(self) -> Callable[[bytes], None]:
        """Begin a stream of server-sent events; return what writes bytes, which must come as HTTP chunks."""
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
            + self._connection_header().encode()
            + b"\r\n"
        )
        return self._transport.write

    def end_events(self) -> None:
        """End the stream."""
        self._transport.write(b"0\r\n\r\n")
        self._done()

    def close(self) -> None:
        """Send what is written and close."""
        self._transport.close()

    def _connection_header(self) -> str:
        return "" if self._keep_alive else "connection: close\r\n"

    def _done(self) -> None:
        self._busy = False
        self.on_close = None
        if not self._keep_alive:
            self._transport.close()
        elif self._buffer:
            self._next()

    def _next(self) -> None:
        try:
            request = self._parse()
        except (BadRequestError, ValueError) as error:
            self._busy, self._keep_alive = True, False
            self.respond_json(
                400, {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}}
            )
            return
        if request is not None:
            self._busy = True
            self._handler(request, self)

    def _parse(self) -> Request | None:
        """Take one request from the buffer, if it is there whole."""
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            if len(head) > _MAX_HEAD:
                raise BadRequestError("the request's head is too long")
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise BadRequestError(f"not an HTTP/1.1 request line: {first[:100]!r}")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        taken = self._body(headers, rest)
        if taken is None:
            return None
        body, self._buffer = taken
        self._keep_alive = words[2] == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        path, _, query = words[1].partition("?")
        return Request(words[0], path, query, headers, body)

    def _body(self, headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes] | None:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return _unchunk(rest)
        length = int(headers.get("content-length", "0"))
        if not 0 <= length <= _MAX_BODY:
            raise BadRequestError(f"a body of {length} bytes is too long")
        if len(rest) >= length:
            return rest[:length], rest[length:]
        if not rest and headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None


def chunk(data: bytes) -> bytes:
    """Return an HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _unchunk(data: bytes) -> tuple[bytes, bytes] | None:
    body = b""
    while True:
        line, found, rest = data.partition(b"\r\n")
        if not found:
            return None
        length = int(line.partition(b";")[0], 16)
        if len(body) + length > _MAX_BODY:
            raise BadRequestError("the body is too long")
        if len(rest) < length + 2:
            return None
        body, data = body + rest[:length], rest[length + 2 :]
        if length == 0:
            return body, data
