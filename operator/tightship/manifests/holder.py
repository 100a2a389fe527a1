"""The holder of a GPU: a pod that requests one whole GPU, runs its MPS daemon, and says which GPU it is.

The scheduler and the device plugin give the holder a GPU as they would give it to anybody; the replicas then share that GPU
through MPS without requesting it. What must always hold:

- one holder per pack, under a name made from the pack's (two holders would take two GPUs);
- the daemon runs as the replicas' user, else MPS refuses them;
- the holder outlives its replicas: its grace period is longer than theirs, and it keeps `holder.lock` while its daemon lives;
- a holder that is made anew goes to the node the pack is on, because a pack never moves;
- topology spread constraints are the holders', since replicas have no choice of node, and count the holders of one service; a
  holder that is made anew has none, for its place was chosen before, and must not be refused because others have moved;
- evictions leave it alone while what it holds serves (`holder_budget`); whether that is so is for others to say;
- its API token may read and annotate its own pod and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.template import TemplateSpec
from tightship.manifests import packdir
from tightship.manifests.podparts import OperatorImage, node_affinity, owned_metadata, token_mount, token_volume

GRACE_SECONDS = 150
SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
MPS_CONTAINER = "mps"
WATCH_CONTAINER = "watch"
PREPARE_CONTAINER = "prepare"
_OPENER = (labels.SERVICE, labels.SERVICE_NAMESPACE)


def holder_name(pack: GPUPack) -> str:
    """Name of the holder pod of a pack, and of its ServiceAccount, Role and RoleBinding."""
    return f"holder-{pack.metadata.name}"


def holder_access(pack: GPUPack, namespace: str) -> list[dict[str, Any]]:
    """ServiceAccount, Role and RoleBinding of a holder: it may get and patch its own pod."""
    name = holder_name(pack)
    rbac = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": _metadata(pack, namespace),
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "Role",
            "metadata": _metadata(pack, namespace),
            "rules": [{"apiGroups": [""], "resources": ["pods"], "resourceNames": [name], "verbs": ["get", "patch"]}],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": _metadata(pack, namespace),
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        },
    ]


def holder_pod(
    pack: GPUPack, template: TemplateSpec, image: OperatorImage, namespace: str, node: str | None
) -> dict[str, Any]:
    """The holder pod of a pack.

    `template` gives scheduling fields, priority and runtime class (those of the service that opened the pack), `node` is where the
    pack is already (None: the scheduler chooses).
    """
    spec: dict[str, Any] = {
        "hostPID": True,
        "restartPolicy": "Always",
        "serviceAccountName": holder_name(pack),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "affinity": node_affinity(
            template.affinity,
            labels_in={labels.NODE_GPU_PRODUCT: [pack.spec.product or ""]},
            node=node,
            not_nodes=[] if node else pack.spec.excluded_nodes,
        ),
        "nodeSelector": dict(template.node_selector),
        "tolerations": [each.to_dict() for each in template.tolerations],
        "initContainers": [packdir.prepare_container(image, pack.spec.run_as_user)],
        "containers": [_mps_container(pack, image), _watch_container(pack, image)],
        "volumes": [*packdir.volumes(pack, create=True), token_volume()],
    }
    if template.topology_spread_constraints and node is None:
        matching = {"labelSelector": {"matchLabels": _family(pack)}}
        spec["topologySpreadConstraints"] = [each.to_dict() | matching for each in template.topology_spread_constraints]
    if template.priority_class_name:
        spec["priorityClassName"] = template.priority_class_name
    if template.runtime_class_name:
        spec["runtimeClassName"] = template.runtime_class_name
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(pack, namespace, {SAFE_TO_EVICT: "false"}),
        "spec": spec,
    }


def holder_budget(pack: GPUPack, namespace: str, *, protected: bool) -> dict[str, Any]:
    """The PodDisruptionBudget (policy/v1) of a holder: it may not be evicted, or it may.

    A number of pods that must be available, since the disruption controller knows no scale of a GPUPack to count missing ones from.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(pack, namespace),
        "spec": {
            "minAvailable": int(protected),
            "selector": {"matchLabels": {labels.COMPONENT: labels.COMPONENT_HOLDER, labels.PACK: pack.metadata.name}},
        },
    }


def without_account(pod: dict[str, Any]) -> dict[str, Any]:
    """A holder pod to ask admission about while its ServiceAccount isn't there yet."""
    return {**pod, "spec": {field: value for field, value in pod["spec"].items() if field != "serviceAccountName"}}


def _metadata(pack: GPUPack, namespace: str, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    made = labels.common(pack.metadata.name, labels.COMPONENT_HOLDER, {labels.PACK: pack.metadata.name})
    return owned_metadata(holder_name(pack), namespace, made | _family(pack), pack, annotations)


def _family(pack: GPUPack) -> dict[str, str]:
    """Labels that the holders of all packs have which one service opened, and no other pod of their namespace."""
    opener = {name: pack.metadata.labels[name] for name in _OPENER if name in pack.metadata.labels}
    return {labels.COMPONENT: labels.COMPONENT_HOLDER, **opener}


def _container(
    name: str, command: Sequence[str], pack: GPUPack, image: OperatorImage, env: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": name,
        **image.fields(),
        "command": ["tightship", "node", *command, "--dir", packdir.PATH],
        "env": [*packdir.mps_env(), {"name": "NVIDIA_DRIVER_CAPABILITIES", "value": "compute,utility"}, *env],
        "securityContext": {"runAsUser": pack.spec.run_as_user, "allowPrivilegeEscalation": False},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _mps_container(pack: GPUPack, image: OperatorImage) -> dict[str, Any]:
    env = [{"name": "TIGHTSHIP_PACK_UID", "value": pack.metadata.uid or ""}]
    return {
        **_container(MPS_CONTAINER, ["mps"], pack, image, env),
        "resources": {
            "requests": {"cpu": "100m", "memory": "256Mi", labels.GPU_RESOURCE: "1"},
            "limits": {labels.GPU_RESOURCE: "1"},
        },
        "volumeMounts": packdir.mounts(mps=True),
    }


def _watch_container(pack: GPUPack, image: OperatorImage) -> dict[str, Any]:
    env: list[dict[str, Any]] = [
        # The control program without any device: the daemon's container has the GPU.
        {"name": "NVIDIA_VISIBLE_DEVICES", "value": "none"},
        {"name": "TIGHTSHIP_PACK_UID", "value": pack.metadata.uid or ""},
        {"name": "TIGHTSHIP_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "TIGHTSHIP_POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
    ]
    return {
        **_container(WATCH_CONTAINER, ["watch"], pack, image, env),
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        "volumeMounts": [*packdir.mounts(mps=True), token_mount()],
    }
