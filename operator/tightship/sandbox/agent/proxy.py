"""ClusterIPs: a listener on each Service port that passes connections to ready endpoints in turn.

The service range is local in the sandbox's network namespace, so a listener on a ClusterIP is all it takes. It reads the
core Endpoints, which every control plane keeps. A connection that finds no endpoint is closed at once, as a refused one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from itertools import count

from tightship.sandbox.agent.api import Object
from tightship.sandbox.gateway import pump

log = logging.getLogger(__name__)

Port = tuple[str, int]


class Proxy:
    """Listens on ClusterIPs.

    Args:
        services: the Services by namespace/name, kept current by a reflector.
        endpoints: the Endpoints, likewise.
    """

    def __init__(self, services: Mapping[str, Object], endpoints: Mapping[str, Object]) -> None:
        self._services = services
        self._endpoints = endpoints
        self._servers: dict[Port, tuple[str, str, asyncio.Server]] = {}
        self._turn = count()
        self._dirty = asyncio.Event()

    def changed(self, _kind: str = "", _item: Object | None = None) -> None:
        """A Service changed."""
        self._dirty.set()

    async def run(self) -> None:
        """Keep the listeners as the Services say until cancelled."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._sync()

    async def _sync(self) -> None:
        wanted: dict[Port, tuple[str, str]] = {}
        for key, service in self._services.items():
            address = service["spec"].get("clusterIP")
            if address and address != "None":
                for port in service["spec"].get("ports") or []:
                    wanted[address, int(port["port"])] = (key, str(port.get("name") or ""))
        for listener in [port for port, entry in self._servers.items() if wanted.get(port) != entry[:2]]:
            self._servers.pop(listener)[2].close()
        for listener, (key, name) in wanted.items():
            if listener not in self._servers:
                await self._listen(listener, key, name)

    async def _listen(self, listener: Port, key: str, name: str) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._pass_on(key, name, reader, writer)

        try:
            server = await asyncio.start_server(serve, *listener)
        except OSError as error:
            log.error("Service %s: cannot listen on %s:%s: %s", key, *listener, error)
            return
        self._servers[listener] = (key, name, server)

    def targets(self, key: str, name: str) -> list[Port]:
        """The ready addresses behind one port of a Service."""
        found = []
        for subset in (self._endpoints.get(key) or {}).get("subsets") or []:
            for port in subset.get("ports") or []:
                if str(port.get("name") or "") == name:
                    found += [(entry["ip"], int(port["port"])) for entry in subset.get("addresses") or []]
        return found

    async def _pass_on(self, key: str, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        targets = self.targets(key, name)
        first = next(self._turn)
        for number in range(len(targets)):
            host, port = targets[(first + number) % len(targets)]
            with contextlib.suppress(OSError):
                there = await asyncio.open_connection(host, port)
                await pump((reader, writer), there)
                return
        writer.transport.abort()
