"""The ways into the sandbox: byte forwarders, and an HTTP gateway to the Services.

Nothing routes into the sandbox's network namespace. A Unix socket in the file system is seen from both sides, so each way
in is two forwarders: 127.0.0.1 to the socket outside, the socket to its goal inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp import web

log = logging.getLogger(__name__)

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CHUNK = 2**16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "content-length", "host"}


async def pump(one: Stream, other: Stream) -> None:
    """Copy both ways until both sides are done, half-closed connections included."""
    try:
        await asyncio.gather(_copy(one[0], other[1]), _copy(other[0], one[1]))
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        for _, writer in (one, other):
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        with contextlib.suppress(OSError):
            writer.write_eof()


async def forward_out(path: str, port: int = 0) -> asyncio.Server:
    """Listen on 127.0.0.1 (a free port when 0) and pass connections to the Unix socket `path`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(path)
        except OSError as error:
            log.info("nothing behind %s: %s", path, error)
            writer.transport.abort()
            return
        await pump((reader, writer), there)

    return await asyncio.start_server(serve, "127.0.0.1", port)


async def forward_in(path: str, host: str, port: int) -> asyncio.Server:
    """Listen on the Unix socket `path` and pass connections to host:port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(host, port)
        except OSError as error:
            log.info("nothing at %s:%s: %s", host, port, error)
            writer.transport.abort()
            return
        await pump((reader, writer), there)

    return await asyncio.start_unix_server(serve, path)


class ServiceGateway:
    """Serves `/<namespace>/<service>/...` from the Service's first port, through its ClusterIP."""

    def __init__(self, services: Mapping[str, dict[str, Any]]) -> None:
        self._services = services
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def start(self, path: str) -> None:
        """Listen on the Unix socket `path`."""
        # a connection of its own for each request: a kept one would always meet the same endpoint
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{namespace}/{service}", self._handle)
        application.router.add_route("*", "/{namespace}/{service}/{rest:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, path).start()

    async def close(self) -> None:
        """Stop listening and drop what is open."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        key = f"{request.match_info['namespace']}/{request.match_info['service']}"
        service = self._services.get(key)
        if service is None:
            return web.Response(status=404, text=f"no Service {key} in the sandbox\n")
        address = service["spec"].get("clusterIP")
        ports = service["spec"].get("ports") or []
        if not ports or not address or address == "None":
            return web.Response(status=502, text=f"Service {key} has no ClusterIP and port\n")
        prefix = f"/{key}"
        rest = request.raw_path[len(prefix) :] or "/"
        assert self._session is not None
        try:
            async with self._session.request(
                request.method,
                f"http://{address}:{ports[0]['port']}{rest}",
                headers={name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP},
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            ) as answer:
                return await _relay(request, answer)
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"Service {key} does not answer: {error}\n")


async def _relay(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    async for chunk in answer.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response
