"""GPUPack and BatchProfile objects: what the placement pass opens, and what a service has measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import ProfileKey
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.core import placement
from tightship.manifests.claims import CLAIMED_DEVICE

_SLUG_LIMIT = 30
_HASH_DIGITS = 10


def profile_name(key: ProfileKey) -> str:
    """`<model slug, at most 30>-<first 10 hex of the key hash>`."""
    slug = re.sub(r"[^a-z0-9]+", "-", key.model.source.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    return f"{slug[:_SLUG_LIMIT].strip('-') or 'model'}-{key.hash[:_HASH_DIGITS]}"


def batch_profile(service: LLMService, key: ProfileKey) -> dict[str, Any]:
    """The BatchProfile of a service's key: without an owner, since a measurement outlives the service that asked for it."""
    name, rerun = profile_name(key), service.spec.profiling.rerun
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": service.metadata.namespace,
        "labels": labels.common(name, labels.COMPONENT_PROFILER, {labels.PROFILE_KEY: labels.key_value(key.hash)}),
        "annotations": {labels.ANNOTATION_ASKED_BY: service.metadata.name},
    }
    how = measurement(service)
    if rerun is not None:
        how["rerun"] = rerun
        metadata["annotations"][labels.rerun_annotation(service.metadata.name)] = rerun
    return {
        "apiVersion": labels.API_VERSION,
        "kind": "BatchProfile",
        "metadata": metadata,
        "spec": {"key": key.to_dict(), "measurement": how},
    }


def measurement(service: LLMService) -> dict[str, Any]:
    """How a service has its key measured: all of `spec.measurement` but what is asked for (`rerun`, `extend`)."""
    spec = service.spec
    made = {
        "budget": spec.profiling.budget,
        "objectives": [each.to_dict() for each in spec.slo.objectives],
        "efficiencyFloor": spec.advisor.efficiency_floor,
        "memoryReserve": spec.packing.memory_reserve,
        "maxReplicasPerGPU": spec.packing.most_per_gpu,
        "minimumGain": spec.packing.minimum_gain,
        "template": spec.template.to_dict(),
    }
    if spec.model.cache:
        made["cache"] = spec.model.cache.to_dict()
    if spec.workload.lengths_from:
        made["lengthsFrom"] = spec.workload.lengths_from.to_dict()
    return made


def assignments(planned: Iterable[placement.Assignment]) -> list[dict[str, Any]]:
    """A pack's assignments as they stand in the API."""
    return [
        {
            "service": each.service.name,
            "uid": each.uid,
            "replicas": each.replicas,
            "batch": each.shape.batch,
            "kvCache": units.format_quantity(each.shape.kv_cache),
            "memoryPerReplica": units.format_quantity(each.shape.memory),
            "profile": each.shape.profile,
        }
        for each in planned
    ]


def gpu_pack(planned: placement.Pack, service: LLMService) -> dict[str, Any]:
    """The GPUPack that a plan opens for a service. The planner's mode begins with the pack's, and with what it
    requests where that isn't a whole GPU (`Reservation as 0`, `DevicePlugin:nvidia.com/gpu.shared as 0`)."""
    accelerator = service.spec.accelerator
    mode, _, resource = planned.mode.split()[0].partition(":")
    spec: dict[str, Any] = {
        "namespace": planned.owner.namespace,
        "device": "cpu" if planned.device == "cpu" else "cuda",
        "mode": mode,
        "allocator": "DRA" if planned.device == CLAIMED_DEVICE else "DevicePlugin",
        "runAsUser": service.spec.template.spec.run_as_user,
        "assignments": assignments(planned.assignments),
    }
    if planned.device == "cpu":
        spec |= {"node": planned.node, "cores": planned.units, "memory": accelerator.memory}
    else:
        spec["product"] = planned.product
    if resource:
        spec["resource"] = resource
    if planned.excluded:
        spec["excludedNodes"] = sorted(planned.excluded)
    return {
        "apiVersion": labels.API_VERSION,
        "kind": "GPUPack",
        "metadata": {
            "name": planned.name,
            "labels": labels.common(
                planned.name,
                labels.COMPONENT_HOLDER,
                {labels.SERVICE: planned.owner.name, labels.SERVICE_NAMESPACE: planned.owner.namespace},
            ),
        },
        "spec": spec,
    }
