"""Hollow nodes: many in one process, each of which can be cut off, taken down, rebooted, or have a fault of its GPUs.

    async with Api(server, token, ca) as api:
        machine = Machine(api, specs, directory)
        await machine.run()

A node that is *cut* goes on running its pods, but neither it nor they reach the API server: a dead kubelet, or a partition. A node that is
*down* has lost its pods' processes at once, and says nothing until it is up again. Both come back as a kubelet does: with what the API
server shows then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tightship.sandbox.agent.api import Api, Object, Reflector
from tightship.sandbox.agent.devices import Addresses, Stock
from tightship.sandbox.agent.events import Recorder
from tightship.sandbox.agent.hollow import journal as entries
from tightship.sandbox.agent.hollow.board import Board
from tightship.sandbox.agent.hollow.journal import Journal
from tightship.sandbox.agent.hollow.programs import Node as ProgramNode
from tightship.sandbox.agent.hollow.programs import Replica
from tightship.sandbox.agent.hollow.runtime import (
    HollowProber,
    HollowRunning,
    HollowRuntime,
    HollowVolumes,
    NoRecorder,
)
from tightship.sandbox.agent.hollow.settings import HollowSettings
from tightship.sandbox.agent.host import Cores, Host, Timing
from tightship.sandbox.agent.node import Node, NodeSpec
from tightship.sandbox.agent.pod import PodWorker
from tightship.sandbox.images import ImageEnvironment

log = logging.getLogger(__name__)
VERSION_RETRY = 0.3


class UnknownError(Exception):
    """There is no node, pod, container or GPU of that name; the text says what there is."""


class NodeApi(Api):
    """The API server as one node sees it: cut off, it sees nothing."""

    def __init__(self, api: Api) -> None:
        super().__init__(api.server)
        self._api = api
        self.cut = False

    async def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """See Api. Raises ConnectionError while the node is cut off."""
        if self.cut:
            raise ConnectionError("the node is cut off from the API server")
        return await self._api.request(method, path, body, params, content_type)


@dataclass(frozen=True)
class Ground:
    """What all nodes of a machine stand on; `version` is the API server's."""

    api: Api
    directory: Path
    settings: HollowSettings
    timing: Timing
    heartbeat: float
    version: str
    journal: Journal
    recorder: Recorder


class HollowNode:
    """One node: its pods while it is up, and what outlives a reboot (its GPUs, and which of them are lost)."""

    def __init__(self, spec: NodeSpec, ground: Ground) -> None:
        self.spec = spec
        self.api = NodeApi(ground.api)
        self._ground = ground
        self._task: asyncio.Task[None] | None = None
        driver = ground.settings.driver
        gpus = {
            uuid: {"uuid": uuid, "product": spec.product, "memory": spec.gpu_memory, "driver": driver}
            for uuid in spec.gpus
        }
        self.board = Board(gpus)
        self.up()

    # -- its state ------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Boot: nothing runs, every GPU is free."""
        self.board = Board(self.board.gpus, self.board.lost)
        ground = self._ground
        shared = ProgramNode(self.spec.name, self.board, ground.settings, self.api, ground.journal)
        self.runtime = HollowRuntime(shared)
        self.stock = Stock(self.spec.gpus, self.spec.cpus, self.spec.pods, missing=self.board.lost)
        host = Host(
            name=self.spec.name,
            address=self.spec.address,
            directory=ground.directory / self.spec.name,
            api=self.api,
            runtime=self.runtime,
            prober=HollowProber(),
            recorder=ground.recorder,
            stock=self.stock,
            addresses=Addresses(self.spec.prefix),
            services={},
            resolve=self._resolve,
            connect=None,
            cores=Cores(frozenset(), frozenset()),
            variables={},
            timing=ground.timing,
            volumes=HollowVolumes,
        )
        self.node = Node(self.spec, host, ground.version, ground.heartbeat)
        host.allocatable = self.node.capacity(self.stock.healthy_gpus())
        self._task = asyncio.get_running_loop().create_task(self.node.run())

    async def down(self) -> None:
        """Pull the plug: what ran is gone, and nobody is told."""
        if self._task is None:
            return
        self.api.cut = True
        tasks = [self._task, *(worker.task for worker in self.node.workers.values())]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for running in list(self.runtime.running.values()):
            running.kill()
            await running.exit
        self._ground.journal.write(entries.DOWN, node=self.spec.name)
        self.api.cut = False

    @property
    def is_up(self) -> bool:
        """Whether it is up, cut off or not."""
        return self._task is not None

    @property
    def listens(self) -> bool:
        """Whether it takes notice of the API server."""
        return self.is_up and not self.api.cut

    def _resolve(self, image: str, node: str) -> ImageEnvironment | None:
        return None if image.startswith(self._ground.settings.missing_images) else ImageEnvironment([], {})

    # -- its pods -------------------------------------------------------------------------------------------------

    def worker(self, namespace: str, name: str) -> PodWorker | None:
        """The worker of a pod."""
        for worker in self.node.workers.values():
            metadata = worker.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (namespace, name):
                return worker
        return None

    def replicas(self, gpu: str) -> Iterator[Replica]:
        """The engines on a GPU."""
        for running in self.runtime.running.values():
            program = running.program
            if isinstance(program, Replica) and self.board.engines.get(program.pid, ("", 0))[0] == gpu:
                yield program

    def lose(self, gpu: str) -> None:
        """A GPU falls off the bus: its engines fail, and no process finds it any more."""
        self.board.lost.add(gpu)
        for engine in list(self.replicas(gpu)):
            engine.fail("CUDA error: no CUDA-capable device is detected")
        for pack in self.board.packs.values():
            pack.changed()
        self.node.hurry()

    def find(self, gpu: str) -> None:
        """The GPU is back."""
        self.board.lost.discard(gpu)
        self.node.hurry()

    def break_server(self, gpu: str) -> None:
        """A fatal fault of one client: the MPS server of the GPU is in FAULT, and all its clients fail."""
        for pack in self.board.packs.values():
            if (pack.gpu or {}).get("uuid") == gpu:
                pack.break_server()


class Machine:
    """All hollow nodes of one process.

    Args:
        api: the API server, open.
        specs: the nodes.
        directory: where pods keep their few files; an empty directory.
        settings: how programs behave.
        timing: the kubelet's time constants.
        heartbeat: seconds between a node's signs of life.
        journal: takes what happens; in memory where none is given.
    """

    def __init__(
        self,
        api: Api,
        specs: Iterable[NodeSpec],
        directory: Path,
        *,
        settings: HollowSettings | None = None,
        timing: Timing | None = None,
        heartbeat: float = 10.0,
        journal: Journal | None = None,
    ) -> None:
        self._api = api
        self._specs = list(specs)
        self._directory = directory
        self._settings = settings or HollowSettings()
        self._timing = timing or Timing()
        self._heartbeat = heartbeat
        self.journal = journal or Journal()
        self.nodes: dict[str, HollowNode] = {}
        self._pods = Reflector(api, "/api/v1/pods", self._on_pod)
        self.started = asyncio.Event()

    async def run(self) -> None:
        """Serve all nodes until cancelled."""
        self.journal.write(entries.AGENT)
        recorder = Recorder(self._api) if self._settings.events else NoRecorder(self._api)
        ground = Ground(
            self._api,
            self._directory,
            self._settings,
            self._timing,
            self._heartbeat,
            await self._version(),
            self.journal,
            recorder,
        )
        self.nodes |= {spec.name: HollowNode(spec, ground) for spec in self._specs}
        self.started.set()
        try:
            await asyncio.gather(recorder.run(), self._pods.run())
        finally:
            await asyncio.gather(*(node.down() for node in self.nodes.values()))

    async def _version(self) -> str:
        while True:
            try:
                return str((await self._api.get("/version"))["gitVersion"])
            except Exception as error:
                log.info("no API server yet: %s", error)
                await asyncio.sleep(VERSION_RETRY)

    def _on_pod(self, kind: str, pod: Object) -> None:
        node = self.nodes.get(pod["spec"].get("nodeName") or "")
        if node is not None and node.listens:
            node.node.on_pod(kind, pod)

    def _replay(self, node: HollowNode) -> None:
        """Tell a node that hears again what the API server has for it now."""
        mine = [pod for pod in self._pods.store.values() if pod["spec"].get("nodeName") == node.spec.name]
        known = {pod["metadata"]["uid"] for pod in mine}
        for uid, worker in list(node.node.workers.items()):
            if uid not in known:
                worker.removed()
        for pod in mine:
            node.node.on_pod("MODIFIED", pod)

    # -- faults ---------------------------------------------------------------------------------------------------

    def cut(self, name: str) -> None:
        """Cut a node off from the API server."""
        self._node(name).api.cut = True

    def join(self, name: str) -> None:
        """End the cut."""
        node = self._node(name)
        node.api.cut = False
        if node.is_up:
            self._replay(node)
            node.node.hurry()

    async def down(self, name: str) -> None:
        """Take a node down; its pods' processes are gone."""
        await self._node(name).down()

    def up(self, name: str) -> None:
        """Boot a node that is down."""
        node = self._node(name)
        if not node.is_up:
            node.up()
            self._replay(node)

    async def reboot(self, name: str) -> None:
        """Down and up at once."""
        await self.down(name)
        self.up(name)

    def kill(self, namespace: str, pod: str, container: str, reason: str | None = None) -> None:
        """Kill a container; `reason` is what its status will give (OOMKilled), else Error."""
        self.container(namespace, pod, container).kill(reason)

    def fail(self, namespace: str, pod: str, container: str, why: str) -> None:
        """Give the engine of a replica a fatal error."""
        self.container(namespace, pod, container).program.fail(why)

    def hang(self, namespace: str, pod: str, container: str, hangs: bool = True) -> None:
        """Make a container answer probes no more, or again."""
        self.container(namespace, pod, container).program.hang(hangs)

    def evict(self, namespace: str, pod: str, message: str = "The node was low on resource: memory.") -> None:
        """Evict a pod as the kubelet does under pressure."""
        self._worker(namespace, pod)[1].evict(message)

    def container(self, namespace: str, pod: str, container: str) -> HollowRunning:
        """A container that runs.

        Raises:
            UnknownError: it doesn't.
        """
        node, worker = self._worker(namespace, pod)
        running = node.runtime.running.get((worker.uid, container))
        if running is None:
            names = ", ".join(name for uid, name in node.runtime.running if uid == worker.uid)
            raise UnknownError(f"container {container} of {namespace}/{pod} is not running; of that pod run: {names}")
        return running

    def gpu(self, uuid: str) -> HollowNode:
        """The node of a GPU. Raises UnknownError."""
        for node in self.nodes.values():
            if uuid in node.spec.gpus:
                return node
        raise UnknownError(f"no node has a GPU {uuid}")

    def _node(self, name: str) -> HollowNode:
        with contextlib.suppress(KeyError):
            return self.nodes[name]
        raise UnknownError(f"there is no node {name}, but {', '.join(self.nodes)}")

    def _worker(self, namespace: str, pod: str) -> tuple[HollowNode, PodWorker]:
        for node in self.nodes.values():
            worker = node.worker(namespace, pod) if node.is_up else None
            if worker is not None:
                return node, worker
        raise UnknownError(f"pod {namespace}/{pod} is on no node that is up")
