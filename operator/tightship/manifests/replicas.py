"""The StatefulSet of one service on one pack: replicas of vLLM that share a GPU, or a set of cores.

What must always hold:

- a replica of a pack with a holder is pinned to the holder's node by name, through the scheduler, requests no GPU, and is told its UUID;
- one of a pack without (`claims`) is pinned by its claim, or by nothing, requests its GPU, and reports which it saw;
- batch, KV cache and memory are the assignment's, and token budget and capture sizes are those the engine was measured with,
  all passed explicitly: a smaller batch would otherwise change the engine's own defaults;
- the pod template depends on nothing that scaling changes (replica counts least of all), so that scaling restarts nobody;
- pods start in parallel and are replaced only when somebody deletes them (OnDelete): the start lock on the node serialises
  engine starts, and the pack's reconciler decides the order of a roll-out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import ProfileEngine
from tightship.api.v1alpha1.common import Model
from tightship.api.v1alpha1.gpupack import Assignment, GPUPack
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests import claims, naming, packdir
from tightship.manifests.podparts import (
    ENGINE_CONTAINER,
    LIBRARY,
    OperatorImage,
    inject_container,
    inject_mount,
    inject_volume,
    model_argument,
    model_env,
    model_mounts,
    model_volumes,
    node_affinity,
    owned_metadata,
)
from tightship.manifests.service import replica_selector

PORT = 8000
START_SECONDS = 600
DRAIN_SECONDS = 30
GRACE_SECONDS = 60
STARTS_IN_A_ROW = 48  # of one GPU: twice what MPS takes replicas; a bound that scaling doesn't change, and that changed would restart all
PROBE_PERIOD = 5
MEMORY_VARIABLE = "TIGHTSHIP_MEMORY_BYTES"


@dataclass(frozen=True)
class Place:
    """Where a pack is: its node, and for a GPU its UUID; `memory` is the bytes of the whole GPU or CPU set.

    Node and UUID are None where the replicas themselves bring a GPU, since what they are made from must not change with it.
    """

    node: str | None
    gpu: str | None
    memory: int | None


@dataclass(frozen=True)
class Setup:
    """All that the replicas of one service on one pack are made from.

    `engine` is what the measured engine said of itself, `image` the operator's own, `naming` how replicas name the GPU of a holder.
    """

    service: LLMService
    pack: GPUPack
    assignment: Assignment
    place: Place
    engine: ProfileEngine
    image: OperatorImage
    naming: str = naming.LEGACY

    @property
    def cpu(self) -> bool:
        """Whether the pack is a set of cores."""
        return self.pack.spec.device == "cpu"

    @property
    def held(self) -> bool:
        """Whether a holder has the GPU, and runs its MPS daemon."""
        return self.pack.spec.has_holder


def set_name(service: str, pack: str) -> str:
    """Name of the StatefulSet of a service on a pack."""
    return f"{service}-{hashlib.sha256(pack.encode()).hexdigest()[:8]}"


def statefulset(setup: Setup, replicas: int) -> dict[str, Any]:
    """The StatefulSet that runs `replicas` replicas (at most what is assigned).

    Three annotations: `tightship.dev/revision` is of what the replicas are made from, `tightship.dev/template` of what came of it, so that
    an operator that makes another template of the same can be told from a change that concerns the replicas;
    `tightship.dev/service-generation` says which manifest was taken up.
    """
    service, pack = setup.service, setup.pack
    template = _pod_template(setup)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": owned_metadata(
            set_name(service.metadata.name, pack.metadata.name),
            service.metadata.namespace,
            _labels(setup),
            service,
            {
                labels.ANNOTATION_REVISION: revision(setup),
                labels.ANNOTATION_TEMPLATE: _digest(template),
                labels.ANNOTATION_GENERATION: str(service.metadata.generation or 0),
            },
        ),
        "spec": {
            "serviceName": service.metadata.name,
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": {**replica_selector(service), labels.PACK: pack.metadata.name}},
            "template": template,
        },
    }


def _labels(setup: Setup) -> dict[str, str]:
    name = setup.service.metadata.name
    extra = {labels.SERVICE: name, labels.PACK: setup.pack.metadata.name}
    return labels.common(name, labels.COMPONENT_REPLICA, extra)


def pod_of(statefulset: Mapping[str, Any], ordinal: int) -> dict[str, Any]:
    """The pod that a StatefulSet would make under an ordinal, as far as admission looks at it."""
    metadata, template = statefulset["metadata"], statefulset["spec"]["template"]
    place = {"name": f"{metadata['name']}-{ordinal}", "namespace": metadata["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], **place}, "spec": template["spec"]}


def memory_of(pod_or_template: Mapping[str, Any]) -> int:
    """Bytes that the ledger grants a replica pod; 0 where it doesn't say."""
    for container in pod_or_template["spec"].get("containers") or []:
        for variable in container.get("env") or []:
            if variable["name"] == MEMORY_VARIABLE:
                return int(variable.get("value") or 0)
    return 0


def revision(setup: Setup) -> str:
    """Hash of all that a pod template says of the service, its pack and what was decided and measured, however it says it.

    Replicas are only made anew when it changes, so what a template comes to depend on belongs in it, and the operator's image doesn't.
    What is at its default is left out: a field that a newer API adds changes nothing where nobody sets it.
    """
    service, pack, engine, spec = setup.service, setup.pack, setup.engine, setup.service.spec
    user = spec.template.spec
    if pack.spec.mode != "Exclusive":
        user = user.model_copy(update={"topology_spread_constraints": []})  # the holder's
    made_from: dict[str, Any] = {
        "service": [service.metadata.namespace, service.metadata.name],
        "model": _said(spec.model),
        "engine": _said(spec.engine),
        "template": [_said(spec.template.metadata), _said(user)],
        "pack": [
            pack.metadata.name,
            pack.metadata.uid,
            {k: v for k, v in _said(pack.spec).items() if k != "assignments"},
        ],
        "place": [setup.place.node, setup.place.gpu, *([setup.naming] if setup.naming != naming.LEGACY else [])],
        "batch": setup.assignment.batch,
        "bytes": [
            units.parse_quantity(each) for each in (setup.assignment.kv_cache, setup.assignment.memory_per_replica)
        ],
        "measured": [engine.model_commit, engine.max_num_batched_tokens, engine.capture_sizes],
    }
    if setup.cpu:
        made_from["cpu"] = [spec.accelerator.cores_per_replica, spec.packing.memory_reserve, setup.place.memory]
    return _digest(made_from)


def _said(model: Model) -> dict[str, Any]:
    """What somebody said of a part of the API, without what would be so anyway."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _pod_template(setup: Setup) -> dict[str, Any]:
    user, uuid = setup.service.spec.template.metadata, setup.place.gpu
    metadata: dict[str, Any] = {"labels": {**user.labels, **_labels(setup)}}
    named = naming.pod_annotations(setup.naming, uuid, ENGINE_CONTAINER) if uuid else {}
    if user.annotations or named:
        metadata["annotations"] = {**user.annotations, **named}
    return {"metadata": metadata, "spec": _pod_spec(setup)}


def _pod_spec(setup: Setup) -> dict[str, Any]:
    service, pack, cpu = setup.service, setup.pack, setup.cpu
    user = service.spec.template.spec
    init = [inject_container(setup.image)]
    shares_directory = claims.shares_directory(pack.spec)
    if shares_directory and pack.spec.run_as_user:
        # No holder prepares the pack's directory, and the kubelet makes it for root alone.
        init.insert(0, packdir.prepare_container(setup.image, pack.spec.run_as_user))
    if not cpu and not setup.held:
        init.append(_report_container(setup))
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": bool(user.service_account_name),
        "enableServiceLinks": False,
        "securityContext": {**(user.security_context or {}), "runAsUser": pack.spec.run_as_user},
        "affinity": _affinity(setup),
        "nodeSelector": dict(user.node_selector),
        "tolerations": [each.to_dict() for each in user.tolerations],
        "initContainers": init,
        "containers": [_engine_container(setup)],
        "volumes": [
            inject_volume(),
            *packdir.volumes(pack, create=shares_directory),
            *model_volumes(service.spec.model),
            *user.volumes,
        ],
    }
    for field, value in (
        ("imagePullSecrets", list(user.image_pull_secrets)),
        ("serviceAccountName", user.service_account_name),
        ("priorityClassName", user.priority_class_name),
        ("runtimeClassName", user.runtime_class_name),
        ("resourceClaims", claims.pod_claims(pack)),
        ("topologySpreadConstraints", _spread(setup)),
    ):
        if value:
            spec[field] = value
    return spec


def _affinity(setup: Setup) -> dict[str, Any]:
    """Where replicas may be: on the pack's node; of a GPU they request, on nodes with its product; of a claim's, where its GPU is."""
    pack, user = setup.pack, setup.service.spec.template.spec.affinity
    if setup.place.node is not None:
        return node_affinity(user, node=setup.place.node)
    product, wanted = pack.spec.product or "", {}
    if pack.spec.mode == "DevicePlugin":
        # Of a node that shares, feature discovery marks the product unless the resource has a name of its own.
        wanted = {labels.NODE_GPU_PRODUCT: [product, f"{product}-SHARED"], labels.NODE_GPU_SHARING: ["mps"]}
    elif not pack.spec.claims:
        wanted = {labels.NODE_GPU_PRODUCT: [product]}
    made = node_affinity(user, labels_in=wanted, not_nodes=pack.spec.excluded_nodes)
    if pack.spec.mode != "DevicePlugin":
        return made
    # Nothing gives two pods one GPU; that they are on one node is what can be asked for. The first of them matches itself.
    near = {
        "labelSelector": {"matchLabels": {labels.COMPONENT: labels.COMPONENT_REPLICA, labels.PACK: pack.metadata.name}},
        "topologyKey": "kubernetes.io/hostname",
    }
    pods = dict(made.get("podAffinity") or {})
    field = "requiredDuringSchedulingIgnoredDuringExecution"
    return {**made, "podAffinity": {**pods, field: [*(pods.get(field) or []), near]}}


def _spread(setup: Setup) -> list[dict[str, Any]]:
    """Of replicas that have a GPU each they are the replicas' own; those that share one can be nowhere but together."""
    if setup.pack.spec.mode != "Exclusive":
        return []
    matching = {"labelSelector": {"matchLabels": replica_selector(setup.service)}}
    return [each.to_dict() | matching for each in setup.service.spec.template.spec.topology_spread_constraints]


def _report_container(setup: Setup) -> dict[str, Any]:
    """The init container that tells which GPU the pod got, and whether through MPS, in its termination message."""
    resources = claims.with_gpu(setup.pack.spec, {"requests": {"cpu": "100m", "memory": "256Mi"}})
    return {
        "name": claims.REPORT_CONTAINER,
        "image": setup.service.spec.engine.image,
        "command": ["python3", "-m", "tightship.replica.report"],
        "env": _environment(setup),
        "resources": resources,
        "volumeMounts": [inject_mount(), *packdir.mounts(mps=False)],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _engine_container(setup: Setup) -> dict[str, Any]:
    service, cpu = setup.service, setup.cpu
    user = service.spec.template.spec.engine
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": PROBE_PERIOD, "timeoutSeconds": 5}
    return {
        "name": ENGINE_CONTAINER,
        "image": service.spec.engine.image,
        "command": ["python3", "-m", "tightship.replica", "--"],
        "args": engine_command(setup),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "env": [*(each.to_dict() for each in user.env), *_environment(setup)],
        **({"envFrom": list(user.env_from)} if user.env_from else {}),
        "resources": _cpu_resources(setup) if cpu else claims.with_gpu(setup.pack.spec, user.resources.to_dict()),
        "volumeMounts": [
            inject_mount(),
            *packdir.mounts(mps=setup.held),
            *model_mounts(service.spec.model),
            *(each.to_dict() for each in user.volume_mounts),
        ],
        # The supervisor bounds each start itself; this only must not end a wait for the start lock.
        "startupProbe": {**health, "failureThreshold": STARTS_IN_A_ROW * START_SECONDS // PROBE_PERIOD},
        "readinessProbe": {**health, "failureThreshold": 2},
        "livenessProbe": {**health, "failureThreshold": 6},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _environment(setup: Setup) -> list[dict[str, Any]]:
    def downward(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    pack, place = setup.pack, setup.place
    values = {
        "PYTHONPATH": LIBRARY,
        "TIGHTSHIP_DEVICE": pack.spec.device,
        "TIGHTSHIP_PACK_DIR": packdir.PATH,
        "TIGHTSHIP_PACK_UID": pack.metadata.uid or "",
        MEMORY_VARIABLE: str(units.parse_quantity(setup.assignment.memory_per_replica)),
        "TIGHTSHIP_START_TIMEOUT": str(START_SECONDS),
        "TIGHTSHIP_DRAIN_TIMEOUT": str(DRAIN_SECONDS),
    }
    if not setup.cpu and not setup.held:
        values[claims.SHARING_VARIABLE] = pack.spec.mode
    if place.gpu:
        values |= {"TIGHTSHIP_GPU_UUID": place.gpu, **naming.environment(setup.naming, place.gpu)}
    return [
        *({"name": name, "value": value} for name, value in values.items()),
        downward("TIGHTSHIP_POD_UID", "metadata.uid"),
        downward("TIGHTSHIP_POD_NAME", "metadata.name"),
        *(packdir.mps_env() if setup.held else []),
        *model_env(setup.service.spec.model),
    ]


def _cpu_resources(setup: Setup) -> dict[str, Any]:
    """Whole cores and memory, Guaranteed. Each replica gets its share of the reserve too: what was read is no cap."""
    service, place = setup.service, setup.place
    cores = service.spec.accelerator.cores_per_replica or 1
    memory = units.parse_quantity(setup.assignment.memory_per_replica)
    reserve = service.spec.packing.memory_reserve
    if place.memory:
        kept = place.memory * float(reserve[:-1]) / 100 if reserve.endswith("%") else units.parse_quantity(reserve)
        memory = max(memory, int(memory * place.memory / max(1.0, place.memory - kept)))
    others = service.spec.template.spec.engine.resources
    amount = {"cpu": str(cores), "memory": str(memory)}
    return {"requests": {**others.requests, **amount}, "limits": {**others.limits, **amount}}


def engine_command(setup: Setup) -> list[str]:
    """The engine's command line: the user's arguments and, after them, what was decided and measured."""
    spec, assignment, engine = setup.service.spec, setup.assignment, setup.engine
    command = ["python3", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_argument(spec.model), "--served-model-name", spec.model.name, "--port", str(PORT)]
    revision = (engine.model_commit or spec.model.revision) if spec.model.source.startswith("hf://") else None
    if revision:
        command += ["--revision", revision]
    if spec.engine.max_model_len:
        command += ["--max-model-len", str(spec.engine.max_model_len)]
    command += spec.engine.args
    command += ["--max-num-seqs", str(assignment.batch)]
    command += ["--kv-cache-memory-bytes", str(units.parse_quantity(assignment.kv_cache))]
    if engine.max_num_batched_tokens and not _given(spec.engine.args, "max-num-batched-tokens"):
        command += ["--max-num-batched-tokens", str(engine.max_num_batched_tokens)]
    if (
        engine.capture_sizes
        and not setup.cpu
        and not _given(spec.engine.args, "cudagraph", "compilation-config", "enforce-eager")
    ):
        command += ["--cudagraph-capture-sizes", *(str(size) for size in engine.capture_sizes)]
    return command


def _given(args: Sequence[str], *beginnings: str) -> bool:
    """Whether the user's arguments already say something about one of these options."""
    return any(re.sub("_", "-", each).lstrip("-").startswith(beginnings) for each in args if each.startswith("-"))
