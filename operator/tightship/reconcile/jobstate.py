"""What a profiling Job and its pods say about it. Pure functions over the objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tightship.kube.cluster import controller_of
from tightship.kube.store import Object
from tightship.manifests.podparts import ENGINE_CONTAINER
from tightship.reconcile import podstate


def end_of(job: Object) -> Mapping[str, Any] | None:
    """The condition with which a Job ended; None while it is active."""
    found = (job.get("status") or {}).get("conditions") or ()
    return next((each for each in found if each["type"] in ("Complete", "Failed") and each["status"] == "True"), None)


def belongs(child: Object, owner: Object) -> bool:
    """Whether an object is controlled by another one."""
    controller = controller_of(child)
    return controller is not None and bool(controller["uid"] == owner["metadata"]["uid"])


def has_begun(job: Object, pods: Iterable[Object]) -> bool:
    """Whether an engine's container ran in one of the Job's pods. Before that nothing is lost by making the Job anew."""
    return any(belongs(pod, job) and podstate.has_run(pod, ENGINE_CONTAINER) for pod in pods)
