"""What every reconciler is given: its eyes, its hands, its clock, and one way to report.

A reconciler reads from `store` (the watch cache, which also shows its own writes at once), writes through `cluster`,
asks `clock` for the time, and ends with one `report`. It keeps nothing between two calls, but that the placement pass leaves word for
the services (`placed`), which a new process has from its first pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tightship.api.v1alpha1.conditions import READY
from tightship.core.conditions import find
from tightship.core.placement import Demand, ServiceRef, Shortfall
from tightship.kube.clock import Clock, parse_timestamp
from tightship.kube.cluster import Cluster
from tightship.kube.events import Events, turns
from tightship.kube.store import Store
from tightship.manifests import naming

if TYPE_CHECKING:
    from tightship.reconcile.queue import Queue
    from tightship.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Settings:
    """What the operator is told by flags and environment; `operator_main` reads them.

    `operator_namespace`: where holders run. `operator_image`: the image of init containers and holders.
    `image_pull_policy`: for containers of that image ("" leaves it to Kubernetes).
    `resync`: seconds between two unprovoked looks at every object. `max_concurrent_profiles`: profiling Jobs
    operator-wide. `retry_seconds`: how long to wait before looking again at something that no watch tells about. `status_interval`: seconds
    between two status writes of one service or pack, so that what changes meanwhile is told in one; what matters is told at once.
    `gpu_naming`: how replicas name the GPU that their pack's holder has (`manifests.naming`).
    """

    operator_namespace: str = "tightship-system"
    operator_image: str = "tightship:latest"
    image_pull_policy: str = ""
    resync: float = 300.0
    max_concurrent_profiles: int = 1
    retry_seconds: float = 15.0
    status_interval: float = 3.0
    gpu_naming: str = naming.LEGACY


@dataclass(frozen=True)
class Pass:
    """What the last placement pass saw and could not do: each service's demand, and what it found no place for.

    A service hears from it what a plan of its own would say, without anybody planning the whole cluster for it. `offers` is what services
    are accepted by: the GPU products there are, those that can't be had whole, those that are shared, and the cores of the largest node.
    `stranded` are the packs on cordoned nodes for which there is nothing elsewhere.
    """

    demands: Mapping[ServiceRef, Demand] = field(default_factory=dict)
    shortfalls: Mapping[ServiceRef, Shortfall] = field(default_factory=dict)
    offers: tuple[Any, ...] = ()
    stranded: frozenset[str] = frozenset()

    def knows(self, demand: Demand) -> bool:
        """Whether the pass went by this very demand, so that what it says of the service still holds."""
        return self.demands.get(demand.service) == demand


@dataclass
class Context:
    """The ports of one operator process.

    `placed` is what the last placement pass found; nobody but it writes there. `starting` is held while a profiling Job is started, so that
    two profiles don't take the last free slot together; `changing` while replicas that serve are chosen and taken away, so that two packs
    don't both take the last one that may be missing.
    `absent` are the kinds of `OPTIONAL` that the cluster doesn't serve: objects of theirs are not made.
    """

    cluster: Cluster
    store: Store
    queue: Queue
    clock: Clock
    settings: Settings
    metrics: Metrics
    events: Events
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    absent: frozenset[str] = frozenset()
    placed: Pass = field(default_factory=Pass)

    def report_later(self, obj: Mapping[str, Any], status: Mapping[str, Any], *, times: float = 1.0) -> float:
        """Seconds to wait before `status` of `obj` is written, 0 when it is time: `times` the settings' `status_interval` between two writes.

        A `Ready` that turns True or False and bad news are told at once. A first status that knows nothing yet waits too, from when the object
        was made.
        """
        was, now = (tuple(each.get("conditions") or ()) for each in (obj.get("status") or {}, status))
        old, new = ((find(conditions, READY) or {}).get("status") for conditions in (was, now))
        if new not in (old, "Unknown") or any(each.warning for each in turns(was, now)):
            return 0.0
        age, made = self.cluster.status_age(obj), obj["metadata"].get("creationTimestamp")
        if age is None and old is None and made:
            age = (self.clock.now() - parse_timestamp(made)).total_seconds()
        return 0.0 if age is None else max(0.0, times * self.settings.status_interval - age)

    async def report(self, obj: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
        """Write `status` (all of it that the operator owns) of `obj` once, then emit events for what turned.

        `obj` is the object as it was gathered: its `status.conditions` are the old ones. Nothing is written, and False
        returned, when the cluster already shows exactly this status. An object deleted meanwhile is no error (False).
        """
        return await self.events.report(obj, status)
