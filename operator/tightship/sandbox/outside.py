"""The sandbox's outer supervisor: the process on the machine's side.

`python -m tightship.sandbox.outside STATE [attached]` starts the namespaces, forwards 127.0.0.1 into them, and ends by SIGTERM, by
Ctrl-C or, attached, when its standard input closes (the owner's end of a pipe). It never leaves the inner one behind:
that sees the pipe between them close, and is killed by the kernel if it doesn't.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tightship.sandbox import gateway, network
from tightship.sandbox.kubeconfig import write_kubeconfig
from tightship.sandbox.lifeline import API_SOCKET, GATEWAY_SOCKET, end_of_input, say
from tightship.sandbox.processes import die_with_parent
from tightship.sandbox.settings import Settings


class Outside:
    """The process on the machine's side."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = Path(settings.state)
        self._sockets = Path(settings.sockets)

    async def run(self, attached: bool) -> int:
        """Hold the sandbox; `attached`: end when standard input closes."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)
        with (self._state / "logs" / "supervisor.log").open("ab") as errors:
            inner = await asyncio.create_subprocess_exec(
                *network.unshare_command(),
                sys.executable,
                "-m",
                "tightship.sandbox.inside",
                self._settings.state,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        assert inner.stdin is not None
        assert inner.stdout is not None
        waits: set[asyncio.Task[Any]] = {asyncio.create_task(stop.wait()), asyncio.create_task(inner.wait())}
        if attached:
            waits.add(asyncio.create_task(end_of_input()))
        try:
            reading = asyncio.create_task(inner.stdout.readline())
            await asyncio.wait({reading, *waits}, return_when=asyncio.FIRST_COMPLETED)
            answer = json.loads(reading.result() or b"{}") if reading.done() else {}
            if "ready" not in answer:
                say({"error": answer.get("error") or f"the sandbox did not come up:\n{self._tail()}"})
                return 1
            say({"ready": await self._open(answer["ready"], inner.pid)})
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return 0 if inner.returncode is None else 1
        finally:
            (self._state / "sandbox.json").unlink(missing_ok=True)
            inner.stdin.close()
            try:
                await asyncio.wait_for(inner.wait(), 20)
            except asyncio.TimeoutError:
                inner.kill()
                await inner.wait()

    async def _open(self, plane: dict[str, Any], unshare: int) -> dict[str, Any]:
        """Forward from 127.0.0.1, write the kubeconfig and the description that `down` and others read."""
        api = await gateway.forward_out(str(self._sockets / API_SOCKET))
        services = await gateway.forward_out(str(self._sockets / GATEWAY_SOCKET))
        self._forwarders = [api, services]
        port = api.sockets[0].getsockname()[1]
        server = f"https://127.0.0.1:{port}"
        path = self._state / "kubeconfig"
        write_kubeconfig(path, server, plane["token"], Path(plane["ca"]))
        description = {
            "kubeconfig": str(path),
            "server": server,
            "gateway": f"http://127.0.0.1:{services.sockets[0].getsockname()[1]}",
            "supervisor": os.getpid(),
            "init": _first_child(unshare),
            "sockets": self._settings.sockets,
            "nodes": {
                self._settings.node_name(i): str(self._settings.node_directory(i)) for i in range(self._settings.nodes)
            },
        }
        (self._state / "sandbox.json").write_text(json.dumps(description, indent=1))
        return description

    def _tail(self) -> str:
        path = self._state / "logs" / "supervisor.log"
        return path.read_text(errors="replace")[-2000:]


def _first_child(pid: int) -> int:
    """The process that `unshare --fork` made: the first of the PID namespace."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(asyncio.run(Outside(Settings.read(Path(sys.argv[1]) / "settings.json")).run("attached" in sys.argv[2:])))
