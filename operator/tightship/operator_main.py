"""`tightship run`: the composition root of the operator, and its life from start to stop.

The order matters and is the whole of the module: first somebody to ask (telemetry), then a cluster that serves our kinds,
then the lease, then which of the kinds it lacks that it may lack, then everything there is (one listing), then workers and
watches together. What must always hold: nothing is written before the lease is held, nor later than its last renewal allows;
from the moment it is held it is kept, also while the cluster is being read; losing it stops the workers at once and ends the
process; a clean stop finishes what is begun, lets the lease go, and leaves nothing behind that the next start would have to
wait for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from tightship import handlers
from tightship.api.v1alpha1 import labels
from tightship.kube.clock import Clock, SystemClock
from tightship.kube.cluster import Cluster
from tightship.kube.errors import Forbidden, KubeError, NoCluster, NotFound, NotServed
from tightship.kube.events import Events
from tightship.kube.kinds import KINDS, OPTIONAL, WATCHED, WATCHED_BY_LABEL, WATCHED_OWN, Ref
from tightship.kube.lease import Lease, LeaseLost, LeaseTimes
from tightship.kube.store import Object, Store, lean
from tightship.kube.transport import HTTPTransport, load_configuration
from tightship.logs import LEVELS, configure_logging
from tightship.manifests.naming import LEGACY, NAMINGS
from tightship.reconcile import batchprofile, gpupack, llmservice, placement
from tightship.reconcile.context import Context, Settings
from tightship.reconcile.indexes import INDEXERS
from tightship.reconcile.queue import PLACEMENT, Key, Queue, Reconciler, Workers
from tightship.reconcile.routing import keys_for
from tightship.telemetry.metrics import Metrics
from tightship.telemetry.server import Health, TelemetryServer

log = logging.getLogger(__name__)

RECONCILERS: dict[str, Reconciler] = {
    "LLMService": llmservice.reconcile,
    "BatchProfile": batchprofile.reconcile,
    "GPUPack": gpupack.reconcile,
    "Placement": placement.reconcile,
}

_RETRY_SECONDS = 3.0
_SETTLE_SECONDS = 5.0
_DRAIN_SECONDS = 20.0


@dataclass(frozen=True)
class Options:
    """How one operator process is to run. `lease` None: without leader election. `telemetry_port` 0: any free port."""

    settings: Settings = field(default_factory=Settings)
    lease: LeaseTimes | None = field(default_factory=LeaseTimes)
    lease_name: str = "tightship-operator"
    telemetry_host: str = "0.0.0.0"
    telemetry_port: int = 8080
    workers: int = 10


class Operator:
    """One operator process, wired together."""

    def __init__(
        self,
        configuration: Configuration,
        options: Options,
        *,
        reconcilers: Mapping[str, Reconciler] | None = None,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or SystemClock()
        self._configuration = configuration
        self._options = options
        self.metrics = Metrics()
        self.health = Health()
        self.queue = Queue(clock)
        self.store = Store(self._changed, INDEXERS)
        transport = HTTPTransport(configuration)
        self.cluster = Cluster(transport, self.store, on_request=self.metrics.requested, clock=clock)
        self.context = Context(
            cluster=self.cluster,
            store=self.store,
            queue=self.queue,
            clock=clock,
            settings=options.settings,
            metrics=self.metrics,
            events=Events(self.cluster, clock),
        )
        self.telemetry = TelemetryServer(
            self.health, self.metrics, host=options.telemetry_host, port=options.telemetry_port
        )
        self._clock = clock
        self._workers = Workers(self.context, reconcilers or RECONCILERS, count=options.workers)
        self._relisted: set[str] = set()
        self._relisting = asyncio.Event()
        self._rng = random.Random()
        self.metrics.gauge("queue_depth", "Keys that wait for a worker.", lambda: float(len(self.queue)))
        self.metrics.gauge("queue_active", "Keys being worked on.", lambda: float(self.queue.active))

    async def run(self, stop: asyncio.Event) -> int:
        """Run until `stop` is set. Returns the exit status: 0 after a clean stop, 1 when the lease or a part was lost."""
        await self.telemetry.start()
        log.info("telemetry on http://%s:%d", self._options.telemetry_host, self.telemetry.port)
        lease, keeping = self._lease(), None
        try:
            if not await _unless(stop, self._prepare(lease)):
                return 0
            keeping = None if lease is None else self._spawn(lease.keep())
            if not await _unless(stop, _while_going(keeping, self._look_around())):
                return 0
            return await self._work(keeping, stop)
        except LeaseLost as lost:  # while the cluster was being read
            self.health.problem = str(lost)
            log.error("stopping: %s", lost)
            return 1
        finally:
            if keeping is not None:
                await _cancel(keeping)
            if lease is not None:
                await lease.release()
            await self.telemetry.stop()
            await self.cluster.close()

    def _lease(self) -> Lease | None:
        if self._options.lease is None:
            return None
        ref = Ref("Lease", self._options.settings.operator_namespace, self._options.lease_name)
        identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        return Lease(self.cluster, self._clock, ref, identity, self._options.lease, on_trouble=self._lease_trouble)

    def _lease_trouble(self, trouble: str | None) -> None:
        # Standing by behind another leader is no trouble: it is what a second replica is for.
        self.health.waiting = trouble

    async def _prepare(self, lease: Lease | None) -> None:
        await self._await_cluster()
        if lease is not None:
            self.cluster.guard_writes(lease.check)
            await lease.acquire()
        self.metrics.leading(True)
        self.health.waiting = "reading the cluster"

    async def _look_around(self) -> None:
        """What the cluster lacks, and all that it has of the rest."""
        self.context.absent = await self._absent()
        await self._read_everything()

    async def _await_cluster(self) -> None:
        """Wait for an API server that answers and serves our kinds, saying what is missing when that changes."""
        while (trouble := await self._missing()) is not None:
            if trouble != self.health.waiting:
                log.warning("waiting: %s", trouble)
            self.health.waiting = trouble
            await self._clock.sleep(_RETRY_SECONDS)

    async def _missing(self) -> str | None:
        try:
            for name in WATCHED_OWN:
                await self.cluster.list(name, limit=1)
        except (NotFound, NotServed):
            names = ", ".join(f"{KINDS[name].plural}.{labels.GROUP}" for name in WATCHED_OWN)
            return (
                f"this cluster doesn't serve {labels.API_VERSION} ({names}): install the CustomResourceDefinitions "
                f"(the Helm chart's crds.install, or kubectl apply -f crds/)"
            )
        except Forbidden as error:
            return f"the operator's service account lacks rights: {error}"
        except KubeError as error:
            return str(error)
        return None

    async def _absent(self) -> frozenset[str]:
        """The optional kinds that this cluster lacks, each told once. Asked after the lease: a standby may have waited for long."""
        missing = []
        for name, then in OPTIONAL.items():
            while (served := await self._serves(name)) is None:
                await self._clock.sleep(_RETRY_SECONDS)
            if not served:
                log.info("this cluster doesn't serve %s (%s): %s", KINDS[name].api_version, name, then)
                missing.append(name)
        return frozenset(missing)

    async def _serves(self, name: str) -> bool | None:
        """Whether the cluster has a kind and lets us read it; None while it can't be asked."""
        try:
            if not await self.cluster.serves(name):
                return False
            await self.cluster.list(name, selector=WATCHED_BY_LABEL.get(name, ""))
        except Forbidden as error:
            log.warning("%s", error)
            return False
        except KubeError as error:
            self.health.waiting = str(error)
            log.warning("waiting: %s", error)
            return None
        return True

    @property
    def _watched(self) -> tuple[str, ...]:
        return tuple(name for name in WATCHED if name not in self.context.absent)

    async def _work(self, keeping: asyncio.Task[None] | None, stop: asyncio.Event) -> int:
        """Run workers, watches and resync beside the lease until one ends or `stop` is set."""
        kopf_stop = asyncio.Event()
        self.queue.add(PLACEMENT)
        workers = asyncio.create_task(self._workers.run(), name="workers")
        parts: dict[str, asyncio.Task[Any]] = {
            "resync": self._spawn(self._resync()),
            "relist": self._spawn(self._relist()),
        }
        if keeping is not None:
            parts["lease"] = keeping
        stopping = self._spawn(stop.wait())
        # Last: when kopf ends it cancels every task that was made after it.
        parts["kopf"] = self._spawn(self._watch(kopf_stop, stop))
        self.health.waiting = None
        await asyncio.wait({stopping, workers, *parts.values()}, return_when=asyncio.FIRST_COMPLETED)
        lost = self._what_ended(parts, workers)
        self.health.waiting = "stopping"
        self.metrics.leading(False)
        self.queue.close()
        if lost is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(workers, _DRAIN_SECONDS)
        else:
            self.health.problem = lost
            log.error("stopping: %s", lost)
        await _cancel(workers, stopping, *(task for name, task in parts.items() if name != "kopf"))
        await self.telemetry.stop()
        kopf_stop.set()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(parts["kopf"], _DRAIN_SECONDS if lost is None else _RETRY_SECONDS)
        return 0 if lost is None else 1

    @staticmethod
    def _spawn(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.create_task(coroutine)

    @staticmethod
    def _what_ended(parts: Mapping[str, asyncio.Task[Any]], workers: asyncio.Task[None]) -> str | None:
        """Why the operator can't go on; None when it was asked to stop."""
        for name, task in {**parts, "workers": workers}.items():
            if not task.done() or task.cancelled():
                continue
            error = task.exception()
            if isinstance(error, LeaseLost):
                return str(error)
            if error is not None:
                log.error("%s ended", name, exc_info=error)
                return f"{name} failed: {error}"
        return None

    async def _watch(self, kopf_stop: asyncio.Event, stop: asyncio.Event) -> None:
        registry = kopf.OperatorRegistry()
        handlers.register(registry, self._configuration, self._feed, self._watched)
        ready = asyncio.Event()
        restore = asyncio.create_task(_signals_after(ready, stop))
        try:
            await kopf.operator(
                registry=registry,
                settings=handlers.settings(),
                clusterwide=True,
                stop_flag=kopf_stop,
                ready_flag=ready,
            )
        finally:
            restore.cancel()

    def _feed(self, event: str | None, obj: dict[str, Any]) -> None:
        self.metrics.watched(obj["kind"], event or "LISTED")
        if event == "DELETED":
            self.store.forget(obj, obj["metadata"].get("resourceVersion"))
            return
        if event is None:
            # A listing inside a watch means that events may have been missed, deletions among them.
            self._relisted.add(obj["kind"])
            self._relisting.set()
        self.store.observe(lean(obj))

    def _changed(self, kind: str, before: Object | None, after: Object | None) -> None:
        for key in keys_for(self.store, kind, before, after):
            self.queue.add(key)

    async def _relist(self) -> None:
        """After kopf listed a kind, list it once more ourselves: its watch doesn't tell what vanished meanwhile."""
        while True:
            await self._relisting.wait()
            await self._clock.sleep(1.0)
            self._relisting.clear()
            kinds, self._relisted = sorted(self._relisted), set()
            await self._list(kinds)

    async def _resync(self) -> None:
        # What vanished between our first listing and the beginning of kopf's watches is told by nobody.
        await self._clock.sleep(_SETTLE_SECONDS)
        await self._list(self._watched)
        while True:
            await self._clock.sleep(self._options.settings.resync * self._rng.uniform(0.9, 1.0))
            await self._list(self._watched)
            spread = min(30.0, self._options.settings.resync / 10)
            for kind in WATCHED_OWN:
                for obj in self.store.list(kind):
                    metadata = obj["metadata"]
                    key = Key(kind, metadata.get("namespace", ""), metadata["name"])
                    self.queue.add_after(key, self._rng.uniform(0, spread))
            self.queue.add_after(PLACEMENT, self._rng.uniform(0, spread))

    async def _read_everything(self) -> None:
        """List every watched kind before anybody acts: on half a picture a reconciler would make what is there already."""
        unread = list(self._watched)
        while unread := await self._list(unread):
            self.health.waiting = f"can't read {', '.join(unread)}"
            await self._clock.sleep(_RETRY_SECONDS)

    async def _list(self, kinds: Iterable[str]) -> list[str]:
        """Bring the store up to date with what the server has, kind by kind. Returns the kinds that failed."""
        failed = []
        for kind in kinds:
            try:
                listing = await self.cluster.list(kind, selector=WATCHED_BY_LABEL.get(kind, ""))
            except KubeError as error:
                log.warning("listing failed: %s", error)
                failed.append(kind)
            else:
                self.store.replace(kind, listing.items, listing.resource_version)
        return failed


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, unless `stop` is set before it is done. Returns whether it was done; its error is raised."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    done = task.done()
    await _cancel(stopping, *(() if done else (task,)))
    if done:
        task.result()
    return done


async def _while_going(other: asyncio.Task[None] | None, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, unless `other`, which never ends by itself, fails before: its error is raised then."""
    if other is None:
        return await work
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        (other if other.done() else task).result()
    finally:
        await _cancel(task)
    return None


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)


async def _signals_after(ready: asyncio.Event, stop: asyncio.Event) -> None:
    """kopf takes SIGINT and SIGTERM for itself when it starts; a clean stop needs them back."""
    await ready.wait()
    with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: nobody sends signals there
        _stop_on_signals(stop)


def add_parser(subparsers: Any) -> None:
    """Add `tightship run` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run the operator",
        description="Runs the operator until SIGTERM or SIGINT. Each option can also be set by the environment variable in "
        "brackets. Exit status: 0 after a clean stop, 1 when the lease or the watches were lost, 2 when it can't start.",
    )

    def option(flag: str, text: str, default: Any, read: Callable[[str], Any] = str, metavar: str = "TEXT") -> None:
        variable = "TIGHTSHIP_" + flag.removeprefix("--").replace("-", "_").upper()
        shown = f"; default {default}" if default else ""
        # argparse passes a default that is a text through `read`, so the environment is checked like the command line.
        given = os.environ.get(variable) or default
        parser.add_argument(flag, default=given, help=f"{text} [{variable}{shown}]", type=read, metavar=metavar)

    switch, levels, styles = _one_of("true", "false"), _one_of(*LEVELS), _one_of("json", "plain")
    option("--kubeconfig", "kubeconfig; without it the pod's service account, or $KUBECONFIG, or ~/.kube/config", None)
    option("--context", "context of the kubeconfig", None)
    option("--namespace", "the operator's own namespace: its lease, and the holder pods", _own_namespace())
    option("--image", "image of the operator, for init containers and holder pods", "tightship:latest")
    option("--image-pull-policy", "pull policy of that image: Always, IfNotPresent or Never", "")
    option("--resync", "time between two unprovoked looks at every object", 300.0, _positive, "SECONDS")
    option("--max-concurrent-profiles", "profiling Jobs at the same time, in the whole cluster", 1, _count, "N")
    option("--workers", "objects looked at at the same time", 10, _count, "N")
    option(
        "--status-interval",
        "least time between two status writes of a service or pack, but when Ready turns",
        3.0,
        _positive,
        "SECONDS",
    )
    option(
        "--gpu-naming",
        "how replicas name the GPU that a holder has: legacy (the toolkit's legacy and auto modes), cdi (its CDI mode) or "
        "nri (the GPU operator's NRI plugin); a change restarts the replicas, one by one",
        LEGACY,
        _one_of(*NAMINGS),
        "WAY",
    )
    option("--leader-elect", "hold a Lease before doing anything: true or false", "true", switch, "BOOL")
    option("--lease-name", "name of the Lease", "tightship-operator")
    option("--lease-duration", "how long an unrenewed lease holds", 15.0, _positive, "SECONDS")
    option("--lease-renew-deadline", "when a leader that can't renew gives up", 10.0, _positive, "SECONDS")
    option("--lease-retry", "time between two attempts at the lease", 2.0, _positive, "SECONDS")
    option("--telemetry-host", "address of /healthz, /readyz and /metrics", "0.0.0.0")
    option("--telemetry-port", "their port; 0 takes a free one", 8080, int, "PORT")
    option("--log-level", "debug, info, warning or error", "info", levels, "LEVEL")
    option("--log-format", "json or plain", "plain", styles, "FORMAT")


def options(args: argparse.Namespace) -> Options:
    """The options that the command line asks for. Raises ValueError when lease times contradict each other."""
    lease = LeaseTimes(args.lease_duration, args.lease_renew_deadline, args.lease_retry)
    return Options(
        settings=Settings(
            operator_namespace=args.namespace,
            operator_image=args.image,
            image_pull_policy=args.image_pull_policy,
            resync=args.resync,
            max_concurrent_profiles=args.max_concurrent_profiles,
            status_interval=args.status_interval,
            gpu_naming=args.gpu_naming,
        ),
        lease=lease if args.leader_elect == "true" else None,
        lease_name=args.lease_name,
        telemetry_host=args.telemetry_host,
        telemetry_port=args.telemetry_port,
        workers=args.workers,
    )


def run(args: argparse.Namespace) -> int:
    """Run the operator; returns the exit status."""
    configure_logging(args.log_level, args.log_format)
    try:
        return asyncio.run(_run(args))
    except (NoCluster, ValueError, OSError) as error:
        log.error("%s", error)
        return 2


async def _run(args: argparse.Namespace) -> int:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    chosen = options(args)
    configuration = await load_configuration(args.kubeconfig, args.context)
    return await Operator(configuration, chosen).run(stop)


def _own_namespace() -> str:
    """The namespace of the pod this runs in, else the one the chart proposes."""
    with contextlib.suppress(OSError), open("/var/run/secrets/kubernetes.io/serviceaccount/namespace") as file:
        return file.read().strip()
    return "tightship-system"


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return read


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} isn't a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} isn't a whole number above 0")
    return value
