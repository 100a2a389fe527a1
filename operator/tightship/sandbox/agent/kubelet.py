"""The kubelet's HTTPS endpoint of each node: logs, commands in containers, and faults on request.

`/containerLogs` is what `kubectl logs` reaches through the API server; `/exec` what `kubectl exec` does (WebSocket
clients). `/sandbox/...` is the sandbox's own: it ends a container as the kernel's memory killer would, and makes a GPU fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import ssl
import time

import aiohttp
from aiohttp import web

from tightship.sandbox.agent import logs
from tightship.sandbox.agent.container import Container
from tightship.sandbox.agent.node import KUBELET_PORT, Node
from tightship.sandbox.agent.pod import PodWorker
from tightship.sandbox.agent.runtime import Running

_STDIN, _STDOUT, _STDERR, _ERROR = range(4)


class Kubelet:
    """Serves one node."""

    def __init__(self, node: Node, tls: ssl.SSLContext) -> None:
        self._node = node
        self._tls = tls

    async def start(self) -> None:
        """Listen on the node's address."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        application.router.add_route("*", "/exec/{namespace}/{pod}/{container}", self._exec)
        application.router.add_post("/sandbox/gpus/{uuid}/{state:lost|found}", self._gpu)
        application.router.add_post("/sandbox/kill/{namespace}/{pod}/{container}", self._kill)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self._node.spec.address, KUBELET_PORT, ssl_context=self._tls).start()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    def _container(self, request: web.Request) -> Container:
        """The container that a request names; it has been started at least once by this agent."""
        name = request.match_info["container"]
        worker = self._worker(request)
        if name not in worker.containers:
            raise web.HTTPNotFound(text=f"container {name} has not been created yet")
        return worker.containers[name]

    def _worker(self, request: web.Request) -> PodWorker:
        wanted = request.match_info
        for worker in self._node.workers.values():
            metadata = worker.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (wanted["namespace"], wanted["pod"]):
                return worker
        raise web.HTTPNotFound(text=f"pod {wanted['namespace']}/{wanted['pod']} is not on node {self._node.spec.name}")

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        query, name, worker = request.query, request.match_info["container"], self._worker(request)
        previous = query.get("previous") == "true"
        container = worker.containers.get(name)
        try:
            path = worker.log_file(name, previous)
        except KeyError:
            raise web.HTTPNotFound(text=f"the pod has no container {name}") from None
        if not path.exists():
            what = "previous terminated container" if previous else "container"
            reason = "not found" if previous or container is None else f"is waiting to start: {container.state.waiting}"
            raise web.HTTPBadRequest(text=f'{what} "{name}" {reason}')
        selection = logs.Selection(
            follow=query.get("follow") == "true" and not previous,
            tail=int(query["tailLines"]) if "tailLines" in query else None,
            since=_since(query.get("sinceSeconds"), query.get("sinceTime")),
            timestamps=query.get("timestamps") == "true",
            limit=int(query["limitBytes"]) if "limitBytes" in query else None,
        )
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            async for line in logs.read(path, selection, container.alive if container else asyncio.Event()):
                await response.write(line)
            await response.write_eof()
        return response

    async def _kill(self, request: web.Request) -> web.Response:
        container = self._container(request)
        if container.running is None:
            raise web.HTTPConflict(text="the container is not running")
        container.running.kill(request.query.get("reason"))
        return web.Response(text="killed\n")

    async def _gpu(self, request: web.Request) -> web.Response:
        uuid, stock = request.match_info["uuid"], self._node.host.stock
        if uuid not in stock.gpus:
            raise web.HTTPNotFound(text=f"no GPU {uuid} on {self._node.spec.name}: it has {', '.join(stock.gpus)}")
        (stock.missing.add if request.match_info["state"] == "lost" else stock.missing.discard)(uuid)
        self._node.hurry()
        return web.Response(text=f"{stock.healthy_gpus()} healthy\n")

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        running = self._container(request).running
        if running is None:
            raise web.HTTPBadRequest(text="the container is not running")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise web.HTTPBadRequest(text="the sandbox's exec needs a WebSocket client (kubectl 1.31 and later)")
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io", "v4.channel.k8s.io"))
        await socket.prepare(request)
        await _attach(socket, running, request.query.getall("command"))
        await socket.close()
        return socket


async def _attach(socket: web.WebSocketResponse, running: Running, command: list[str]) -> None:
    """Run a command in a container with its streams on the channels of a WebSocket."""
    process = await running.open(command)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None

    async def send(channel: int, stream: asyncio.StreamReader) -> None:
        while data := await stream.read(2**15):
            await socket.send_bytes(bytes([channel]) + data)

    async def receive(stdin: asyncio.StreamWriter) -> None:
        async for message in socket:
            if message.type != aiohttp.WSMsgType.BINARY or not message.data:
                continue
            if message.data[0] == _STDIN:
                stdin.write(message.data[1:])
            elif message.data[0] == 255:  # v5: the client closed a channel
                stdin.close()
        stdin.close()

    receiving = asyncio.create_task(receive(process.stdin))
    await asyncio.gather(send(_STDOUT, process.stdout), send(_STDERR, process.stderr))
    code = await process.wait()
    receiving.cancel()
    await socket.send_bytes(bytes([_ERROR]) + json.dumps(_outcome(code)).encode())


def _outcome(code: int) -> dict[str, object]:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with exit code {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _since(seconds: str | None, moment: str | None) -> str:
    """The start of a log selection as RFC 3339 in UTC; empty for all."""
    if seconds is not None:
        start = datetime.datetime.fromtimestamp(time.time() - int(seconds), datetime.timezone.utc)
    elif moment is not None:
        start = datetime.datetime.fromisoformat(moment.replace("Z", "+00:00")).astimezone(datetime.timezone.utc)
    else:
        return ""
    return start.strftime("%Y-%m-%dT%H:%M:%S.%f")
