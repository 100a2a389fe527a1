"""The sandbox's inner supervisor: everything that runs inside the namespaces.

`python -m tightship.sandbox.inside STATE` is the first process of the PID namespace. It brings up the network, the control
plane, the agent and the operator; when it ends, the kernel ends everything else. It ends when the pipe that is its standard
input closes, so it never outlives the process outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tightship.sandbox import content, gateway, network
from tightship.sandbox.agent.api import Api, Reflector
from tightship.sandbox.agent.netns import GATEWAY
from tightship.sandbox.certificates import Certificates, generate
from tightship.sandbox.kubeconfig import write_kubeconfig
from tightship.sandbox.lifeline import (
    API_SOCKET,
    CONTROL_SOCKET,
    DEVICE_SOCKET,
    GATEWAY_SOCKET,
    HOLLOW_JOURNAL,
    HOLLOW_SOCKET,
    end_of_input,
    say,
)
from tightship.sandbox.processes import Command, Processes
from tightship.sandbox.real import API_PORT, RealPlane
from tightship.sandbox.settings import Settings

OPERATOR_IMAGE = "tightship/operator:dev"
START_LIMIT = 180.0
NAMES = [
    "kubernetes.default.svc",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc.cluster.local",
    "localhost",
]


@dataclass(frozen=True)
class Plane:
    """How to reach a control plane from inside."""

    server: str
    token: str | None
    ca: Path


def embedded(keys: Certificates, settings: Settings) -> Command:
    """The command of the embedded control plane, with the time constants that the real one gets here."""
    options = {
        "--bind": GATEWAY,
        "--port": str(API_PORT),
        "--tls-cert": str(keys.certificate),
        "--tls-key": str(keys.key),
        "--ca-cert": str(keys.ca),
        "--node-grace": str(settings.node_grace),
        "--eviction": str(settings.eviction),
    }
    words = [word for option in options.items() for word in option]
    return Command("plane", [sys.executable, "-m", "tightship.sandbox.plane", *words])


class Inside:
    """Everything inside the namespaces."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = Path(settings.state)
        self._sockets = Path(settings.sockets)
        self._processes = Processes(self._state / "logs")
        self._held = contextlib.AsyncExitStack()

    async def run(self) -> None:
        """Bring the sandbox up, say so on standard output, and hold it until standard input closes."""
        settings = self._settings
        network.set_up(settings.node_address(index) for index in range(settings.nodes))
        addresses = [
            "127.0.0.1",
            GATEWAY,
            content.SERVICE_ADDRESS,
            *(settings.node_address(i) for i in range(settings.nodes)),
        ]
        keys = await asyncio.to_thread(generate, self._state / "pki", addresses, NAMES)
        ended = asyncio.create_task(end_of_input())
        up = asyncio.create_task(self._up(keys))
        broken: asyncio.Future[Any] = self._processes.failed
        all_of_them: set[asyncio.Future[Any]] = {ended, up, broken}
        try:
            await asyncio.wait(all_of_them, return_when=asyncio.FIRST_COMPLETED, timeout=START_LIMIT)
            if up.done():
                say({"ready": up.result()})
                await asyncio.wait(all_of_them - {up}, return_when=asyncio.FIRST_COMPLETED)
            elif not ended.done() and not broken.done():
                say({"error": f"not up after {START_LIMIT:g} s; see {self._state / 'logs'}"})
            if broken.done():
                say({"error": broken.result()})
        finally:
            up.cancel()
            await self._held.aclose()
            self._processes.kill_all()

    async def _up(self, keys: Certificates) -> dict[str, Any]:
        """Start everything, the slow starters first and beside each other; returns how to reach the API."""
        settings, directory = self._settings, self._state / "plane"
        real = None
        if settings.plane == "real":
            real = RealPlane.create(directory, keys, settings.node_grace, settings.eviction)
        plane = Plane(f"https://{GATEWAY}:{API_PORT}", real.token if real else None, keys.ca)
        for command in (real.etcd(), real.apiserver()) if real else (embedded(keys, settings),):
            await self._processes.start(command)
        if settings.gpus_per_node and settings.hollow is None:
            await self._processes.start(self._device_command())
        hollow = settings.hollow is not None
        await self._processes.start(self._hollow_command(plane) if hollow else self._agent_command(plane, keys))
        api = await self._held.enter_async_context(Api(plane.server, plane.token, str(plane.ca)))
        await self._wait_for_api(api)
        for command in (real.controllers(), real.scheduler()) if real else ():
            await self._processes.start(command)
        await content.install(api, self._settings)
        await self._open(api)
        old = real is not None and await _is_old(api)
        await content.wait_for_accounts(api, ["default", content.SYSTEM_NAMESPACE], old)
        await content.wait_for_nodes(api, [self._settings.node_name(i) for i in range(self._settings.nodes)])
        inner = self._state / "kubeconfig.inside"
        write_kubeconfig(inner, plane.server, plane.token, plane.ca)
        if self._settings.operator:
            await self._processes.start(self._operator_command(inner))
        return {"token": plane.token, "ca": str(plane.ca)}

    async def _open(self, api: Api) -> None:
        """Open the ways in: the API, the Services, and the control of the sandbox's processes."""
        self._held.push_async_callback(
            _close, await gateway.forward_in(str(self._sockets / API_SOCKET), GATEWAY, API_PORT)
        )
        services = Reflector(api, "/api/v1/services")
        self._reflecting = asyncio.create_task(services.run())
        outlet = gateway.ServiceGateway(services.store)
        self._held.push_async_callback(outlet.close)
        await outlet.start(str(self._sockets / GATEWAY_SOCKET))
        await self._serve_control()

    async def _wait_for_api(self, api: Api) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                async with api.session.get(f"{api.server}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)

    def _device_command(self) -> Command:
        settings = self._settings
        argv = [
            sys.executable,
            "-m",
            "tightship.sandbox.simulation.device",
            "--socket",
            str(self._sockets / DEVICE_SOCKET),
        ]
        for index in range(settings.nodes):
            for uuid in settings.gpu_uuids(index):
                gpu = f"node={settings.node_name(index)},uuid={uuid},product={settings.product},memory={settings.gpu_memory}"
                argv += ["--gpu", gpu]
        return Command("devices", [*argv, *settings.device_arguments], vital=False, cores=self._other_cores())

    def _agent_command(self, plane: Plane, keys: Certificates) -> Command:
        settings = self._settings
        config = {
            "server": plane.server,
            "token": plane.token,
            "ca": str(plane.ca),
            "state": settings.state,
            "nodes": settings.node_specs(),
            "certificate": str(keys.certificate),
            "key": str(keys.key),
            "engine_cores": settings.engine_cores,
            "device_socket": str(self._sockets / DEVICE_SOCKET) if settings.gpus_per_node else None,
            "engine_python": settings.engine_python,
            "engine_environment": settings.engine_environment,
            "timing": settings.timing,
            "dra": settings.dra,
            "heartbeat": settings.heartbeat,
        }
        return self._agent(config)

    def _hollow_command(self, plane: Plane) -> Command:
        settings = self._settings
        config = {
            "server": plane.server,
            "token": plane.token,
            "ca": str(plane.ca),
            "nodes": settings.node_specs(),
            "timing": settings.timing,
            "heartbeat": settings.heartbeat,
            "hollow": settings.hollow,
            "control": str(self._sockets / HOLLOW_SOCKET),
            "journal": str(self._state / HOLLOW_JOURNAL),
        }
        return self._agent(config, "--hollow")

    def _agent(self, config: dict[str, Any], *options: str) -> Command:
        path = self._state / "agent.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return Command("agent", [sys.executable, "-m", "tightship.sandbox.agent", *options, str(path)], vital=False)

    def _operator_command(self, kubeconfig: Path) -> Command:
        # Short lease times: one operator alone may take over from its killed self within seconds.
        lease = ["--lease-duration=4", "--lease-renew-deadline=3", "--lease-retry=0.5"]
        image = f"--image={OPERATOR_IMAGE}"
        argv = [sys.executable, "-m", "tightship", "run", "--kubeconfig", str(kubeconfig), image, *lease]
        argv += self._settings.operator_arguments
        env = {"KUBECONFIG": str(kubeconfig), **self._settings.environment}
        return Command("operator", argv, env, vital=False, cores=self._other_cores())

    def _other_cores(self) -> frozenset[int]:
        return frozenset(os.sched_getaffinity(0) - set(self._settings.engine_cores))

    async def _serve_control(self) -> None:
        """`POST /processes/<name>/<start|stop|kill>` and `GET /processes/<name>` on a Unix socket."""

        async def act(request: web.Request) -> web.Response:
            name, action = request.match_info["name"], request.match_info["action"]
            try:
                if action == "start":
                    await self._processes.resume(name)
                else:
                    await self._processes.stop(name, signal.SIGKILL if action == "kill" else signal.SIGTERM)
            except KeyError:
                return web.Response(status=404, text=f"no process {name}")
            return web.json_response({"pid": self._processes.pid(name)})

        async def start_operator(_: web.Request) -> web.Response:
            await self._processes.start(self._operator_command(self._state / "kubeconfig.inside"))
            return web.json_response({"pid": self._processes.pid("operator")})

        async def show(request: web.Request) -> web.Response:
            return web.json_response({"pid": self._processes.pid(request.match_info["name"])})

        application = web.Application()
        application.router.add_post("/processes/operator/start", start_operator)
        application.router.add_post("/processes/{name}/{action:start|stop|kill}", act)
        application.router.add_get("/processes/{name}", show)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.UnixSite(runner, str(self._sockets / CONTROL_SOCKET)).start()


async def _close(server: asyncio.Server) -> None:
    server.close()


async def _is_old(api: Api) -> bool:
    """Whether the API server is older than 1.24."""
    return int((await api.get("/version"))["minor"].rstrip("+")) < 24


def init(settings: Settings) -> int:
    """The first process of the PID namespace: reaps orphans, and ends with its one real child."""
    worker = os.fork()
    if worker == 0:
        asyncio.run(_run(settings))
        return 0
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status) & 255


async def _run(settings: Settings) -> None:
    await Inside(settings).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(init(Settings.read(Path(sys.argv[1]) / "settings.json")))
