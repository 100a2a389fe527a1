"""`/healthz`, `/readyz` and `/metrics` over one small HTTP server.

Health says whether the process is worth keeping; readiness whether it is at work or stands by as planned. Both answer with
words: a 503 says what is missing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from tightship.telemetry.metrics import Metrics


@dataclass
class Health:
    """What the probes are told. `problem` None means healthy; `waiting` None means ready."""

    problem: str | None = None
    waiting: str | None = "starting"


class TelemetryServer:
    """Serves the probes and metrics on one address. `port` 0 takes a free one; `port` then says which."""

    def __init__(self, health: Health, metrics: Metrics, *, host: str = "0.0.0.0", port: int = 8080) -> None:
        self._health, self._metrics = health, metrics
        self._host, self._wanted = host, port
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """The port it listens on, once started."""
        if self._runner is None:
            raise RuntimeError("the server isn't started")
        port: int = self._runner.addresses[0][1]
        return port

    async def start(self) -> None:
        """Listen. Raises OSError when the address is taken."""
        app = web.Application()
        app.router.add_get("/healthz", self._probe(lambda: self._health.problem))
        app.router.add_get("/readyz", self._probe(lambda: self._health.problem or self._health.waiting))
        app.router.add_get("/metrics", self._exposition)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._wanted).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @staticmethod
    def _probe(read: Callable[[], str | None]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(_: web.Request) -> web.StreamResponse:
            trouble = read()
            return web.Response(text="ok\n") if trouble is None else web.Response(status=503, text=trouble + "\n")

        return answer

    async def _exposition(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})
