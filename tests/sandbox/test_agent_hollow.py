"""Hollow nodes on an embedded plane in this process: pods live, refuse, fail and end as the real programs do."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from plane_world import MERGE, Client
from plane_world import eventually as soon
from tightship.manifests.holder import WATCH_CONTAINER
from tightship.manifests.naming import NAMINGS, environment, pod_annotations
from tightship.reconcile import podstate, reports
from tightship.sandbox.agent.api import Api
from tightship.sandbox.agent.hollow import journal
from tightship.sandbox.agent.hollow.board import Pack
from tightship.sandbox.agent.hollow.control import Control
from tightship.sandbox.agent.hollow.journal import Journal
from tightship.sandbox.agent.hollow.machine import Machine
from tightship.sandbox.agent.hollow.settings import HollowSettings
from tightship.sandbox.agent.host import Timing
from tightship.sandbox.agent.node import NodeSpec
from tightship.sandbox.plane import Plane
from tightship.sandbox.plane import Timing as PlaneTiming

GIB = 2**30
PODS = "/api/v1/namespaces/default/pods"
SETTINGS = HollowSettings(
    start_seconds=0.15,
    attach_seconds=0.1,
    daemon_seconds=0.02,
    fence_seconds=0.1,
    watch_seconds=0.02,
    drain_seconds=0.02,
    leave_seconds=0.5,
    fenced_seconds=0.5,
    memory_seconds=0.3,
    missing_images=("missing/",),
)


eventually = partial(soon, seconds=30.0)
"""On a machine that does other things too."""


def make_holder(name: str, pack: str, node: str = "node-0") -> dict[str, Any]:
    env = [
        {"name": "TIGHTSHIP_PACK_UID", "value": pack},
        {"name": "TIGHTSHIP_POD_NAME", "value": name},
        {"name": "TIGHTSHIP_POD_NAMESPACE", "value": "default"},
    ]
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    node_command = ["tightship", "node"]
    return make_pod(
        name,
        node,
        [
            {"name": "mps", "image": "op", "command": [*node_command, "mps"], "env": env, "resources": gpu},
            {"name": "watch", "image": "op", "command": [*node_command, "watch"], "env": env},
        ],
        [{"name": "prepare", "image": "op", "command": [*node_command, "prepare"]}],
    )


def make_replica(name: str, pack: str, gpu: str, memory: int = 10 * GIB, image: str = "engine") -> dict[str, Any]:
    values = {
        "TIGHTSHIP_DEVICE": "cuda",
        "TIGHTSHIP_PACK_UID": pack,
        "TIGHTSHIP_GPU_UUID": gpu,
        "NVIDIA_VISIBLE_DEVICES": gpu,
        "TIGHTSHIP_MEMORY_BYTES": str(memory),
        "CUDA_MPS_PIPE_DIRECTORY": "/mps/pipe",
    }
    probe = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 5}
    engine = {
        "name": "engine",
        "image": image,
        "command": ["python3", "-m", "tightship.replica", "--"],
        "env": [{"name": key, "value": value} for key, value in values.items()],
        "startupProbe": probe | {"failureThreshold": 1000},
        "readinessProbe": probe | {"failureThreshold": 2},
        "livenessProbe": probe | {"failureThreshold": 6},
    }
    return make_pod(
        name, "node-0", [engine], [{"name": "inject", "image": "op", "command": ["tightship", "inject", "/x"]}]
    )


def make_pod(name: str, node: str, containers: list[dict[str, Any]], inits: list[dict[str, Any]]) -> dict[str, Any]:
    spec = {"containers": containers, "initContainers": inits, "nodeSelector": {"kubernetes.io/hostname": node}}
    metadata = {"name": name, "namespace": "default"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": spec | {"terminationGracePeriodSeconds": 5},
    }


class World:
    """A plane, a client, and two hollow nodes of two GPUs."""

    def __init__(self, plane: Plane, machine: Machine) -> None:
        self.plane, self.machine, self.client = plane, machine, Client(plane.url)
        self.gpus = [gpu for node in machine._specs for gpu in node.gpus]

    async def make(self, *pods: dict[str, Any]) -> None:
        for pod in pods:
            await self.client.good("POST", PODS, pod)

    def pod(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.plane.store.get(("", "pods"), "default", name)
        return found

    def is_ready(self, name: str) -> bool:
        conditions = ((self.pod(name) or {}).get("status") or {}).get("conditions") or []
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def last_words(self, name: str, container: int = 0) -> str:
        statuses = ((self.pod(name) or {}).get("status") or {}).get("containerStatuses") or [{}] * 2
        last = statuses[container].get("lastState") or {}
        return str((last.get("terminated") or {}).get("message") or "")

    def annotation(self, name: str, which: str) -> dict[str, Any]:
        text = ((self.pod(name) or {}).get("metadata") or {}).get("annotations") or {}
        return dict(json.loads(text.get(f"tightship.dev/{which}", "{}")))

    async def ready(self, *names: str) -> None:
        await eventually(lambda: all(self.is_ready(name) for name in names))

    async def holder(self, name: str = "h", pack: str = "p", node: str = "node-0") -> str:
        """A holder that serves; its GPU."""
        await self.make(make_holder(name, pack, node))
        await eventually(lambda: self.annotation(name, "mps").get("state") == "IDLE")
        return str(self.annotation(name, "gpu")["uuid"])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    specs = [
        NodeSpec(f"node-{i}", i, 8, 64 * GIB, gpus=(f"GPU-{i}a", f"GPU-{i}b"), product="P", gpu_memory=80 * GIB)
        for i in range(2)
    ]
    timing = Timing(backoff_first=0.05, backoff_max=0.2, retry=0.05, probe_unit=0.01)
    async with Plane(timing=PlaneTiming(node_grace=30)) as plane, Api(plane.url) as api:
        machine = Machine(api, specs, tmp_path, settings=SETTINGS, timing=timing, heartbeat=0.5)
        task = asyncio.create_task(machine.run())
        await machine.started.wait()
        made = World(plane, machine)
        yield made
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await made.client.close()


async def test_a_pack_starts_its_replicas_one_after_the_other(world: World) -> None:
    """A holder publishes its GPU; its replicas become ready, and no start begins before the one before it has ended."""
    gpu = await world.holder()
    assert world.annotation("h", "gpu") == {"uuid": gpu, "product": "P", "memory": 80 * GIB, "driver": SETTINGS.driver}
    names = [f"r{i}" for i in range(4)]
    await world.make(*(make_replica(name, "p", gpu) for name in names))
    await world.ready(*names)
    starts = [e.what for e in world.machine.journal.entries if e.what in (journal.START, journal.HEALTHY)]
    assert starts == [journal.START, journal.HEALTHY] * 4
    uids = {(world.pod(name) or {})["metadata"]["uid"] for name in names}
    await eventually(lambda: {each["podUID"] for each in world.annotation("h", "mps")["clients"]} == uids)
    assert world.annotation("h", "mps")["state"] == "ACTIVE"
    await world.client.good("DELETE", f"{PODS}/r0")
    await eventually(lambda: world.pod("r0") is None)
    await eventually(lambda: len(world.annotation("h", "mps")["clients"]) == 3)


async def test_a_replica_that_has_a_gpu_alone_tells_which_and_needs_no_holder(world: World) -> None:
    """As in packs of mode Exclusive: the GPU is the pod's own, its init container reports it, and nothing of MPS is asked for."""
    made = make_replica("r", "p", "")
    (engine,) = made["spec"]["containers"]
    left_out = ("TIGHTSHIP_GPU_UUID", "NVIDIA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY")
    engine["env"] = [each for each in engine["env"] if each["name"] not in left_out]
    engine["env"].append({"name": "TIGHTSHIP_SHARING", "value": "Exclusive"})
    engine["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    tells = ["python3", "-m", "tightship.replica.report"]
    made["spec"]["initContainers"].append({**engine, "name": "report", "command": tells})
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        made["spec"]["initContainers"][-1].pop(probe)
    await world.make(made)
    await world.ready("r")
    told = reports.of([world.pod("r") or {}])[(world.pod("r") or {})["metadata"]["uid"]]
    assert (told.uuid in world.gpus, told.name, told.total, told.free) == (True, "P", 80 * GIB, 80 * GIB)
    assert world.machine.journal.entries[-1].gpu == told.uuid


@pytest.mark.parametrize("naming", NAMINGS)
async def test_a_replica_sees_the_gpu_that_its_pod_names(world: World, naming: str) -> None:
    """By each of the three ways; what the operator writes into a pod is what the simulated runtime takes."""
    gpu = await world.holder()
    made = make_replica("r", "p", gpu)
    (engine,) = made["spec"]["containers"]
    named = environment(naming, gpu)
    engine["env"] = [each for each in engine["env"] if each["name"] not in named]
    engine["env"] += [{"name": key, "value": value} for key, value in named.items()]
    made["metadata"]["annotations"] = pod_annotations(naming, gpu, "engine")
    await world.make(made)
    await world.ready("r")
    assert world.machine.journal.entries[-1].gpu == gpu


async def test_a_watcher_that_runs_is_shown(world: World) -> None:
    """Where it isn't, the operator takes no replica's absence from the daemon's clients for a fact."""
    await world.holder()
    await eventually(lambda: podstate.is_running(world.pod("h") or {}, WATCH_CONTAINER))


async def test_each_holder_gets_a_gpu_of_its_own(world: World) -> None:
    await world.make(*(make_holder(f"h{i}", f"p{i}") for i in range(3)))
    await eventually(lambda: all(world.annotation(f"h{i}", "gpu") for i in range(2)))
    assert {world.annotation(f"h{i}", "gpu")["uuid"] for i in range(2)} == {"GPU-0a", "GPU-0b"}
    assert not (world.pod("h2") or {})["spec"].get("nodeName"), "the scheduler has no third GPU on that node"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pack": "nobody's"}, "HolderLost: nobody holds"),
        ({"gpu": "GPU-0b"}, "GPUMismatch: the container sees GPU-0a, the pack holds GPU-0b"),
        ({"gpu": "GPU-1a"}, "GPUNotVisible: the container sees no GPU"),
        ({"memory": 81 * GIB}, "InsufficientMemory: "),
    ],
)
async def test_a_replica_refuses(world: World, change: dict[str, Any], words: str) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", **{"pack": "p", "gpu": gpu} | change))
    await eventually(lambda: world.last_words("r").startswith(words))
    assert not world.is_ready("r")


async def test_memory_is_the_gpus_whoever_uses_it(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r0", "p", gpu, 50 * GIB))
    await world.ready("r0")
    await world.make(make_replica("r1", "p", gpu, 40 * GIB))
    await eventually(lambda: "InsufficientMemory" in world.last_words("r1"))
    await world.client.good("DELETE", f"{PODS}/r0")
    await world.ready("r1")


async def test_a_holder_that_goes_lets_its_clients_leave_first_and_then_fences_them(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    await world.client.good("DELETE", f"{PODS}/h")
    await eventually(lambda: "HolderLost" in world.last_words("r"))
    await eventually(lambda: world.pod("h") is None)
    order = [e.what for e in world.machine.journal.entries if e.gpu == gpu and e.what in (journal.RELEASE, journal.END)]
    assert order[:2] == [journal.RELEASE, journal.END]


async def test_a_holder_that_leaves_waits_for_a_replica_that_starts(world: World) -> None:
    """It is no client of MPS yet, and may not be left without a daemon on a GPU that is given back."""
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await eventually(lambda: any(e.what == journal.START for e in world.machine.journal.entries))
    await world.client.good("DELETE", f"{PODS}/h")
    await eventually(lambda: world.pod("h") is None)
    order = [e.what for e in world.machine.journal.entries if e.gpu == gpu]
    assert order[:5] == [journal.HOLD, journal.START, journal.HEALTHY, journal.RELEASE, journal.END]


FAULTS: dict[str, tuple[Callable[[World, str], None], str]] = {
    "the memory killer takes the engine": (lambda w, gpu: w.machine.kill("default", "r", "engine", "OOMKilled"), ""),
    "the daemon is killed": (lambda w, gpu: w.machine.kill("default", "h", "mps"), ""),
    "the MPS server is in FAULT": (lambda w, gpu: w.machine.gpu(gpu).break_server(gpu), "EngineFailed"),
    "the engine fails": (lambda w, gpu: w.machine.fail("default", "r", "engine", "out of pages"), "out of pages"),
    "the engine hangs": (lambda w, gpu: w.machine.hang("default", "r", "engine"), ""),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_replica_comes_back_after(world: World, fault: str) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    cause, words = FAULTS[fault]
    cause(world, gpu)
    await eventually(lambda: (world.pod("r") or {})["status"]["containerStatuses"][0]["restartCount"] >= 1)
    await world.ready("r")
    assert words in world.last_words("r")


async def test_a_killed_watcher_stops_nothing(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    world.machine.kill("default", "h", "watch")
    await eventually(lambda: (world.pod("h") or {})["status"]["containerStatuses"][1]["restartCount"] == 1)
    await eventually(lambda: world.annotation("h", "mps")["state"] == "ACTIVE")
    assert (world.pod("r") or {})["status"]["containerStatuses"][0]["restartCount"] == 0


async def test_an_evicted_pod_stays_as_failed_and_gives_its_gpu_back(world: World) -> None:
    await world.holder()
    world.machine.evict("default", "h")
    status = await eventually(lambda: (s := (world.pod("h") or {})["status"]) and s["phase"] == "Failed" and s)
    assert status["reason"] == "Evicted"
    assert await world.holder("h2", "p2") == "GPU-0a"


async def test_a_missing_image_is_not_pulled(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu, image="missing/vllm:1"))

    def waiting() -> str:
        states = (world.pod("r") or {}).get("status", {}).get("containerStatuses") or [{}]
        return str(((states[0].get("state") or {}).get("waiting") or {}).get("reason"))

    await eventually(lambda: waiting() in ("ErrImagePull", "ImagePullBackOff"))


async def test_a_node_cut_off_runs_on_and_takes_up_what_it_missed(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    world.machine.cut("node-0")
    await world.client.good("DELETE", f"{PODS}/r")
    await asyncio.sleep(0.1)
    assert list(world.machine.nodes["node-0"].replicas(gpu)), "it hears of nothing"
    world.machine.join("node-0")
    await eventually(lambda: world.pod("r") is None)


async def test_a_node_that_is_back_says_again_which_pods_are_ready(world: World) -> None:
    """Of a silent node's pods the control plane says that they aren't."""
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    world.machine.cut("node-0")
    conditions = [{"type": "Ready", "status": "False", "reason": "NodeNotReady"}]
    await world.client.good("PATCH", f"{PODS}/r/status", {"status": {"conditions": conditions}}, MERGE)
    assert not world.is_ready("r")
    world.machine.join("node-0")
    await world.ready("r")


async def test_a_rebooted_node_starts_its_pods_anew(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    await world.machine.reboot("node-0")
    await eventually(lambda: (world.pod("r") or {})["status"]["containerStatuses"][0]["restartCount"] >= 1)
    await world.ready("r", "h")
    assert journal.DOWN in [entry.what for entry in world.machine.journal.entries]


async def test_a_lost_gpu_ends_what_runs_on_it_and_is_allocatable_no_more(world: World) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    world.machine.gpu(gpu).lose(gpu)
    # the first end is the engine's; every later one its supervisor's, which finds no GPU, or no holder
    await eventually(lambda: world.last_words("r").startswith(("EngineFailed", "GPUNotVisible", "HolderLost")))
    assert not world.is_ready("r")
    node = ("", "nodes"), "", "node-0"
    await eventually(lambda: world.plane.store.get(*node)["status"]["allocatable"]["nvidia.com/gpu"] == "1")


async def test_faults_can_be_asked_for_from_outside(world: World, tmp_path: Path) -> None:
    gpu = await world.holder()
    await world.make(make_replica("r", "p", gpu))
    await world.ready("r")
    socket = str(tmp_path / "c.sock")
    runner = await Control(world.machine).start(socket)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as session:
        for path, status in (
            ("pods/default/r/engine/kill?reason=OOMKilled", 200),
            ("pods/default/nobody/engine/kill", 404),
            ("nodes/node-9/down", 404),
            ("gpus/GPU-1b/lost", 200),
            ("nodes/node-1/reboot", 200),
        ):
            async with session.post(f"http://hollow/{path}") as answer:
                assert answer.status == status, await answer.text()
    await runner.cleanup()
    await eventually(lambda: (world.pod("r") or {})["status"]["containerStatuses"][0]["restartCount"] == 1)


def test_an_mps_server_faults_by_its_clients_and_until_the_last_has_left() -> None:
    pack = Pack("p", daemon=True)
    assert pack.state == "IDLE"
    for pid in (1, 2):
        pack.attach(pid, f"pod-{pid}")
    pack.break_server()
    pack.detach(1)
    assert pack.state == "FAULT"
    pack.detach(2)
    assert pack.state == "IDLE", "the next client finds a new server"
    pack.break_server()
    assert pack.state == "IDLE", "there is nobody who could have a fault"


def test_a_journals_file_can_be_read_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, clock=lambda: 1.0).write(journal.HOLD, node="n", gpu="g")
    with path.open("a") as file:
        file.write('{"what": "re')
    with path.open() as file:
        assert journal.read(file) == [journal.Entry(journal.HOLD, 1.0, "n", "g")]
