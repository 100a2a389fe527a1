"""How replicas get a GPU without a holder: by a ResourceClaim that all of a pack's replicas name, or by requesting it.

The claim (mode DRA, and Exclusive where only DRA has GPUs) is one object per pack, under the pack's name in the namespace of its replicas.
Whatever pods name it land on its node and see its GPU, and NVIDIA's driver runs the MPS daemon and mounts its pipe. What must always hold:

- one claim per pack, which asks for exactly one GPU of the pack's product, without a cap on threads or memory (the ledger has that);
- its spec says nothing that changes while the pack lives, since a claim's spec is immutable;
- replicas that share a GPU meet at the start lock in the pack's directory on the node; one that has its GPU alone needs no directory
  of the node at all, and passes PodSecurity `restricted` for our part;
- a container tells which GPU it saw by an init container's termination message, because neither the claim's status nor anything else in
  the API says what CUDA sees inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile
from tightship.api.v1alpha1.gpupack import GPUPack, GPUPackSpec
from tightship.manifests.podparts import owned_metadata

DEVICE_CLASS = labels.DRA_DRIVER
CLAIMED_DEVICE = "dra"
SHARED_DEVICE = "shared"
"""What the planner calls GPUs that claims get, and those that the device plugin shares: other ones than those it gives whole (`cuda`)."""
REQUEST = "gpu"
REPORT_CONTAINER = "report"
SHARING_VARIABLE = "TIGHTSHIP_SHARING"


def claim_name(pack: GPUPack) -> str:
    """Name of a pack's ResourceClaim, in the namespace of its replicas."""
    return pack.metadata.name


def product_of(name: str) -> str:
    """A product as a node's label has it, from the driver's name: GPU feature discovery writes dashes for spaces."""
    return name.replace(" ", "-")


def resource_claim(pack: GPUPack) -> dict[str, Any]:
    """The ResourceClaim of a pack."""
    carried = labels.common(pack.metadata.name, labels.COMPONENT_HOLDER, {labels.PACK: pack.metadata.name})
    metadata = owned_metadata(claim_name(pack), pack.spec.namespace, carried, pack)
    return _claim(metadata, pack.spec.product or "", mps=pack.spec.mode == "DRA")


def profiling_claim(job: Mapping[str, Any], profile: BatchProfile) -> dict[str, Any]:
    """The ResourceClaim of a profile's Jobs, which run one after the other: a whole GPU, on which the profiler runs its own MPS."""
    name = profiling_claim_name(profile)
    metadata = owned_metadata(name, profile.metadata.namespace, job["metadata"]["labels"], profile)
    return _claim(metadata, profile.spec.key.accelerator.product or "", mps=False)


def profiling_claim_name(profile: BatchProfile) -> str:
    """Name of the ResourceClaim of a profile's Jobs."""
    return f"{profile.metadata.name}-profiler"


def with_claim(job: Mapping[str, Any], profile: BatchProfile) -> dict[str, Any]:
    """A profiling Job that names its claim in place of requesting a GPU by the device plugin and by the node's label."""
    made = deepcopy(dict(job))
    spec = made["spec"]["template"]["spec"]
    spec["resourceClaims"] = [{"name": REQUEST, "resourceClaimName": profiling_claim_name(profile)}]
    spec.get("nodeSelector", {}).pop(labels.NODE_GPU_PRODUCT, None)
    for container in spec["containers"]:
        for amounts in ("requests", "limits"):
            container["resources"].get(amounts, {}).pop(labels.GPU_RESOURCE, None)
        container["resources"]["claims"] = [{"name": REQUEST}]
    return made


def _claim(metadata: dict[str, Any], product: str, *, mps: bool) -> dict[str, Any]:
    """A claim for one GPU of a product, shared through MPS by its driver or not."""
    product = product.replace("\\", "\\\\").replace("'", "\\'")
    selector = f"device.attributes['{labels.DRA_DRIVER}'].productName.replace(' ', '-') == '{product}'"
    devices: dict[str, Any] = {
        "requests": [
            {
                "name": REQUEST,
                "exactly": {
                    "deviceClassName": DEVICE_CLASS,
                    "allocationMode": "ExactCount",
                    "count": 1,
                    "selectors": [{"cel": {"expression": selector}}],
                },
            }
        ]
    }
    if mps:
        parameters = {"apiVersion": "resource.nvidia.com/v1beta1", "kind": "GpuConfig", "sharing": {"strategy": "MPS"}}
        devices["config"] = [{"requests": [REQUEST], "opaque": {"driver": labels.DRA_DRIVER, "parameters": parameters}}]
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": metadata,
        "spec": {"devices": devices},
    }


def pod_claims(pack: GPUPack) -> list[dict[str, Any]]:
    """`spec.resourceClaims` of a replica."""
    return [{"name": REQUEST, "resourceClaimName": claim_name(pack)}] if pack.spec.claims else []


def with_gpu(spec: GPUPackSpec, resources: Mapping[str, Any]) -> dict[str, Any]:
    """A container's resources with what gives it the pack's GPU; unchanged where a holder has it, and for a set of cores."""
    if spec.device == "cpu" or spec.has_holder:
        return dict(resources)
    if spec.claims:
        return {**resources, "claims": [{"name": REQUEST}]}
    one = {spec.resource: "1"}
    return {
        **resources,
        "requests": {**(resources.get("requests") or {}), **one},
        "limits": {**(resources.get("limits") or {}), **one},
    }


def shares_directory(spec: GPUPackSpec) -> bool:
    """Whether replicas make the pack's directory on the node themselves: it has no holder, and they have to meet there."""
    return spec.device == "cpu" or spec.mode in ("DRA", "DevicePlugin")
