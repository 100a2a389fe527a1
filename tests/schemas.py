"""Strict validation of whole objects, offline: ours by the generated CRDs, Kubernetes' own by its published schemas.

Strict means that a field that the schema lacks is an error. Kubernetes' schemas are those of the package kubernetes-validate: the
newest there are, and 1.25, the oldest that the operator is made for, where server-side apply of an unknown field fails.
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


def check(obj: Mapping[str, Any], version: str = CURRENT) -> None:
    """Validate one object. Raises jsonschema.ValidationError, or SchemaNotFoundError for a kind that Kubernetes lacks."""
    if obj["apiVersion"] == labels.API_VERSION:
        jsonschema.validate({**obj, "metadata": {}}, _own(obj["kind"]))
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
