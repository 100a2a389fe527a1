"""What a pod worker gets from its node: ports, stock and time constants in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tightship.sandbox.agent.api import Api, Object
from tightship.sandbox.agent.devices import Addresses, ClaimDriver, Stock
from tightship.sandbox.agent.events import Recorder
from tightship.sandbox.agent.netns import PodNetwork
from tightship.sandbox.agent.probes import Prober
from tightship.sandbox.agent.runtime import Runtime
from tightship.sandbox.agent.volumes import Volumes
from tightship.sandbox.images import ImageEnvironment

ImageResolver = Callable[[str, str], "ImageEnvironment | None"]
"""(image, node name) -> what a container of it gets, or None for an image that cannot be pulled."""


@dataclass(frozen=True)
class Timing:
    """Time constants in seconds; the defaults are the kubelet's."""

    backoff_first: float = 10.0
    backoff_max: float = 300.0
    backoff_reset: float = 600.0
    retry: float = 2.0
    """Between attempts to mount volumes or to resolve references."""
    refresh: float = 20.0
    """Between looks at ConfigMaps, Secrets and tokens that are mounted."""
    probe_unit: float = 1.0
    """How long one second of a probe's delay and period lasts."""


@dataclass(frozen=True)
class Cores:
    """The machine's cores that containers run on: `exclusive` for those with CPUs of their own, `shared` for the others."""

    exclusive: frozenset[int]
    shared: frozenset[int]

    def of(self, cpus: int) -> frozenset[int]:
        """The cores of a container with `cpus` node CPUs of its own (0: it shares); one with more than there are engine cores
        runs on the others too, as an engine with a core for its API server must."""
        if not cpus:
            return self.shared
        return self.exclusive if cpus <= len(self.exclusive) else self.exclusive | self.shared


@dataclass
class Host:
    """One simulated node as its pods see it."""

    name: str
    address: str
    directory: Path
    api: Api
    runtime: Runtime
    prober: Prober
    recorder: Recorder
    stock: Stock
    addresses: Addresses
    services: Mapping[str, Object]
    resolve: ImageResolver
    connect: Callable[[str], Awaitable[PodNetwork]] | None
    cores: Cores
    variables: Mapping[str, str]
    """Set in every container, below the image's own."""
    allocatable: dict[str, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)
    claims: ClaimDriver | None = None
    """Hands out the node's GPUs by claims; None where the device plugin does."""
    volumes: type[Volumes] = Volumes
