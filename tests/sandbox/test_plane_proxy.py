"""What the plane passes on: requests to services' endpoints, logs and streams to nodes' kubelets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from plane_world import MERGE, Client, Kubelets, eventually, make_certificate, make_pod
from tightship.sandbox.plane import Plane

PODS = "/api/v1/namespaces/default/pods"
SERVICES = "/api/v1/namespaces/default/services"


class Backend:
    """A server that stands for a pod or a kubelet, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.left = asyncio.Event()
        app = web.Application()
        app.router.add_get("/exec/{rest:.*}", self._exec)
        app.router.add_get("/containerLogs/{rest:.*}", self._follow)
        app.router.add_route("*", "/{rest:.*}", self._echo)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)

    async def start(self, context: ssl.SSLContext | None = None) -> int:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _echo(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.method} {request.path_qs}")
        return web.json_response({"body": await request.text()}, status=201)

    async def _exec(self, request: web.Request) -> web.WebSocketResponse:
        self.asked.append(request.path_qs)
        socket = web.WebSocketResponse(protocols=["v5.channel.k8s.io"])
        await socket.prepare(request)
        async for message in socket:
            await socket.send_bytes(b"\x01" + bytes(message.data[1:]).upper())
        return socket

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path_qs)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first line\n")
        try:
            await asyncio.sleep(30)
        finally:
            self.left.set()
        return response


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with Plane() as made:
        yield made


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    made = Backend()
    yield made
    await made.stop()


@pytest.fixture
async def node(plane: Plane, backend: Backend, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a plane with a running pod ``p`` on a node whose kubelet is the backend."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*make_certificate(tmp_path))
    port = await backend.start(context)
    kubelets, client = Kubelets(plane), Client(plane.url)
    kubelets.add_node("n")
    endpoint = {"daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}
    addresses = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}
    await client.good("PATCH", "/api/v1/nodes/n/status", {"status": {**endpoint, **addresses}}, MERGE)
    await client.good("POST", PODS, make_pod("p"))
    await eventually(lambda: plane.store.get(("", "pods"), "default", "p")["status"]["phase"] == "Running")
    yield client
    kubelets.stop()
    await client.close()


async def test_service_proxy_reaches_a_ready_endpoint(plane: Plane, backend: Backend) -> None:
    port = await backend.start()
    client = Client(plane.url)
    await client.good("POST", SERVICES, {"metadata": {"name": "s"}, "spec": {"ports": [{"name": "http", "port": 80}]}})
    subset = {"addresses": [{"ip": "127.0.0.1"}], "ports": [{"name": "http", "port": port}]}
    endpoints = {"metadata": {"name": "s"}, "subsets": [subset]}
    await client.good("POST", "/api/v1/namespaces/default/endpoints", endpoints)
    for target in ("s", "s:80", "s:http", "http:s:http"):
        code, answer = await client("POST", f"{SERVICES}/{target}/proxy/v1/models", {"q": 1}, x="1")
        assert (code, answer) == (201, {"body": '{"q": 1}'})
    assert backend.asked == ["POST /v1/models?x=1"] * 4
    await client.close()


async def test_exec_is_a_stream_in_both_directions(plane: Plane, node: Client, backend: Backend) -> None:
    url = f"{plane.url}{PODS}/p/exec?command=sh&stdin=true&stdout=true"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=["v5.channel.k8s.io"]) as socket:
        assert socket.protocol == "v5.channel.k8s.io"
        await socket.send_bytes(b"\x00hello")
        assert await socket.receive_bytes(timeout=5) == b"\x01HELLO"
    assert backend.asked == ["/exec/default/p/main?command=sh&stdin=true&stdout=true"]


async def test_a_followed_log_ends_with_its_reader(plane: Plane, node: Client, backend: Backend) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{plane.url}{PODS}/p/log?follow=true") as response:
        assert await response.content.readline() == b"first line\n"
    await asyncio.wait_for(backend.left.wait(), 5)
    assert backend.asked == ["/containerLogs/default/p/main?follow=true"]


async def test_a_watch_ends_with_its_reader(plane: Plane) -> None:
    storage = ("", "configmaps")
    before = len(plane.store._listeners.get(storage, []))
    url = f"{plane.url}/api/v1/configmaps?watch=1"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        await response.content.readline()
        assert len(plane.store._listeners[storage]) == before + 1
    await eventually(lambda: len(plane.store._listeners[storage]) == before)
