"""The load's parser, fed by a real socket in pieces of every size and by hand in any pieces at all, and the closed loop on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.profiler.clock import SystemClock
from tightship.profiler.errors import EngineError, LoadError
from tightship.profiler.lengths import Lengths, Prompts
from tightship.profiler.load import ClosedLoop
from tightship.profiler.wire import Completion, HttpChannel, Ticket, _Connection, _Ticket

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


def event(count: int | None, choices: bool = True) -> bytes:
    body: dict[str, object] = {"choices": [{"index": 0, "text": 'a "completion_tokens": 9 b'}] if choices else []}
    if count is not None:
        body["usage"] = {"prompt_tokens": 4, "completion_tokens": count}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def stream(*counts: int | None, usage: int | None = None) -> bytes:
    events = [event(count) for count in counts]
    if usage is not None:
        events.append(event(usage, choices=False))
    return HEAD + b"".join(chunk(one) for one in [*events, b"data: [DONE]\n\n"]) + b"0\r\n\r\n"


class Heard:
    """A listener that keeps what it heard."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.end: asyncio.Future[tuple[str, bool] | None] = asyncio.get_running_loop().create_future()

    def tokens(self, count: int) -> None:
        self.counts.append(count)

    def finished(self) -> None:
        self.end.set_result(None)

    def failed(self, reason: str, final: bool) -> None:
        self.end.set_result((reason, final))


Answer = Callable[[dict[str, object]], list[bytes]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[HttpChannel, list[dict[str, object]]]]:
    """A server that answers each request with the given pieces; b"" closes the connection."""
    asked: list[dict[str, object]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                request = json.loads(await reader.readexactly(length))
                asked.append(request)
                for piece in answer(request):
                    if not piece:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    channel = HttpChannel("127.0.0.1", server.sockets[0].getsockname()[1], "the model")
    try:
        yield channel, asked
    finally:
        await channel.close()
        server.close()


async def ask(channel: HttpChannel, output: int) -> tuple[list[int], tuple[str, bool] | None]:
    heard = Heard()
    channel.submit(Completion(b"[7,8,9]", output), heard)
    return heard.counts, await asyncio.wait_for(heard.end, 5)


@pytest.mark.parametrize("size", [1, 3, 17, 100, 10_000])
async def test_tokens_are_counted_however_the_bytes_arrive(size: int) -> None:
    whole = stream(1, 2, 4, 5, usage=5)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    async with serving(lambda request: pieces) as (channel, asked):
        for _ in range(2):  # the second on the same connection
            counts, failure = await ask(channel, 5)
            assert failure is None
            assert sum(counts) == 5
    assert asked[0]["prompt"] == [7, 8, 9]
    assert (asked[0]["max_tokens"], asked[0]["ignore_eos"], asked[0]["stream"]) == (5, True, True)


class Wired:
    """A connection with the socket played by hand: bytes go in as the event loop would put them."""

    def __init__(self, output: int) -> None:
        self.counts: list[int] = []
        self.ends: list[str] = []
        buffer = bytearray(b"?" * (1 << 16))  # what an earlier read left there must not matter
        self.connection = _Connection(HttpChannel("nowhere", 1, "m"), buffer)
        self.connection.connection_made(Socket())
        self.connection.send(b"request", output, self, _Ticket())

    def read(self, piece: bytes) -> None:
        self.connection.get_buffer(-1)[: len(piece)] = piece
        self.connection.buffer_updated(len(piece))

    def tokens(self, count: int) -> None:
        self.counts.append(count)

    def finished(self) -> None:
        self.ends.append("finished")

    def failed(self, reason: str, final: bool) -> None:
        self.ends.append(reason)


class Socket(asyncio.Transport):
    """Takes what is sent."""

    def write(self, data: object) -> None:
        """Nobody reads it."""

    def abort(self) -> None:
        """Nothing to close."""


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, int]:
    """An answer of some tokens: running counts or not, several tokens an event, several events a chunk, events over chunks."""
    counted = draw(st.booleans())
    steps = draw(st.lists(st.integers(1, 3) if counted else st.just(1), min_size=1, max_size=8))
    total, events = 0, []
    for step in steps:
        total += step
        events.append(event(total if counted else None))
    events += [event(total, choices=False), b"data: [DONE]\n\n"]
    text = b"".join(events)
    if draw(st.booleans()):  # as vLLM does: a chunk an event
        chunks = events
    else:
        cuts = sorted(draw(st.sets(st.integers(1, len(text) - 1), max_size=6)))
        chunks = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return HEAD + b"".join(map(chunk, chunks)) + b"0\r\n\r\n", total


@given(answers(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_split_of_an_answer_gives_the_same_tokens(answer: tuple[bytes, int], data: st.DataObject) -> None:
    whole, total = answer
    ends = [found + 2 for found in range(len(whole)) if whole[found : found + 2] == b"\r\n"]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1) | st.sampled_from(ends[:-1]), max_size=12)))
    wired = Wired(total)
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        wired.read(whole[start:stop])
    assert wired.ends == ["finished"]
    assert sum(wired.counts) == total


def test_each_token_is_told_of_when_its_chunk_is_read() -> None:
    wired = Wired(4)
    for piece in (
        HEAD,
        chunk(event(1)),
        chunk(event(2)),
        chunk(event(2)),
        chunk(event(4)),
        chunk(event(4, choices=False)),
    ):
        wired.read(piece)
    assert wired.counts == [1, 1, 2]
    wired.read(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    assert wired.ends == ["finished"]


def test_an_event_may_be_cut_by_chunks_anywhere_its_count_included() -> None:
    compact = [event(count).replace(b": ", b":").replace(b", ", b",") for count in (12343, 12344, 12345, 12346)]
    text = compact[2] + compact[3]
    for cut in range(1, len(text)):
        wired = Wired(12346)
        for piece in (HEAD, chunk(compact[0]), chunk(compact[1]), chunk(text[:cut]), chunk(text[cut:])):
            wired.read(piece)
        assert wired.counts[:2] == [12343, 1]
        assert sum(wired.counts) == 12346, cut
        assert min(wired.counts) > 0


@pytest.mark.parametrize("damage", [(b"data", b"dat"), (b"\r\ndata", b"0\r\ndata")], ids=["short", "long"])
def test_a_chunk_that_lies_about_its_length_is_not_taken_for_whole(damage: tuple[bytes, bytes]) -> None:
    wired = Wired(3)
    wired.read(HEAD)
    wired.read(chunk(event(1)))
    wired.read(chunk(event(2)).replace(*damage))
    assert wired.counts == [1]
    assert wired.ends == []  # more has to come


@pytest.mark.parametrize(
    ("answer", "reason", "final"),
    [
        (stream(1, 2, usage=2), "2 of 5 tokens", False),
        (HEAD + chunk(b'data: {"error": {"message": "EngineDeadError"}}\n\n') + b"0\r\n\r\n", "EngineDeadError", False),
        (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 12\r\n\r\ntoo long: 99", "400: too long: 99", True),
        (b"HTTP/1.1 503 No\r\ncontent-length: 4\r\n\r\nbusy", "503: busy", False),
        (b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n4\r\noops\r\n0\r\n\r\n", "500: oops", False),
        (HEAD + b"zz\r\n", "no chunked HTTP", False),
        (HEAD + chunk(event(1)), "connection lost after 1 of 5", False),
    ],
    ids=["short", "error event", "refused", "unavailable", "chunked error", "garbage", "cut"],
)
async def test_what_goes_wrong_is_said(answer: bytes, reason: str, final: bool) -> None:
    async with serving(lambda request: [answer, b""]) as (channel, _):
        _, failure = await ask(channel, 5)
    assert failure is not None
    assert reason in failure[0]
    assert failure[1] is final


async def test_an_engine_without_running_counts_gives_one_token_an_event() -> None:
    async with serving(lambda request: [stream(None, None, None, usage=3)]) as (channel, _):
        counts, failure = await ask(channel, 3)
    assert failure is None
    assert sum(counts) == 3


async def test_nobody_listens() -> None:
    channel = HttpChannel("127.0.0.1", 1, "m")
    _, failure = await ask(channel, 3)
    assert failure is not None
    assert "no connection" in failure[0]


async def test_a_request_that_is_cancelled_is_dropped_at_the_engine_and_heard_of_no_more() -> None:
    gone: list[object] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + chunk(event(1)))
        try:
            while await reader.read(1000):
                pass
        except ConnectionError:
            pass
        gone.append(reader)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    channel = HttpChannel("127.0.0.1", server.sockets[0].getsockname()[1], "m")
    first, other = Heard(), Heard()
    ticket: Ticket = channel.submit(Completion(b"[1]", 9), first)
    channel.submit(Completion(b"[1]", 9), other)
    unsent = channel.submit(Completion(b"[1]", 9), Heard())
    unsent.cancel()
    await until(lambda: first.counts and other.counts)
    ticket.cancel()
    ticket.cancel()  # the second time it does nothing
    await until(lambda: len(gone) == 1)
    assert not first.end.done()
    assert not other.end.done()
    await channel.close()
    server.close()


async def test_a_ticket_of_a_request_that_is_over_leaves_the_next_alone() -> None:
    async with serving(lambda request: [stream(1, 2, usage=2)]) as (channel, asked):
        first = Heard()
        ticket = channel.submit(Completion(b"[1]", 2), first)
        await asyncio.wait_for(first.end, 5)
        second = Heard()
        channel.submit(Completion(b"[1]", 2), second)
        ticket.cancel()
        assert await asyncio.wait_for(second.end, 5) is None
    assert len(asked) == 2


def make_loop(channel: HttpChannel) -> ClosedLoop:
    return ClosedLoop(channel, Lengths.constant(8, 20), Prompts(100, 1), SystemClock(), seed=1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for is the server's doing)
            await asyncio.sleep(0.005)


async def test_a_closed_loop_keeps_its_size() -> None:
    def answer(request: dict[str, object]) -> list[bytes]:
        tokens = int(str(request["max_tokens"]))
        return [stream(*range(1, tokens + 1), usage=tokens)]

    async with serving(answer) as (channel, asked):
        load = make_loop(channel)
        load.resize(4)
        await until(lambda: load.settled)
        recording = load.begin()
        await until(lambda: recording.requests >= 20)
        load.check()
        load.resize(2)
        await until(lambda: load.settled)
        await load.close()
    assert recording.failures == 0
    assert recording.tokens >= 19 * 20
    aged, fresh = asked[:4], asked[8:]
    assert all(len(list(one["prompt"])) + int(str(one["max_tokens"])) == 28 for one in aged)  # type: ignore[call-overload]
    assert all((len(list(one["prompt"])), one["max_tokens"]) == (8, 20) for one in fresh)  # type: ignore[call-overload]


async def test_a_request_the_engine_refuses_ends_the_load() -> None:
    refusal = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 8\r\n\r\ntoo long"
    async with serving(lambda request: [refusal]) as (channel, _):
        load = make_loop(channel)
        load.resize(1)
        await until(lambda: load.recording.failures)
        with pytest.raises(LoadError, match="400: too long"):
            load.check()
        await load.close()


async def test_requests_that_fail_in_a_row_are_the_engines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightship.profiler.load.RETRY_SECONDS", 0.001)
    async with serving(lambda request: [b"HTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\noops"]) as (channel, _):
        load = make_loop(channel)
        load.resize(2)
        await until(lambda: load.recording.failures >= 20)
        with pytest.raises(EngineError, match="in a row, the last because the engine answered 500: oops"):
            load.check()
        await load.close()
