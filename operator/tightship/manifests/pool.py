"""The InferencePool of a service: its replicas, for gateways that choose one for each request.

The Gateway API Inference Extension (inference.networking.k8s.io/v1) lets a gateway ask an endpoint picker, which reads vLLM's metrics,
where a request should go. The pool says which pods there are; an HTTPRoute of the user's leads to it. It stands beside the
Service, never in its place: what talks to the Service goes on, and a cluster without gateways loses nothing.
"""

from __future__ import annotations

from typing import Any

from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests.replicas import PORT
from tightship.manifests.service import front_metadata, replica_selector


def inference_pool(service: LLMService) -> dict[str, Any] | None:
    """The InferencePool of an LLMService, under its name and owned by it; None where it asks for none."""
    routing = service.spec.routing
    picker = routing.endpoint_picker
    if routing.mode != "InferencePool" or picker is None:
        return None
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": front_metadata(service),
        "spec": {
            "selector": {"matchLabels": replica_selector(service)},
            "targetPorts": [{"number": PORT}],
            "endpointPickerRef": {
                "name": picker.name,
                "port": {"number": picker.port},
                "failureMode": picker.failure_mode,
            },
        },
    }
