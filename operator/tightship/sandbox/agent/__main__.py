"""`python -m tightship.sandbox.agent [--hollow] CONFIG`: run the node agent inside the sandbox's network namespace.

CONFIG is a JSON file with the fields of `Config`. The agent must be started with the sandbox's bridge in place; with `--hollow`
pods are state machines and it runs anywhere (see `hollow/main.py` for its CONFIG).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import ssl
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tightship.sandbox import images
from tightship.sandbox.agent import netns, procfs
from tightship.sandbox.agent.api import Api, Object, Reflector
from tightship.sandbox.agent.devices import Addresses, Stock
from tightship.sandbox.agent.dra import Driver
from tightship.sandbox.agent.events import Recorder
from tightship.sandbox.agent.hollow import main as hollow
from tightship.sandbox.agent.host import Cores, Host, ImageResolver, Timing
from tightship.sandbox.agent.kubelet import Kubelet
from tightship.sandbox.agent.node import Node, NodeSpec
from tightship.sandbox.agent.probes import NetworkProber
from tightship.sandbox.agent.proxy import Proxy
from tightship.sandbox.agent.runtime import ProcessRuntime

log = logging.getLogger("tightship.sandbox.agent")

HOST_IMAGE = "tightship/host"
"""The image that is this machine itself: its PATH and nothing else."""
_HOST_PATH = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]


@dataclass(frozen=True)
class Config:
    """What the agent is started with. Paths are absolute."""

    server: str
    state: str
    nodes: list[dict[str, Any]]
    certificate: str
    key: str
    ca: str | None = None
    token: str | None = None
    engine_cores: list[int] = field(default_factory=list)
    device_socket: str | None = None
    engine_python: str | None = None
    engine_environment: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    heartbeat: float = 5.0
    dra: bool = False


def resolver(config: Config) -> ImageResolver:
    """The table of images, plus the image that is the machine itself."""

    def resolve(image: str, node: str) -> images.ImageEnvironment | None:
        if image.split(":", maxsplit=1)[0] == HOST_IMAGE:
            return images.ImageEnvironment(list(_HOST_PATH), {})
        settings = images.ImageSettings(
            state=Path(config.state),
            device_socket=Path(config.device_socket) if config.device_socket else None,
            node=node,
            engine_python=config.engine_python,
            engine_environment=config.engine_environment,
        )
        return images.resolve(image, settings)

    return resolve


def cores(exclusive: list[int]) -> Cores:
    """Split the machine's cores; where nothing is left for the others, all share all.

    Raises:
        ValueError: a core is named that this machine doesn't have.
    """
    have = os.sched_getaffinity(0)
    if missing := set(exclusive) - have:
        raise ValueError(f"engine cores {sorted(missing)} are not among this machine's {sorted(have)}")
    rest = have - set(exclusive)
    return Cores(frozenset(exclusive or have), frozenset(rest or have))


async def run(config: Config) -> None:
    """Serve all nodes until cancelled."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(config.certificate, config.key)
    # probes have a session of their own: no token goes to pods, and no connection is kept that a dead pod would break
    plain = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))
    async with plain, Api(config.server, config.token, config.ca) as api:
        recorder = Recorder(api)
        services = Reflector(api, "/api/v1/services")
        endpoints = Reflector(api, "/api/v1/endpoints")
        proxy = Proxy(services.store, endpoints.store)
        services.on_change = proxy.changed
        split = cores(config.engine_cores)
        tasks = [recorder.run(), services.run(), endpoints.run(), proxy.run()]
        nodes: dict[str, Node] = {}
        version = await _version(api)
        for entry in config.nodes:
            spec = NodeSpec(**{**entry, "gpus": tuple(entry.get("gpus") or ())})
            directory = Path(config.state) / "nodes" / spec.name
            host = Host(
                name=spec.name,
                address=spec.address,
                directory=directory,
                api=api,
                runtime=ProcessRuntime(),
                prober=NetworkProber(plain),
                recorder=recorder,
                stock=Stock(spec.gpus, spec.cpus, spec.pods),
                addresses=Addresses(spec.prefix),
                services=services.store,
                resolve=resolver(config),
                connect=netns.create,
                cores=split,
                variables={**config.variables, "TIGHTSHIP_PROC_ROOT": str(directory / "proc")},
                timing=Timing(**config.timing),
            )
            if config.dra and spec.gpus:
                host.claims = Driver(
                    node=spec.name,
                    gpus=spec.gpus,
                    product=spec.product,
                    memory=spec.gpu_memory,
                    directory=directory,
                    api=api,
                    runtime=host.runtime,
                    resolve=host.resolve,
                    cores=split,
                )
            node = nodes[spec.name] = Node(spec, host, version, config.heartbeat)
            host.allocatable = node.capacity(len(spec.gpus))
            await Kubelet(node, tls).start()
            tasks += [node.run(), procfs.keep(directory / "proc", node.workers)]

        def on_pod(kind: str, pod: Object) -> None:
            owner = nodes.get(pod["spec"].get("nodeName") or "")
            if owner is not None:
                owner.on_pod(kind, pod)

        tasks.append(_pods(api, services, on_pod))
        await asyncio.gather(*tasks)


async def _pods(api: Api, services: Reflector, on_pod: Any) -> None:
    """Follow the pods, once the Services are known that go into their environment."""
    await services.synced.wait()
    await Reflector(api, "/api/v1/pods", on_pod).run()


async def _version(api: Api) -> str:
    """The API server's version, waited for."""
    while True:
        try:
            return str((await api.get("/version"))["gitVersion"])
        except Exception as error:
            log.info("no API server yet: %s", error)
            await asyncio.sleep(0.3)


def main() -> int:
    """Run until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    fields = json.loads(Path(sys.argv[-1]).read_text())
    serving = hollow.run(hollow.HollowConfig(**fields)) if sys.argv[1] == "--hollow" else run(Config(**fields))

    async def until_stopped() -> None:
        task = asyncio.create_task(serving)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await task

    try:
        asyncio.run(until_stopped())
    except asyncio.CancelledError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
