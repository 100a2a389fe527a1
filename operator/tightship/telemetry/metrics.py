"""The operator's own Prometheus metrics.

Names start with `tightship_operator_`; counters and histograms are about what the operator does, gauges are read at scrape
time from what it knows. Each process has its own registry, so that tests can have several.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics of one operator process, in `registry`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = Counter(
            "tightship_operator_api_requests",
            "Requests to the Kubernetes API by verb, kind and HTTP status (0: no answer).",
            ("verb", "kind", "code"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "tightship_operator_api_request_seconds",
            "Duration of requests to the Kubernetes API.",
            ("verb",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._reconciles = Counter(
            "tightship_operator_reconciles",
            "Reconciles by kind and outcome (ok, error).",
            ("kind", "outcome"),
            registry=self.registry,
        )
        self._reconcile_seconds = Histogram(
            "tightship_operator_reconcile_seconds",
            "Duration of reconciles.",
            ("kind",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._watch_events = Counter(
            "tightship_operator_watch_events",
            "Watch events by kind and type (LISTED, ADDED, MODIFIED, DELETED).",
            ("kind", "type"),
            registry=self.registry,
        )
        self._leader = Gauge(
            "tightship_operator_leader", "1 while this process holds the lease.", registry=self.registry
        )

    def requested(self, verb: str, kind: str, status: int, seconds: float) -> None:
        """Count one API request; `status` 0 means that no answer came."""
        self._requests.labels(verb, kind, str(status)).inc()
        self._request_seconds.labels(verb).observe(seconds)

    def reconciled(self, kind: str, outcome: str, seconds: float) -> None:
        """Count one reconcile; `outcome` is ok or error."""
        self._reconciles.labels(kind, outcome).inc()
        self._reconcile_seconds.labels(kind).observe(seconds)

    def watched(self, kind: str, event: str) -> None:
        """Count one watch event."""
        self._watch_events.labels(kind, event).inc()

    def leading(self, leads: bool) -> None:
        """Say whether this process holds the lease."""
        self._leader.set(1 if leads else 0)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge `tightship_operator_<name>` that calls `read` at each scrape."""
        Gauge(f"tightship_operator_{name}", text, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
