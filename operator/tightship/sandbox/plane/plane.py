"""The plane as a whole: store, API, server and controllers, started and stopped together."""

from __future__ import annotations

import base64
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tightship.sandbox.plane import crds
from tightship.sandbox.plane.admission import Admission
from tightship.sandbox.plane.api import Api
from tightship.sandbox.plane.controllers.base import Controller, Manager
from tightship.sandbox.plane.controllers.claims import Claims
from tightship.sandbox.plane.controllers.endpoints import Endpoints
from tightship.sandbox.plane.controllers.garbage import Garbage, Namespaces
from tightship.sandbox.plane.controllers.housekeeping import Budgets, OldEvents, furnish
from tightship.sandbox.plane.controllers.jobs import Jobs
from tightship.sandbox.plane.controllers.nodes import Nodes
from tightship.sandbox.plane.controllers.replicasets import Deployments, ReplicaSets
from tightship.sandbox.plane.controllers.scheduler import Scheduler
from tightship.sandbox.plane.controllers.statefulsets import StatefulSets
from tightship.sandbox.plane.controllers.volumes import Volumes
from tightship.sandbox.plane.proxy import Proxy
from tightship.sandbox.plane.registry import Registry
from tightship.sandbox.plane.server import Server
from tightship.sandbox.plane.store import Store
from tightship.sandbox.plane.tokens import Tokens

NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


@dataclass(frozen=True)
class Timing:
    """The delays of controllers, in seconds; the defaults are Kubernetes' own.

    Attributes:
        node_grace: silence after which a node counts as lost.
        eviction: how long pods stay on a lost node; None for what their tolerations say (300 by default).
        job_backoff: the wait before a Job's first retry; it doubles with each failure.
    """

    node_grace: float = 40.0
    eviction: float | None = None
    job_backoff: float = 10.0


class Plane:
    """An embedded control plane.

    Args:
        bind: the address to listen on.
        port: the port; 0 picks a free one, see ``url`` after ``start``.
        unix_socket: a path to listen on as well (plain http there).
        service_cidr: where cluster IPs come from.
        tls_cert, tls_key: PEM files; with them the port speaks https, without plain http.
        ca_cert: PEM file with the certificate that clients trust, published as ``kube-root-ca.crt``.
        history: how many writes a watch may lag behind.
        controllers: whether the scheduler and the controllers run.
        timing: the controllers' delays.
    """

    def __init__(
        self,
        bind: str = "127.0.0.1",
        port: int = 0,
        unix_socket: str | None = None,
        service_cidr: str = "10.96.0.0/16",
        *,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        ca_cert: str | None = None,
        history: int = 20_000,
        controllers: bool = True,
        timing: Timing | None = None,
    ) -> None:
        if bool(tls_cert) != bool(tls_key):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        self.bind, self.port, self.unix_socket = bind, port, unix_socket
        self._tls = (tls_cert, tls_key) if tls_cert and tls_key else None
        self._ca = Path(ca_cert).read_text(encoding="ascii") if ca_cert else ""
        self.registry, self.store = Registry(), Store(history)
        self._admission = Admission(self.store, service_cidr)
        self.api = Api(self.registry, self.store, self._admission)
        self.proxy = Proxy(self.store)
        self.tokens = Tokens(self.store)
        self.server = Server(self.api, self.tokens, self.proxy)
        self._manager = Manager(self._controllers(timing or Timing()) if controllers else [])
        self._runner: web.AppRunner | None = None
        crds.follow(self.store, self.registry)
        furnish(self.api, self._ca)
        for name in NAMESPACES:
            self.api.create(self.registry.get("", "namespaces"), "", {"metadata": {"name": name}})

    def _controllers(self, timing: Timing) -> list[Controller]:
        api = self.api
        return [
            Garbage(api),
            Namespaces(api),
            Volumes(api),
            Scheduler(api),
            Claims(api),
            StatefulSets(api),
            ReplicaSets(api),
            Deployments(api),
            Jobs(api, timing.job_backoff),
            Endpoints(api),
            Nodes(api, timing.node_grace, timing.eviction),
            Budgets(api),
            OldEvents(api),
        ]

    @property
    def url(self) -> str:
        """Where the API is, e.g. ``http://127.0.0.1:43121``."""
        return f"{'https' if self._tls else 'http'}://{self.bind}:{self.port}"

    def kubeconfig(self, url: str | None = None) -> str:
        """A kubeconfig (YAML) for an administrator; ``url`` where the API is reached at another address."""
        cluster: dict[str, Any] = {"server": url or self.url}
        if self._ca and cluster["server"].startswith("https"):
            cluster["certificate-authority-data"] = base64.b64encode(self._ca.encode()).decode()
        # Over https kubectl asks for a password unless it has something to show.
        user = {"token": self.tokens.admin} if cluster["server"].startswith("https") else {}
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tightship", "cluster": cluster}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [
                {"name": "tightship", "context": {"cluster": "tightship", "user": "admin", "namespace": "default"}}
            ],
            "current-context": "tightship",
        }
        return str(yaml.safe_dump(config, sort_keys=False))

    async def start(self) -> Plane:
        """Begins to serve, and starts the controllers."""
        app = self.server.application()
        # Cancelled with its client, a watch or a followed log ends at once instead of at its next write.
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=2, handler_cancellation=True
        )
        await self._runner.setup()
        context = None
        if self._tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self._tls)
        await web.TCPSite(self._runner, self.bind, self.port, ssl_context=context).start()
        if self.port == 0:
            self.port = int(self._runner.addresses[0][1])
        if self.unix_socket:
            await web.UnixSite(self._runner, self.unix_socket).start()
        self.server.address = f"{self.bind}:{self.port}"
        self._publish()
        self._manager.start()
        return self

    def _publish(self) -> None:
        """The ``kubernetes`` Service, by which pods find the API."""
        if self.store.get(("", "services"), "default", "kubernetes") is not None:
            return
        port = {"name": "https", "protocol": "TCP", "port": 443, "targetPort": self.port}
        meta = {"name": "kubernetes", "namespace": "default"}
        spec = {"clusterIP": self._admission.first_address(), "ports": [port]}
        self.api.create(self.registry.get("", "services"), "default", {"metadata": meta, "spec": spec})
        address = {
            "addresses": [{"ip": "127.0.0.1" if self.bind == "0.0.0.0" else self.bind}],
            "ports": [{"name": "https", "port": self.port}],
        }
        body = {"metadata": dict(meta), "subsets": [address]}
        self.api.create(self.registry.get("", "endpoints"), "default", body)

    async def stop(self) -> None:
        """Ends the controllers, watches and the server."""
        await self._manager.stop()
        self.server.end_streams()
        await self.proxy.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Plane:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
