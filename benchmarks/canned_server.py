"""A server of canned streams: what vLLM's API server sends, without an engine behind it, for next to no CPU time.

    python benchmarks/canned_server.py --rate 20000 --streams 512

Every answer of `POST /v1/completions` is an HTTP/1.1 stream of server-sent events like vLLM's (one event and one HTTP chunk a token, running
token counts where the request asks for `continuous_usage_stats`, then the usage event and `[DONE]`), rendered once at the start. Tokens
are paced as an engine paces them: every step, each stream gets one, all within the time it takes to write them; a step is
`streams / rate` seconds. A rate of 0 sends as fast as sockets take it. `GET /stats` says what was sent and what it cost.

The first line on standard output is the port. Standard library only, one thread, epoll (Linux).
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import sys
import time
from collections.abc import Sequence

HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
WORDS = (" the", " of", " and", "ing", " throughput", ".", " a", " token", "\n", " is")
MODEL = "canned"
PROMPT = 64
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')


def chunk(body: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(body), body)


def event(count: int, *, last: bool, counted: bool) -> bytes:
    """The event of a token, as vLLM 0.32 writes it."""
    choice = {
        "index": 0,
        "text": WORDS[count % len(WORDS)],
        "logprobs": None,
        "finish_reason": "length" if last else None,
        "stop_reason": None,
        "prompt_token_ids": None,
        "token_ids": None,
    }
    return _data([choice], count if counted else None)


def tail(count: int) -> bytes:
    """What follows the last token: the usage event, the end of the stream, the end of the answer."""
    return chunk(_data([], count)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _data(choices: list[dict[str, object]], count: int | None) -> bytes:
    message: dict[str, object] = {
        "id": "cmpl-5f0d3c1a7b9e4c62a8d1f00d5eedbeef",
        "object": "text_completion",
        "created": 1767225600,
        "model": MODEL,
        "choices": choices,
    }
    if count is not None:
        message["usage"] = {"prompt_tokens": PROMPT, "total_tokens": PROMPT + count, "completion_tokens": count}
    return b"data: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n"


class Canned:
    """Rendered answers: the chunk of token n, with and without running counts."""

    def __init__(self) -> None:
        self._chunks: dict[bool, list[bytes]] = {False: [b""], True: [b""]}

    def stream(self, output: int, *, counted: bool) -> list[bytes]:
        """The pieces of an answer of `output` tokens, the last first."""
        known = self._chunks[counted]
        while len(known) < output:
            known.append(chunk(event(len(known), last=False, counted=counted)))
        pieces = known[1:output]
        pieces.append(chunk(event(output, last=True, counted=counted)) + tail(output))
        pieces.reverse()
        return pieces


class Stream:
    """A connection, and the answer on it."""

    __slots__ = ("asked", "blocked", "pieces", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.asked = b""
        self.pieces: list[bytes] = []
        self.blocked = b""

    def step(self) -> int:
        """Send one token; returns how many went (0: the socket is full, or nothing is left)."""
        piece = self.blocked or (self.pieces.pop() if self.pieces else b"")
        if not piece:
            return 0
        fresh = not self.blocked
        try:
            sent = self.socket.send(piece)
        except BlockingIOError:
            sent = 0
        self.blocked = piece[sent:]
        return 1 if fresh else 0


class Server:
    """Accepts, reads requests, and steps all streams."""

    def __init__(self, port: int, interval: float) -> None:
        self.interval = interval
        self.canned = Canned()
        self.listening = socket.create_server(("127.0.0.1", port), backlog=4096)
        self.listening.setblocking(False)
        self.poll = select.epoll()
        self.poll.register(self.listening, select.EPOLLIN)
        self.streams: dict[int, Stream] = {}
        self.active: set[Stream] = set()
        self.tokens = 0
        self.late_steps = 0
        self.steps = 0

    def serve(self) -> None:
        """Serve until killed."""
        due = time.monotonic()
        while True:
            wait = -1.0 if not self.active else max(0.0, due - time.monotonic())
            for number, mask in self.poll.poll(wait):
                if number == self.listening.fileno():
                    self._accept()
                elif mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    self._read(self.streams[number])
            now = time.monotonic()
            if self.active and now >= due:
                self.late_steps += now - due > 0.1 * self.interval
                self.steps += 1
                due = max(due + self.interval, now)
                self._step()

    def _step(self) -> None:
        for stream in list(self.active):
            try:
                self.tokens += stream.step()
            except OSError:
                self._drop(stream)
                continue
            if not stream.pieces and not stream.blocked:
                self.active.discard(stream)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.streams[connection.fileno()] = Stream(connection)
            self.poll.register(connection, select.EPOLLIN)

    def _read(self, stream: Stream) -> None:
        try:
            data = stream.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(stream)
            return
        stream.asked += data
        head, found, body = stream.asked.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if found and len(body) >= (int(length[1]) if length else 0):
            stream.asked = b""
            self._answer(stream, head, body)

    def _answer(self, stream: Stream, head: bytes, body: bytes) -> None:
        tokens = _TOKENS.search(body)
        if head.startswith(b"POST /v1/completions ") and tokens:
            stream.pieces = self.canned.stream(int(tokens[1]), counted=b'"continuous_usage_stats"' in body)
            stream.socket.send(HEAD)
            self.active.add(stream)
            return
        answers = {
            b"/stats": {
                "tokens": self.tokens,
                "active": len(self.active),
                "connections": len(self.streams),
                "cpu": time.process_time(),
                "now": time.monotonic(),
                "steps": self.steps,
                "lateSteps": self.late_steps,
            },
            b"/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 1 << 20}]},
            b"/health": {},
        }
        answer = answers.get(head.split(b" ", 2)[1])
        text = json.dumps(answer).encode()
        status = b"404 Not Found" if answer is None else b"200 OK"
        stream.socket.send(
            b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text)
        )

    def _drop(self, stream: Stream) -> None:
        self.active.discard(stream)
        self.streams.pop(stream.socket.fileno(), None)
        stream.socket.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; the port goes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--rate", type=float, default=20_000, help="tokens per second over all streams; 0: no pacing")
    parser.add_argument("--streams", type=int, default=512, help="streams the rate is meant for")
    options = parser.parse_args(argv)
    server = Server(options.port, options.streams / options.rate if options.rate else 0.0)
    print(server.listening.getsockname()[1], flush=True)
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
