"""Strict validation of whole objects, offline: ours by the generated CRDs, Kubernetes' own by its published schemas.

Strict means that a field that the schema lacks is an error. Kubernetes' schemas are those of the package kubernetes-validate: the
newest there are, and 1.25, the oldest that the operator is made for, where server-side apply of an unknown field fails. Of kinds that
other projects define, the fields that we use are written down here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate

from tightship.api import crds
from tightship.api.v1alpha1 import labels

CURRENT = kubernetes_validate.latest_version()
VERSIONS = ("1.25", CURRENT)
DRA_VERSIONS = ("1.34", CURRENT)
"""Of what is made only where resource.k8s.io/v1 is served: the first version that has it, and the newest."""


def check(obj: Mapping[str, Any], version: str = CURRENT) -> None:
    """Validate one object. Raises jsonschema.ValidationError, or SchemaNotFoundError for a kind that Kubernetes lacks."""
    if obj["apiVersion"] == labels.API_VERSION:
        jsonschema.validate({**obj, "metadata": {}}, _own(obj["kind"]))
    elif obj["kind"] in _OTHERS:
        jsonschema.validate({**obj, "metadata": {}}, _OTHERS[obj["kind"]])
    else:
        kubernetes_validate.validate(dict(obj), version, strict=True)


@cache
def _own(kind: str) -> dict[str, Any]:
    by_kind = {crd["spec"]["names"]["kind"]: crd for crd in crds.definitions().values()}
    schema = by_kind[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return closed({**schema, "properties": {**schema["properties"], "metadata": {}}})


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every object closed to unknown fields, as kubectl's own validation has it."""
    out = {
        key: closed(value) if isinstance(value, dict) and key != "properties" else value
        for key, value in schema.items()
    }
    if "properties" in schema:
        out["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    return out


_NUMBER = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}
# Names and types of the fields that our sample uses, after KEDA's CustomResourceDefinition (kedacore/keda,
# config/crd/bases/keda.sh_scaledobjects.yaml) and the parameters of its Prometheus scaler (keda.sh/docs/latest/scalers/prometheus).
_SCALED_OBJECT: dict[str, Any] = closed(
    {
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "keda.sh/v1alpha1"},
            "kind": {"const": "ScaledObject"},
            "metadata": {},
            "spec": {
                "required": ["scaleTargetRef", "triggers"],
                "properties": {
                    "scaleTargetRef": {
                        "required": ["name"],
                        "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name")},
                    },
                    "minReplicaCount": {"type": "integer"},
                    "maxReplicaCount": {"type": "integer"},
                    "triggers": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "required": ["type", "metadata"],
                            "properties": {
                                "type": {"const": "prometheus"},
                                "name": {"type": "string"},
                                "metricType": {"enum": ["AverageValue", "Value"]},
                                "metadata": {
                                    "required": ["serverAddress", "query", "threshold"],
                                    "properties": {
                                        "serverAddress": {"type": "string", "pattern": "^https?://"},
                                        "query": {"type": "string"},
                                        "threshold": _NUMBER,
                                        "activationThreshold": _NUMBER,
                                    },
                                },
                            },
                        },
                    },
                    # As an HPA has it: compared with the HPA of the other sample, which Kubernetes' schema checks.
                    "advanced": {
                        "properties": {
                            "horizontalPodAutoscalerConfig": {"properties": {"behavior": {"type": "object"}}}
                        }
                    },
                },
            },
        },
    }
)

# After the Gateway API Inference Extension's types (kubernetes-sigs/gateway-api-inference-extension, api/v1/inferencepool_types.go) and its
# API reference: a picker that is a Service, as ours is by default, needs a port.
_PORT = {"required": ["number"], "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 65535}}}
_INFERENCE_POOL: dict[str, Any] = closed(
    {
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "inference.networking.k8s.io/v1"},
            "kind": {"const": "InferencePool"},
            "metadata": {},
            "spec": {
                "required": ["selector", "targetPorts", "endpointPickerRef"],
                "properties": {
                    "selector": {
                        "required": ["matchLabels"],
                        "properties": {"matchLabels": {"type": "object", "maxProperties": 64, "minProperties": 1}},
                    },
                    "targetPorts": {"type": "array", "minItems": 1, "maxItems": 1, "items": _PORT},
                    "endpointPickerRef": {
                        "required": ["name", "port"],
                        "properties": {
                            "name": {"type": "string", "minLength": 1, "maxLength": 253},
                            "port": _PORT,
                            "failureMode": {"enum": ["FailOpen", "FailClose"]},
                        },
                    },
                },
            },
        },
    }
)
_OTHERS = {"ScaledObject": _SCALED_OBJECT, "InferencePool": _INFERENCE_POOL}
