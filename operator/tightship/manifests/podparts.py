"""Pieces that several pods share: the operator's image, node affinity, API token, injection, and the model's place.

A pod that runs the user's engine image gets Tightship's code injected, and finds the model where `model_argument` says. The
profiling Job and the replicas must agree on both, else what is measured isn't what is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from tightship.api.v1alpha1.batchprofile import BatchProfile
from tightship.api.v1alpha1.common import Metadata
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.spec import ModelSpec
from tightship.api.v1alpha1.validation import PVC_SOURCE

INJECT_CONTAINER = "inject"
ENGINE_CONTAINER = "engine"
INJECT_DIR = "/tightship"
LIBRARY = "/tightship/lib"
MODELS = "/models"
TOKEN_DIR = "/var/run/secrets/tightship"


@dataclass(frozen=True)
class OperatorImage:
    """The operator's own image, for init containers and holders; `pull_policy` "" leaves it to Kubernetes."""

    name: str
    pull_policy: str = ""

    def fields(self) -> dict[str, str]:
        """The container fields that name it."""
        return {"image": self.name} | ({"imagePullPolicy": self.pull_policy} if self.pull_policy else {})


def owner_reference(owner: LLMService | GPUPack | BatchProfile) -> dict[str, Any]:
    """The ownerReference that makes `owner` the controller, so that its objects go with it."""
    return {
        "apiVersion": owner.api_version,
        "kind": owner.kind,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def owned_metadata(
    name: str,
    namespace: str | None,
    labels: Mapping[str, str],
    owner: LLMService | GPUPack | BatchProfile,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Metadata of an object that goes with its owner."""
    made: dict[str, Any] = {"name": name, "labels": dict(labels), "ownerReferences": [owner_reference(owner)]}
    if namespace:
        made["namespace"] = namespace
    if annotations:
        made["annotations"] = dict(annotations)
    return made


def identity(metadata: Metadata) -> str:
    """`namespace/name`, or the name of a cluster-scoped object."""
    return f"{metadata.namespace}/{metadata.name}" if metadata.namespace else metadata.name


def node_affinity(
    base: Mapping[str, Any] | None,
    *,
    labels_in: Mapping[str, Sequence[str]] | None = None,
    node: str | None = None,
    not_nodes: Sequence[str] = (),
) -> dict[str, Any]:
    """The user's affinity with our requirements added to each of its alternatives.

    `node` pins by name through the scheduler, which still checks that the pod fits (spec.nodeName would not).
    """
    affinity = deepcopy(dict(base or {}))
    required = affinity.setdefault("nodeAffinity", {}).setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    expressions = [{"key": key, "operator": "In", "values": list(values)} for key, values in (labels_in or {}).items()]
    fields = [{"key": "metadata.name", "operator": "In", "values": [node]}] if node else []
    fields += [{"key": "metadata.name", "operator": "NotIn", "values": [each]} for each in not_nodes]
    if not expressions and not fields:
        return dict(base or {})
    terms = required.get("nodeSelectorTerms") or [{}]
    for term in terms:
        if expressions:
            term["matchExpressions"] = [*(term.get("matchExpressions") or []), *expressions]
        if fields:
            term["matchFields"] = [*(term.get("matchFields") or []), *fields]
    required["nodeSelectorTerms"] = terms
    return affinity


def token_volume() -> dict[str, Any]:
    """A short-lived API token with the cluster's CA beside it."""
    return {
        "name": "token",
        "projected": {
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            ]
        },
    }


def token_mount() -> dict[str, Any]:
    """Where the token appears."""
    return {"name": "token", "mountPath": TOKEN_DIR, "readOnly": True}


def inject_container(image: OperatorImage) -> dict[str, Any]:
    """The init container that copies the package into the engine's pod. Its requests equal its limits, so that a pod of
    whole cores stays Guaranteed."""
    amount = {"cpu": "100m", "memory": "128Mi"}
    return {
        "name": INJECT_CONTAINER,
        **image.fields(),
        "command": ["tightship", "inject", LIBRARY],
        "resources": {"requests": amount, "limits": amount},
        "volumeMounts": [inject_mount()],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def inject_volume() -> dict[str, Any]:
    """The emptyDir that carries the injected package."""
    return {"name": "tightship", "emptyDir": {}}


def inject_mount() -> dict[str, Any]:
    """Where it appears, in every container of the pod."""
    return {"name": "tightship", "mountPath": INJECT_DIR}


def model_argument(model: ModelSpec) -> str:
    """What the engine gets as `--model`: a name on the hub, or a path in the mounted claim."""
    claim = PVC_SOURCE.match(model.source)
    return f"{MODELS}/{claim['path']}" if claim else model.source.removeprefix("hf://")


def model_volumes(model: ModelSpec) -> list[dict[str, Any]]:
    """The volume with the model, or with the hub's cache; none where files are fetched into the container."""
    claim = PVC_SOURCE.match(model.source)
    name = claim["claim"] if claim else model.cache.pvc if model.cache else None
    return [{"name": "models", "persistentVolumeClaim": {"claimName": name}}] if name else []


def model_mounts(model: ModelSpec) -> list[dict[str, Any]]:
    """Where it appears: read-only for a model that lies there, writable for a cache."""
    if PVC_SOURCE.match(model.source):
        return [{"name": "models", "mountPath": MODELS, "readOnly": True}]
    return [{"name": "models", "mountPath": MODELS}] if model.cache else []


def model_env(model: ModelSpec) -> list[dict[str, Any]]:
    """The hub's cache directory, where there is a claim for it."""
    return [{"name": "HF_HOME", "value": MODELS}] if model.cache and not PVC_SOURCE.match(model.source) else []
