"""Passing requests on: logs and exec to a node's kubelet, service proxies to a ready endpoint."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
from aiohttp import web

from tightship.sandbox.plane import errors
from tightship.sandbox.plane.errors import ApiError, Obj
from tightship.sandbox.plane.store import Store
from tightship.sandbox.plane.values import dig

_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}
_KUBELET_PATHS = {"log": "containerLogs", "exec": "exec", "attach": "attach", "portforward": "portForward"}


def _unreachable(what: str, error: Exception) -> ApiError:
    return ApiError(503, "ServiceUnavailable", f"error trying to reach {what}: {str(error) or type(error).__name__}")


class Proxy:
    """Reaches kubelets and endpoints over one client session.

    Kubelets serve https with certificates of their own making, so these are not verified.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        """The session, made on first use within the running loop."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        return self._session

    async def close(self) -> None:
        """Closes the session."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _kubelet(self, pod: Obj) -> str:
        name = dig(pod, "spec", "nodeName", default="")
        if not name:
            raise errors.bad_request(f"pod {pod['metadata']['name']} does not have a host assigned")
        node = self._store.get(("", "nodes"), "", name)
        if node is None:
            raise errors.not_found("nodes", "", name)
        port = dig(node, "status", "daemonEndpoints", "kubeletEndpoint", "Port", default=10250)
        for entry in dig(node, "status", "addresses", default=[]):
            if entry["type"] == "InternalIP":
                return f"https://{entry['address']}:{port}"
        raise ApiError(500, "InternalError", f"node {name} has no InternalIP in its status")

    async def pod(self, request: web.Request, pod: Obj, sub: str) -> web.StreamResponse:
        """A pod's log, or a stream into one of its containers."""
        container = self._container(pod, request.query.get("container", ""))
        if sub == "log":
            self._check_log(pod, container)
        meta = pod["metadata"]
        path = f"{_KUBELET_PATHS[sub]}/{meta['namespace']}/{meta['name']}"
        if sub != "portforward":
            path += f"/{container}"
        query = "&".join(part for part in request.query_string.split("&") if not part.startswith("container="))
        url = f"{self._kubelet(pod)}/{path}" + (f"?{query}" if query else "")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._sockets(request, url)
        return await self._pass(request, url, request.method)

    def _container(self, pod: Obj, asked: str) -> str:
        spec, meta = pod["spec"], pod["metadata"]
        names = [container["name"] for container in spec["containers"]]
        every = [*names, *(container["name"] for container in spec.get("initContainers") or [])]
        if asked:
            if asked not in every:
                raise errors.bad_request(f"container {asked} is not valid for pod {meta['name']}")
            return asked
        preferred = (meta.get("annotations") or {}).get("kubectl.kubernetes.io/default-container")
        if preferred in names:
            return str(preferred)
        if len(names) > 1:
            raise errors.bad_request(
                f"a container name must be specified for pod {meta['name']}, choose one of: [{' '.join(names)}]"
            )
        return str(names[0])

    def _check_log(self, pod: Obj, container: str) -> None:
        statuses = [
            *dig(pod, "status", "containerStatuses", default=[]),
            *dig(pod, "status", "initContainerStatuses", default=[]),
        ]
        state = next((entry.get("state") or {} for entry in statuses if entry["name"] == container), {})
        waiting = state.get("waiting")
        if waiting and waiting.get("reason") in ("ContainerCreating", "PodInitializing"):
            raise errors.bad_request(
                f'container "{container}" in pod "{pod["metadata"]["name"]}" is waiting to start: {waiting["reason"]}'
            )

    async def service(self, request: web.Request, namespace: str, target: str, rest: str) -> web.StreamResponse:
        """A request to one of a service's ready endpoints; ``target`` is ``[scheme:]name[:port]``."""
        parts = target.split(":")
        scheme = parts.pop(0) if len(parts) == 3 else "http"
        name, port = parts[0], parts[1] if len(parts) > 1 else ""
        service = self._store.get(("", "services"), namespace, name)
        if service is None:
            raise errors.not_found("services", "", name)
        address = self._endpoint(service, port)
        tail = request.raw_path.split(f"/services/{target}/proxy", 1)[-1] or "/"
        return await self._pass(request, f"{scheme or 'http'}://{address}{tail}", request.method)

    def _endpoint(self, service: Obj, port: str) -> str:
        meta, ports = service["metadata"], service["spec"].get("ports") or []
        wanted = next(
            (entry for entry in ports if not port or port in (str(entry["port"]), entry.get("name", ""))), None
        )
        endpoints = self._store.get(("", "endpoints"), meta["namespace"], meta["name"])
        found = [
            f"{address['ip']}:{entry['port']}"
            for subset in (endpoints or {}).get("subsets") or []
            for entry in subset.get("ports") or []
            if wanted is not None and entry.get("name", "") == wanted.get("name", "")
            for address in subset.get("addresses") or []
        ]
        if not found:
            what = f"{meta['name']}:{port}" if port else meta["name"]
            raise ApiError(503, "ServiceUnavailable", f'no endpoints available for service "{what}"')
        return random.choice(found)

    async def _pass(self, request: web.Request, url: str, method: str) -> web.StreamResponse:
        headers = {
            key: value
            for key, value in request.headers.items()
            if key.lower() not in _HOP and key.lower() not in ("authorization", "accept-encoding")
        }
        body = await request.read() if request.can_read_body else None
        try:
            upstream = await self.session().request(
                method, url, headers=headers, data=body, ssl=False, allow_redirects=False
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise _unreachable(url, error) from error
        async with upstream:
            kept = {key: value for key, value in upstream.headers.items() if key.lower() not in _HOP}
            response = web.StreamResponse(status=upstream.status, headers=kept)
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _sockets(self, request: web.Request, url: str) -> web.StreamResponse:
        asked = [name.strip() for name in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if name.strip()]
        try:
            upstream = await self.session().ws_connect(url, protocols=asked, ssl=False, max_msg_size=0)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise _unreachable(url, error) from error
        agreed = [upstream.protocol] if upstream.protocol else []
        down = web.WebSocketResponse(protocols=agreed, max_msg_size=0)
        await down.prepare(request)

        async def copy(source: Any, sink: Any) -> None:
            async for message in source:
                if message.type == aiohttp.WSMsgType.BINARY:
                    await sink.send_bytes(message.data)
                elif message.type == aiohttp.WSMsgType.TEXT:
                    await sink.send_str(message.data)

        tasks = [asyncio.ensure_future(copy(upstream, down)), asyncio.ensure_future(copy(down, upstream))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await upstream.close()
        await down.close()
        return down
