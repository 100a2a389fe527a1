"""The Service in front of a service's replicas: one stable address, OpenAI-compatible, over whatever packs there are."""

from __future__ import annotations

from typing import Any

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests.podparts import owned_metadata

PORT = 80


def replica_selector(service: LLMService) -> dict[str, str]:
    """Labels that all replica pods of a service have, and nothing else has."""
    return {
        labels.INSTANCE: service.metadata.name,
        labels.COMPONENT: labels.COMPONENT_REPLICA,
        labels.SERVICE: service.metadata.name,
    }


def front_metadata(service: LLMService) -> dict[str, Any]:
    """Metadata of what stands in front of a service's replicas, or guards them: under its name, and owned by it."""
    name = service.metadata.name
    made = labels.common(name, labels.COMPONENT_SERVICE, {labels.SERVICE: name})
    return owned_metadata(name, service.metadata.namespace, made, service)


def selector_text(service: LLMService) -> str:
    """The same as the text that the scale subresource shows."""
    return ",".join(f"{key}={value}" for key, value in sorted(replica_selector(service).items()))


def url(service: LLMService) -> str:
    """Address of the OpenAI-compatible API inside the cluster."""
    return f"http://{service.metadata.name}.{service.metadata.namespace}.svc/v1"


def service_object(service: LLMService) -> dict[str, Any]:
    """The ClusterIP Service of an LLMService, owned by it; port 80 leads to the engines' port `http`."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": front_metadata(service),
        "spec": {
            "type": "ClusterIP",
            "selector": replica_selector(service),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }
