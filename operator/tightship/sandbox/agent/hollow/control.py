"""Faults from outside the agent's process: HTTP on a Unix socket.

`POST /nodes/NODE/{cut,join,down,up,reboot}`, `POST /gpus/UUID/{lost,found,fault}`, `POST /pods/NAMESPACE/POD/evict`,
`POST /pods/NAMESPACE/POD/CONTAINER/{kill,fail,hang,wake}` (`?reason=` for kill and fail). 404 names what there is.
"""

from __future__ import annotations

from aiohttp import web

from tightship.sandbox.agent.hollow.machine import Machine, UnknownError


class Control:
    """Serves one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def start(self, socket: str) -> web.AppRunner:
        """Listen on a path; `cleanup` of what comes back ends it."""
        application = web.Application(middlewares=[_unknown])
        router = application.router
        router.add_post("/nodes/{node}/{what:cut|join|down|up|reboot}", self._on_node)
        router.add_post("/gpus/{uuid}/{what:lost|found|fault}", self._on_gpu)
        router.add_post("/pods/{namespace}/{pod}/evict", self._evict)
        router.add_post("/pods/{namespace}/{pod}/{container}/{what:kill|fail|hang|wake}", self._on_container)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.UnixSite(runner, socket).start()
        return runner

    async def _on_node(self, request: web.Request) -> web.Response:
        machine, name = self._machine, request.match_info["node"]
        match request.match_info["what"]:
            case "cut":
                machine.cut(name)
            case "join":
                machine.join(name)
            case "down":
                await machine.down(name)
            case "up":
                machine.up(name)
            case _:
                await machine.reboot(name)
        return web.Response()

    async def _on_gpu(self, request: web.Request) -> web.Response:
        uuid = request.match_info["uuid"]
        node = self._machine.gpu(uuid)
        {"lost": node.lose, "found": node.find, "fault": node.break_server}[request.match_info["what"]](uuid)
        return web.Response()

    async def _evict(self, request: web.Request) -> web.Response:
        self._machine.evict(request.match_info["namespace"], request.match_info["pod"])
        return web.Response()

    async def _on_container(self, request: web.Request) -> web.Response:
        place = (request.match_info["namespace"], request.match_info["pod"], request.match_info["container"])
        reason = request.query.get("reason")
        match request.match_info["what"]:
            case "kill":
                self._machine.kill(*place, reason)
            case "fail":
                self._machine.fail(*place, reason or "the engine failed")
            case "hang":
                self._machine.hang(*place)
            case _:
                self._machine.hang(*place, False)
        return web.Response()


@web.middleware
async def _unknown(request: web.Request, handler: object) -> web.StreamResponse:
    try:
        return await handler(request)  # type: ignore[operator,no-any-return]
    except UnknownError as error:
        return web.Response(status=404, text=str(error))
