"""Whether a namespace takes the pods of a pack: asked by a dry run, before anything is made for them.

A namespace that refuses a pod (PodSecurity, a policy's webhook, a LimitRange, a quota) still takes the StatefulSet whose pods it
refuses; the refusal then hides in events. A pod sent with `dryRun=All` goes through all of admission and is not stored.

What must always hold: the question is put only when a holder or a StatefulSet is to be made, when a template is to change, or when
pods have been missing for a while, so that a pack at rest costs no request; the answer is quoted in the server's words, with what
to do about it; a server that cannot tell (a webhook that knows no dry run) refuses nothing.
"""

from __future__ import annotations

import logging
from datetime import datetime

from tightship.api.v1alpha1 import conditions as names
from tightship.core.conditions import find
from tightship.kube.clock import parse_timestamp
from tightship.kube.cluster import Cluster
from tightship.kube.errors import AlreadyExists, Forbidden, Invalid, NamespaceTerminating
from tightship.kube.store import Object
from tightship.reconcile.packview import View

log = logging.getLogger(__name__)

MISSING_SECONDS = 10.0
"""Pods that are missing for so long are not just about to be made: a StatefulSet's controller makes them within a second or two."""

_QUOTA_USED_UP = "exceeded quota"


async def refusal(cluster: Cluster, pod: Object, *, replaces: bool = False) -> str | None:
    """Why the API server would not take `pod`, in its own words and with the next step; None when it would.

    `replaces`: the pod takes the place of one that is there, whose share of a quota comes free first, so a quota that is used up
    is no refusal. Raises `NamespaceTerminating`, and what every request raises (see `Cluster`).
    """
    try:
        await cluster.dry_run(pod)
    except AlreadyExists:
        return None  # admission comes before the look at the name
    except NamespaceTerminating:
        raise
    except (Forbidden, Invalid) as error:
        if error.status == 401:
            raise
        if "does not support dry run" in error.message:
            log.info("no dry run of pod %s: %s", pod["metadata"]["name"], error.message)
            return None
        if replaces and _QUOTA_USED_UP in error.message:
            return None
        return f"{error.message.rstrip('.')}. {_advice(error.message, pod['metadata']['namespace'])}"
    return None


def _advice(words: str, namespace: str) -> str:
    if "PodSecurity" in words:
        label = f"kubectl label --overwrite namespace {namespace} pod-security.kubernetes.io/enforce=privileged"
        return f"Sharing needs host paths, which only level privileged allows: {label}"
    if "cannot create resource" in words:
        return "Grant the operator's service account `create` on pods, as the chart does: it asks by a dry run first"
    if "quota" in words:
        return f"Raise that quota of namespace {namespace}, free what counts against it, or lower spec.replicas"
    return (
        f"Change what refuses it in namespace {namespace} (a policy, a LimitRange, a missing object), or spec.template"
    )


def missing(view: View, live: Object) -> list[int]:
    """Ordinals of a StatefulSet's pods that are not there at all.

    The StatefulSet's status is no help: its controller doesn't write one as long as it can't make a pod.
    """
    there = {str(pod["metadata"]["name"]) for pod in view.pods}
    name, count = live["metadata"]["name"], int(live["spec"].get("replicas", 1))
    return [ordinal for ordinal in range(count) if f"{name}-{ordinal}" not in there]


def patience(view: View, now: datetime) -> float:
    """Seconds until pods that are missing now are worth a question; 0 or less when they are.

    The pack's own `ReplicasReady` tells since when it lacks something; that this may have been another pod at first costs a
    question too many at most.
    """
    condition = find((view.obj.get("status") or {}).get("conditions") or (), names.REPLICAS_READY)
    if condition is None or condition["status"] != "False" or not condition.get("lastTransitionTime"):
        return MISSING_SECONDS
    return MISSING_SECONDS - (now - parse_timestamp(condition["lastTransitionTime"])).total_seconds()
