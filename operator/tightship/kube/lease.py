"""One leader at a time: a Lease (coordination.k8s.io/v1) that the leader keeps renewing.

The rules are those of Kubernetes' own components. A candidate takes the lease when nobody holds it, when its holder let it
go, or when it has seen no change of it for the lease's duration on its *own* clock (clocks of different machines are never
compared). Every write carries the resourceVersion that was read, so of two candidates one loses. A leader that couldn't
renew for `renew_deadline`, which is shorter than the duration, considers itself deposed before anybody else can lead.
A clean stop lets the lease go, so that the next start doesn't wait.

A leader that was stopped for a while (a debugger, a frozen container, a starved machine) goes on where it was, in the middle of anything.
So each write asks `check` right before it goes out: the time is counted from before the last renewal was *sent*, since others count
from when they saw it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tightship.kube.clock import Clock
from tightship.kube.cluster import Cluster
from tightship.kube.errors import AlreadyExists, Conflict, KubeError, NotFound
from tightship.kube.kinds import Ref

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds: how long a lease holds unrenewed, how long a leader tries to renew, and how often it does."""

    duration: float = 15.0
    renew_deadline: float = 10.0
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.renew_deadline < self.duration:
            raise ValueError(
                f"lease times must grow: retry {self.retry:g} s < renew deadline {self.renew_deadline:g} s "
                f"< duration {self.duration:g} s"
            )


class LeaseLost(KubeError):
    """The lease couldn't be renewed in time, or somebody else holds it. The process must end."""


class Lease:
    """One candidate for one Lease.

    `identity` must be unique among all candidates. `on_trouble` is told what keeps the candidate from the lease, and None
    when nothing does but another holder.
    """

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        ref: Ref,
        identity: str,
        times: LeaseTimes,
        *,
        on_trouble: Callable[[str | None], None] | None = None,
    ) -> None:
        self._on_trouble = on_trouble or (lambda trouble: None)
        self._cluster, self._clock = cluster, clock
        self._ref, self._identity, self._times = ref, identity, times
        self._held: dict[str, Any] | None = None
        self._renewed = 0.0  # on the own clock, before the write that took or renewed it was sent
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0
        self._told = ""

    async def acquire(self) -> None:
        """Wait until this candidate holds the lease. Trouble with the API is logged and tried again."""
        while not await self._try():
            await self._clock.sleep(self._times.retry)
        log.info("holding lease %s as %s", self._ref, self._identity)

    def check(self) -> float:
        """Seconds for which this candidate may still write, counted from its last renewal.

        Raises `LeaseLost` unless it holds the lease and renewed it within the renew deadline.
        """
        if self._held is None:
            raise LeaseLost(f"lease {self._ref} is not held: nothing is written without it")
        silent = self._clock.monotonic() - self._renewed
        if silent >= self._times.renew_deadline:
            raise LeaseLost(
                f"lease {self._ref} was last renewed {silent:.1f} s ago, more than the {self._times.renew_deadline:g} s that a leader "
                "may write without: another one may lead by now"
            )
        return self._times.renew_deadline - silent

    async def keep(self) -> None:
        """Renew for ever. Raises `LeaseLost`."""
        while True:
            await self._clock.sleep(self._times.retry)
            left = self._renewed + self._times.renew_deadline - self._clock.monotonic()
            try:
                if left > 0:
                    await asyncio.wait_for(self._renew(), left)
                    continue
            except (KubeError, asyncio.TimeoutError) as error:
                if isinstance(error, LeaseLost):
                    raise
                log.warning("lease %s was not renewed: %s", self._ref, error or "no answer in time")
            if self._clock.monotonic() - self._renewed >= self._times.renew_deadline:
                raise LeaseLost(f"lease {self._ref} could not be renewed for {self._times.renew_deadline:g} seconds")

    async def release(self) -> None:
        """Let go, so that another candidate can lead at once. Best effort."""
        held, self._held = self._held, None
        if held is None:
            return
        spec = {**held["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": self._now()}
        with contextlib.suppress(KubeError, asyncio.TimeoutError):
            await asyncio.wait_for(self._cluster.replace({**held, "spec": spec}), self._times.retry)
            log.info("let lease %s go", self._ref)

    async def _try(self) -> bool:
        try:
            lease = await self._cluster.get(self._ref)
            if not self._free(lease.get("spec") or {}):
                return False
            await self._hold(self._cluster.replace({**lease, "spec": self._spec(lease.get("spec") or {})}))
        except NotFound:
            return await self._create()
        except Conflict:
            return False
        except KubeError as error:
            return self._trouble(f"lease {self._ref} can't be taken: {error}")
        return True

    async def _create(self) -> bool:
        metadata = {"name": self._ref.name, "namespace": self._ref.namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": self._spec({})}
        try:
            await self._hold(self._cluster.create(body))
        except AlreadyExists:
            return False
        except NotFound as error:
            return self._trouble(f"no lease: does namespace {self._ref.namespace} exist? ({error})")
        except KubeError as error:
            return self._trouble(f"lease {self._ref} can't be made: {error}")
        return True

    def _free(self, spec: Mapping[str, Any]) -> bool:
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        seen = (holder, str(spec.get("renewTime")))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock.monotonic()
        duration = float(spec.get("leaseDurationSeconds") or self._times.duration)
        self._tell(f"standing by: lease {self._ref} is held by {holder}")
        self._on_trouble(None)
        return self._clock.monotonic() - self._seen_at >= duration

    async def _renew(self) -> None:
        if self._held is None:
            raise LeaseLost(f"lease {self._ref} is not held")
        spec = {**self._held["spec"], "renewTime": self._now()}
        try:
            await self._hold(self._cluster.replace({**self._held, "spec": spec}))
        except (Conflict, NotFound):
            await self._settle()

    async def _settle(self) -> None:
        """Our version is out of date: somebody took the lease, deleted it, or only touched it."""
        try:
            lease = await self._cluster.get(self._ref)
        except NotFound as error:
            raise LeaseLost(f"lease {self._ref} was deleted") from error
        holder = (lease.get("spec") or {}).get("holderIdentity")
        if holder != self._identity:
            self._held = None
            raise LeaseLost(f"lease {self._ref} is held by {holder or 'nobody'} now")
        await self._hold(self._cluster.replace({**lease, "spec": {**lease["spec"], "renewTime": self._now()}}))

    async def _hold(self, write: Awaitable[dict[str, Any]]) -> None:
        """Take or renew the lease by a write; what it was sent at is what counts."""
        sent = self._clock.monotonic()
        self._held = await write
        self._renewed = sent

    def _spec(self, old: Mapping[str, Any]) -> dict[str, Any]:
        changed = old.get("holderIdentity") != self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._times.duration)),
            "acquireTime": self._now() if changed else old.get("acquireTime") or self._now(),
            "renewTime": self._now(),
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (1 if changed and old else 0),
        }

    def _now(self) -> str:
        return micro_time(self._clock.now())

    def _trouble(self, text: str) -> bool:
        self._tell(text)
        self._on_trouble(text)
        return False

    def _tell(self, text: str) -> None:
        if text != self._told:
            log.info("%s", text)
            self._told = text


def micro_time(moment: datetime) -> str:
    """A moment as `metav1.MicroTime`."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
