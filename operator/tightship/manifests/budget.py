"""The PodDisruptionBudget of a service: how many of its replicas evictions may take at a time.

It says what `Available` says, in Kubernetes' words: both go by `spec.rollout.maxUnavailable`, and a percentage is rounded up on both
sides. It selects what the Service selects, replicas on whatever packs, and never a holder, which is in another namespace.

It is there as long as the service is, also at no replicas: it then selects nothing and stops nobody, and scaling to zero and back
writes nothing. A service of one replica has a budget that lets that one go: one that didn't would stop every drain of its node for ever.
`unhealthyPodEvictionPolicy` is left out, because server-side apply of a field that a server doesn't know fails, and 1.25 doesn't.
"""

from __future__ import annotations

from typing import Any

from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests.service import front_metadata, replica_selector


def disruption_budget(service: LLMService) -> dict[str, Any]:
    """The PodDisruptionBudget (policy/v1) of an LLMService, under its name and owned by it."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": front_metadata(service),
        "spec": {
            "maxUnavailable": service.spec.rollout.max_unavailable,
            "selector": {"matchLabels": replica_selector(service)},
        },
    }
