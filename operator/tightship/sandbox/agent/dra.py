"""A fake of NVIDIA's driver for dynamic resource allocation: what its kubelet plugin does on one node.

It publishes the node's GPUs in a ResourceSlice. For a pod that names a claim it looks up which GPU the claim has, and gives the
containers that ask for the claim that GPU; where the claim's configuration says `strategy: MPS` it runs one MPS daemon for the claim,
from its first pod on the node to its last, and gives the containers the daemon's pipe and shared memory. As of the real one, whoever
names the claim gets the same GPU and the same daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tightship.sandbox.agent import rootfs
from tightship.sandbox.agent.api import Api, ApiError, Object
from tightship.sandbox.agent.devices import Given, PrepareError
from tightship.sandbox.agent.host import Cores, ImageResolver
from tightship.sandbox.agent.runtime import ContainerSpec, Running, Runtime

log = logging.getLogger(__name__)

DRIVER = "gpu.nvidia.com"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
DAEMON_IMAGE = "tightship/operator:sandbox"
PIPE = "/run/nvidia-mps"
DAEMON_SECONDS = 10.0


def device_class() -> Object:
    """The DeviceClass that comes with the driver."""
    selector = f"device.driver == '{DRIVER}' && device.attributes['{DRIVER}'].type == 'gpu'"
    spec = {"selectors": [{"cel": {"expression": selector}}]}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": DRIVER}, "spec": spec}


@dataclass
class Driver:
    """The plugin of one node. `gpus` are UUIDs, `memory` bytes of each; `directory` is the node's."""

    node: str
    gpus: tuple[str, ...]
    product: str
    memory: int
    directory: Path
    api: Api
    runtime: Runtime
    resolve: ImageResolver
    cores: Cores
    _users: dict[str, set[str]] = field(default_factory=dict)
    _daemons: dict[str, Running] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def resource_slice(self) -> Object:
        """The node's GPUs as the driver publishes them."""
        devices = [
            {
                "name": f"gpu-{index}",
                "attributes": {
                    "type": {"string": "gpu"},
                    "uuid": {"string": uuid},
                    "productName": {"string": self.product.replace("-", " ")},
                    "driverVersion": {"version": "580.105.8"},
                },
                "capacity": {"memory": {"value": f"{self.memory // 2**20}Mi"}},
            }
            for index, uuid in enumerate(self.gpus)
        ]
        pool = {"name": self.node, "generation": 1, "resourceSliceCount": 1}
        return {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceSlice",
            "metadata": {"name": f"{self.node}-{DRIVER}"},
            "spec": {"driver": DRIVER, "nodeName": self.node, "pool": pool, "devices": devices},
        }

    async def publish(self) -> None:
        """Create the slice; one that an earlier agent left is the same."""
        try:
            await self.api.create(SLICES, self.resource_slice())
        except ApiError as error:
            if error.status != 409:
                raise

    async def prepare(self, pod: Mapping[str, Any]) -> dict[str, Given]:
        """What the containers of a pod get, by the pod's name for each claim.

        Raises:
            PrepareError: a claim isn't there, isn't allocated to this node, or its MPS daemon doesn't start.
        """
        found = {}
        async with self._turn:
            for entry in pod["spec"].get("resourceClaims") or []:
                claim = await self._claim(pod, entry["resourceClaimName"])
                uid = str(claim["metadata"]["uid"])
                self._users.setdefault(uid, set()).add(str(pod["metadata"]["uid"]))
                found[str(entry["name"])] = await self._give(uid, claim)
        return found

    async def _claim(self, pod: Mapping[str, Any], name: str) -> Object:
        path = f"/apis/resource.k8s.io/v1/namespaces/{pod['metadata']['namespace']}/resourceclaims/{name}"
        try:
            claim = await self.api.get(path)
        except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise PrepareError(f"claim {name}: {error}") from error
        users = (claim.get("status") or {}).get("reservedFor") or []
        if not any(each["uid"] == pod["metadata"]["uid"] for each in users):
            raise PrepareError(f"claim {name} is not reserved for the pod")
        return claim

    async def _give(self, uid: str, claim: Object) -> Given:
        devices = claim["status"]["allocation"]["devices"]
        names = {each["device"] for each in devices["results"] if (each["driver"], each["pool"]) == (DRIVER, self.node)}
        gpus = tuple(uuid for index, uuid in enumerate(self.gpus) if f"gpu-{index}" in names)
        if not gpus:
            raise PrepareError(f"claim {claim['metadata']['name']} has no GPU of this node")
        env = {"NVIDIA_VISIBLE_DEVICES": ",".join(gpus)}
        if not _wants_mps(devices):
            return Given(gpus, env)
        pipe, shared = self._place(uid) / "pipe", self._place(uid) / "shm"
        await self._serve(uid, gpus)
        mounts = (rootfs.Mount(PIPE, str(pipe)), rootfs.Mount("/dev/shm", str(shared)))
        return Given(gpus, {**env, "CUDA_MPS_PIPE_DIRECTORY": PIPE}, mounts)

    def _place(self, uid: str) -> Path:
        return self.directory / "mps" / uid

    async def _serve(self, uid: str, gpus: tuple[str, ...]) -> None:
        """Have the claim's MPS daemon run."""
        pipe = self._place(uid) / "pipe"
        running = self._daemons.get(uid)
        if running is None or running.exit.done():
            image = self.resolve(DAEMON_IMAGE, self.node)
            if image is None:
                raise PrepareError(f"the sandbox has no image {DAEMON_IMAGE}")
            for path in (pipe, self._place(uid) / "shm", self._place(uid) / "run"):
                path.mkdir(parents=True, exist_ok=True)
            (pipe / "control").unlink(missing_ok=True)  # of a daemon that was killed
            env = image.merged({"NVIDIA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_MPS_PIPE_DIRECTORY": PIPE})
            spec = ContainerSpec(
                pod_uid=f"mps-{uid}",
                name="mps-control-daemon",
                argv=["nvidia-cuda-mps-control", "-f"],
                env=env,
                cwd="/",
                hostname=self.node,
                mounts=[*rootfs.base_mounts(), rootfs.Mount(PIPE, str(pipe))],
                cpus=self.cores.shared,
                log=self._place(uid) / "daemon.log",
                network=None,
                directory=self._place(uid) / "run",
            )
            self._daemons[uid] = await self.runtime.start(spec)
        give_up = asyncio.get_running_loop().time() + DAEMON_SECONDS
        while not (pipe / "control").exists():
            if asyncio.get_running_loop().time() > give_up or self._daemons[uid].exit.done():
                raise PrepareError("the MPS control daemon does not come up")
            await asyncio.sleep(0.05)

    def release(self, pod: str) -> None:
        """A pod (its UID) has ended: claims without any other pod here lose their daemon."""
        for uid, users in list(self._users.items()):
            users.discard(pod)
            if not users:
                del self._users[uid]
                daemon = self._daemons.pop(uid, None)
                if daemon is not None and not daemon.exit.done():
                    daemon.kill()


def _wants_mps(devices: Mapping[str, Any]) -> bool:
    parameters = [(each.get("opaque") or {}).get("parameters") or {} for each in devices.get("config") or []]
    return any((each.get("sharing") or {}).get("strategy") == "MPS" for each in parameters)
