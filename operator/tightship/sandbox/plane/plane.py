"""The plane as a whole: store, API, server and controllers, started and stopped together."""

from __future__ import annotations

from typing import Any

import yaml
from aiohttp import web

from tightship.sandbox.plane import crds
from tightship.sandbox.plane.admission import Admission
from tightship.sandbox.plane.api import Api
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.proxy import Proxy
from tightship.sandbox.plane.registry import Registry
from tightship.sandbox.plane.server import Server
from tightship.sandbox.plane.store import Store
from tightship.sandbox.plane.tokens import Tokens

NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


class Plane:
    """An embedded control plane.

    Args:
        bind: the address to listen on.
        port: the port; 0 picks a free one, see ``url`` after ``start``.
        unix_socket: a path to listen on as well.
        service_cidr: where cluster IPs come from.
        history: how many writes a watch may lag behind.
        controllers: whether the scheduler and the controllers run.
    """

    def __init__(
        self,
        bind: str = "127.0.0.1",
        port: int = 0,
        unix_socket: str | None = None,
        service_cidr: str = "10.96.0.0/16",
        history: int = 20_000,
        controllers: bool = True,
    ) -> None:
        self.bind, self.port, self.unix_socket = bind, port, unix_socket
        self.registry, self.store = Registry(), Store(history)
        self.api = Api(self.registry, self.store, Admission(self.store, service_cidr))
        self.proxy = Proxy(self.store)
        self.server = Server(self.api, Tokens(self.store), self.proxy)
        self._runner: web.AppRunner | None = None
        crds.follow(self.store, self.registry)
        self._bootstrap()

    def _bootstrap(self) -> None:
        for name in NAMESPACES:
            self.api.create(self.registry.get("", "namespaces"), "", {"metadata": {"name": name}})

    @property
    def url(self) -> str:
        """Where the API is, e.g. ``http://127.0.0.1:43121``."""
        return f"http://{self.bind}:{self.port}"

    def kubeconfig(self, url: str | None = None) -> str:
        """A kubeconfig (YAML) for an administrator; ``url`` where the API is reached at another address."""
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tightship", "cluster": {"server": url or self.url}}],
            "users": [{"name": "admin", "user": {}}],
            "contexts": [
                {"name": "tightship", "context": {"cluster": "tightship", "user": "admin", "namespace": "default"}}
            ],
            "current-context": "tightship",
        }
        return str(yaml.safe_dump(config, sort_keys=False))

    async def start(self) -> Plane:
        """Begins to serve."""
        self._runner = web.AppRunner(
            self.server.application(), access_log=None, handle_signals=False, shutdown_timeout=2
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.bind, self.port)
        await site.start()
        if self.port == 0:
            self.port = self._runner.addresses[0][1]
        if self.unix_socket:
            await web.UnixSite(self._runner, self.unix_socket).start()
        self.server.address = f"{self.bind}:{self.port}"
        return self

    async def stop(self) -> None:
        """Ends watches, controllers and the server."""
        self.server.end_streams()
        await self.proxy.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Plane:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


__all__ = ["Obj", "Plane"]
