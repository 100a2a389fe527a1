"""What a node hands out: pod addresses, GPUs, CPUs and room for pods. Pure bookkeeping.

A GPU or an exclusive CPU belongs to at most one container at a time. An address comes up for use again only after the
whole range has gone by, so that a client with a stale address meets nobody rather than a stranger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from tightship.api.units import exact_quantity
from tightship.sandbox.agent.rootfs import Mount

GPU = "nvidia.com/gpu"
Object = Mapping[str, Any]


class Refused(Exception):
    """The node does not admit a pod; `reason` is what the kubelet puts into its status."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PrepareError(Exception):
    """A claim can't be used yet; the kubelet calls it FailedPrepareDynamicResources and tries again."""


class Addresses:
    """The pod addresses `prefix`.2 to `prefix`.254 of one node."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._next = 2
        self._used: set[int] = set()

    def take(self) -> str:
        """The next free address.

        Raises:
            Refused: all 253 are in use.
        """
        for _ in range(253):
            number = self._next
            self._next = 2 + (self._next - 1) % 253
            if number not in self._used:
                self._used.add(number)
                return f"{self._prefix}.{number}"
        raise Refused("FailedCreatePodSandBox", f"no address left in {self._prefix}.0/24: 253 in use")

    def free(self, address: str) -> None:
        """Give an address back."""
        self._used.discard(int(address.rsplit(".", 1)[1]))


@dataclass(frozen=True)
class Grant:
    """What one container was given: GPU UUIDs and exclusive node CPUs (empty: it shares the others)."""

    gpus: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Given:
    """What a container gets of a claim: GPU UUIDs, variables and mounts."""

    gpus: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()


class ClaimDriver(Protocol):
    """What hands out the devices of claims on a node."""

    async def publish(self) -> None:
        """Tell the API server of the node's devices."""

    async def prepare(self, pod: Object) -> dict[str, Given]:
        """What the containers of a pod get, by the pod's name for each claim. Raises PrepareError."""

    def release(self, pod: str) -> None:
        """A pod (its UID) has ended."""


def requests(container: Object, resource: str) -> Fraction:
    """What a container requests of a resource; a limit alone counts as its request."""
    resources = container.get("resources") or {}
    value = (resources.get("requests") or {}).get(resource, (resources.get("limits") or {}).get(resource, 0))
    return exact_quantity(value)


def qos_class(pod: Object) -> str:
    """Guaranteed, Burstable or BestEffort, from CPU and memory of all containers."""
    containers = [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
    any_set, guaranteed = False, True
    for container in containers:
        resources = container.get("resources") or {}
        limits = resources.get("limits") or {}
        for resource in ("cpu", "memory"):
            request = requests(container, resource)
            any_set = any_set or request > 0 or resource in limits
            if resource not in limits or exact_quantity(limits[resource]) != request or request == 0:
                guaranteed = False
    if guaranteed:
        return "Guaranteed"
    return "Burstable" if any_set else "BestEffort"


@dataclass
class Stock:
    """The devices and CPUs of one node and who has them."""

    gpus: tuple[str, ...]
    cpus: int
    pods: int
    reserved_cpus: int = 0
    missing: set[str] = field(default_factory=set)
    """GPUs that are unhealthy: not handed out, and not counted as allocatable."""
    _grants: dict[str, dict[str, Grant]] = field(default_factory=dict)

    def healthy_gpus(self) -> int:
        """How many GPUs can be allocated."""
        return sum(uuid not in self.missing for uuid in self.gpus)

    def admit(self, pod: Object) -> dict[str, Grant]:
        """Allocate for every container of a pod, or for none.

        Raises:
            Refused: a device, a CPU or a place for the pod is missing.
        """
        uid = pod["metadata"]["uid"]
        if uid in self._grants:
            return self._grants[uid]
        if len(self._grants) >= self.pods:
            raise Refused(
                "OutOfpods", f"Node didn't have enough resource: pods, requested: 1, used: {len(self._grants)}"
            )
        gpus = self._free(self._taken_gpus(), [uuid for uuid in self.gpus if uuid not in self.missing])
        cpus = self._free(self._taken_cpus(), list(range(self.reserved_cpus, self.cpus)))
        pinned = qos_class(pod) == "Guaranteed"
        grants: dict[str, Grant] = {}
        inits = pod["spec"].get("initContainers") or []
        for container in pod["spec"]["containers"]:
            grants[container["name"]] = self._grant(container, gpus, cpus, pinned)
        reusable = [uuid for grant in grants.values() for uuid in grant.gpus] + gpus
        for container in inits:
            grants[container["name"]] = self._grant(container, list(reusable), list(cpus), False)
        self._grants[uid] = grants
        return grants

    def release(self, uid: str) -> None:
        """Take back all that a pod was given."""
        self._grants.pop(uid, None)

    @staticmethod
    def _grant(container: Object, gpus: list[Any], cpus: list[Any], pinned: bool) -> Grant:
        wanted = int(requests(container, GPU))
        if wanted > len(gpus):
            raise Refused(
                "UnexpectedAdmissionError",
                f"Allocate failed due to requested number of devices unavailable for {GPU}. "
                f"Requested: {wanted}, Available: {len(gpus)}, which is unexpected",
            )
        given = tuple(gpus.pop(0) for _ in range(wanted))
        cores = requests(container, "cpu")
        if not pinned or cores.denominator != 1 or cores == 0:
            return Grant(given)
        if cores > len(cpus):
            raise Refused("OutOfcpu", f"Node didn't have enough resource: cpu, requested: {cores}, free: {len(cpus)}")
        return Grant(given, tuple(cpus.pop(0) for _ in range(int(cores))))

    @staticmethod
    def _free(taken: set[Any], all_of_them: Iterable[Any]) -> list[Any]:
        return [item for item in all_of_them if item not in taken]

    def _taken_gpus(self) -> set[str]:
        return {uuid for grants in self._grants.values() for grant in grants.values() for uuid in grant.gpus}

    def _taken_cpus(self) -> set[int]:
        return {cpu for grants in self._grants.values() for grant in grants.values() for cpu in grant.cpus}
