"""One simulated node: its Node object, its heartbeats, and the pods bound to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
from dataclasses import dataclass, field

import aiohttp

from tightship.sandbox.agent.api import ApiError, Object
from tightship.sandbox.agent.devices import GPU
from tightship.sandbox.agent.events import now
from tightship.sandbox.agent.host import Host
from tightship.sandbox.agent.pod import PodWorker

log = logging.getLogger(__name__)

KUBELET_PORT = 10250
LEASE_SECONDS = 40
REGISTER_RETRY = 0.5


@dataclass(frozen=True)
class NodeSpec:
    """What a node is to look like. `memory` and `gpu_memory` in bytes."""

    name: str
    index: int
    cpus: int
    memory: int
    pods: int = 110
    gpus: tuple[str, ...] = ()
    product: str = ""
    gpu_memory: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The first three numbers of the node's addresses."""
        return f"10.244.{self.index + 1}"

    @property
    def address(self) -> str:
        """The node's InternalIP."""
        return f"{self.prefix}.1"

    def all_labels(self) -> dict[str, str]:
        """What a kubelet and GPU feature discovery put on a node."""
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
            "node.kubernetes.io/instance-type": "sandbox",
        }
        if self.gpus:
            labels |= {
                "nvidia.com/gpu.present": "true",
                "nvidia.com/gpu.product": self.product,
                "nvidia.com/gpu.memory": str(self.gpu_memory // 2**20),
                "nvidia.com/gpu.count": str(len(self.gpus)),
                "nvidia.com/gpu.replicas": "1",
                "nvidia.com/gpu.sharing-strategy": "none",
                "nvidia.com/mps.capable": "false",
                "nvidia.com/mig.strategy": "none",
            }
        return labels | self.labels


class Node:
    """Keeps one Node object alive and a worker for each of its pods."""

    def __init__(self, spec: NodeSpec, host: Host, version: str, heartbeat: float) -> None:
        self.spec = spec
        self.host = host
        self._version = version
        self._heartbeat = heartbeat
        self.workers: dict[str, PodWorker] = {}
        self._due = asyncio.Event()
        self._since = now()

    def on_pod(self, kind: str, pod: Object) -> None:
        """Pass a change of a pod bound to this node to its worker."""
        uid = pod["metadata"]["uid"]
        worker = self.workers.get(uid)
        if kind == "DELETED":
            if worker is not None:
                worker.removed()
        elif worker is not None:
            worker.update(pod)
        else:
            worker = self.workers[uid] = PodWorker(self.host, pod)
            worker.task.add_done_callback(lambda task: self._ended(uid, task))

    def _ended(self, uid: str, task: asyncio.Task[None]) -> None:
        self.workers.pop(uid, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("worker of pod %s", uid, exc_info=task.exception())

    async def run(self) -> None:
        """Register the node and send heartbeats until cancelled."""
        registered = False
        while True:
            try:
                if not registered:
                    await self._register()
                    if self.host.claims is not None:
                        await self.host.claims.publish()
                    registered = True
                await self._beat()
            except ApiError as error:
                log.warning("node %s: %s", self.spec.name, error)
                registered = registered and error.status != 404
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                log.warning("node %s: %s", self.spec.name, error)
            await self._pause(self._heartbeat if registered else REGISTER_RETRY)

    def hurry(self) -> None:
        """Send the next heartbeat now: the node has changed."""
        self._due.set()

    async def _pause(self, seconds: float) -> None:
        self._due.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._due.wait(), seconds)

    async def _register(self) -> None:
        node: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.spec.name, "labels": self.spec.all_labels()},
            "spec": {},
            "status": self._status(),
        }
        try:
            await self.host.api.create("/api/v1/nodes", node)
        except ApiError as error:
            if error.status != 409:
                raise
            await self.host.api.merge(f"/api/v1/nodes/{self.spec.name}", {"metadata": node["metadata"]})

    async def _beat(self) -> None:
        self.host.allocatable = self.capacity(self.host.stock.healthy_gpus())
        await self.host.api.merge(f"/api/v1/nodes/{self.spec.name}/status", {"status": self._status()})
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {"holderIdentity": self.spec.name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": _micro()}
        try:
            await self.host.api.merge(f"{path}/{self.spec.name}", {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            metadata = {"name": self.spec.name, "namespace": "kube-node-lease"}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            try:
                await self.host.api.create(path, lease)
            except ApiError as refused:
                log.info("no lease for %s: %s", self.spec.name, refused)

    def capacity(self, gpus: int) -> dict[str, str]:
        """The node's resources, with `gpus` of them GPUs."""
        found = {
            "cpu": str(self.spec.cpus),
            "memory": f"{self.spec.memory // 1024}Ki",
            "pods": str(self.spec.pods),
            "ephemeral-storage": "100Gi",
        }
        if self.spec.gpus and self.host.claims is None:
            found[GPU] = str(gpus)
        return found

    def _status(self) -> Object:
        def condition(kind: str, holds: bool, reason: str, message: str) -> Object:
            return {
                "type": kind,
                "status": "True" if holds else "False",
                "reason": reason,
                "message": message,
                "lastHeartbeatTime": now(),
                "lastTransitionTime": self._since,
            }

        return {
            "capacity": self.capacity(len(self.spec.gpus)),
            "allocatable": self.capacity(self.host.stock.healthy_gpus()),
            "addresses": [
                {"type": "InternalIP", "address": self.spec.address},
                {"type": "Hostname", "address": self.spec.name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
            "conditions": [
                condition("MemoryPressure", False, "KubeletHasSufficientMemory", "the sandbox does not watch memory"),
                condition("DiskPressure", False, "KubeletHasNoDiskPressure", "the sandbox does not watch the disk"),
                condition("PIDPressure", False, "KubeletHasSufficientPID", "the sandbox does not watch process IDs"),
                condition("Ready", True, "KubeletReady", "the sandbox's node agent is running"),
            ],
            "nodeInfo": {
                "architecture": self.spec.all_labels()["kubernetes.io/arch"],
                "bootID": "sandbox",
                "containerRuntimeVersion": "tightship-sandbox://1",
                "kernelVersion": os.uname().release,
                "kubeProxyVersion": self._version,
                "kubeletVersion": self._version,
                "machineID": self.spec.name,
                "operatingSystem": "linux",
                "osImage": "Tightship sandbox",
                "systemUUID": self.spec.name,
            },
        }


def _micro() -> str:
    return now().replace("Z", ".000000Z")
