"""What every reconciler is given: its eyes, its hands, its clock, and one way to report.

A reconciler reads from `store` (the watch cache, which also shows its own writes at once), writes through `cluster`,
asks `clock` for the time, and ends with one `report`. It keeps nothing between two calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tightship.kube.clock import Clock
from tightship.kube.cluster import Cluster
from tightship.kube.events import Events
from tightship.kube.store import Store

if TYPE_CHECKING:
    from tightship.reconcile.queue import Queue
    from tightship.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Settings:
    """What the operator is told by flags and environment; `operator_main` reads them.

    `operator_namespace`: where holders run. `operator_image`: the image of init containers and holders.
    `image_pull_policy`: for containers of that image ("" leaves it to Kubernetes).
    `resync`: seconds between two unprovoked looks at every object. `max_concurrent_profiles`: profiling Jobs
    operator-wide. `retry_seconds`: how long to wait before looking again at something that no watch tells about.
    """

    operator_namespace: str = "tightship-system"
    operator_image: str = "tightship:latest"
    image_pull_policy: str = ""
    resync: float = 300.0
    max_concurrent_profiles: int = 1
    retry_seconds: float = 15.0


@dataclass
class Context:
    """The ports of one operator process.

    `starting` is held while a profiling Job is started, so that two profiles don't take the last free slot together; `changing` while
    replicas that serve are chosen and taken away, so that two packs don't both take the last one that may be missing.
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

    async def report(self, obj: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
        """Write `status` (all of it that the operator owns) of `obj` once, then emit events for what turned.

        `obj` is the object as it was gathered: its `status.conditions` are the old ones. Nothing is written, and False
        returned, when the cluster already shows exactly this status. An object deleted meanwhile is no error (False).
        """
        return await self.events.report(obj, status)
