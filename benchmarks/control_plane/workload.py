"""What the benchmark applies: services with a complete profile each, and the same pods as plain StatefulSets."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import profile_key

Object = dict[str, Any]
PER_GPU = 2
"""Replicas that the profiles' trials put on one GPU."""

_SAMPLE = Path(__file__).resolve().parents[2] / "docs" / "samples" / "llmservice-opt.yaml"
# Points of OPT-1.3B on ShareGPT, and two replicas on one GPU: batch, total tokens/s, mean inter-token latency in ms, peak KV tokens.
# Source: raw results published with arXiv:2503.08311.
_CURVE = ((1, 381.4, 3.62, 1872), (32, 5734.1, 7.51, 17184), (96, 9032.8, 13.89, 47376), (256, 10870.9, 29.26, 111968))
_TRIALS = ((96, 12313.9, 18.98), (256, 14669.5, 37.07))


def service(index: int, gpus: int) -> Object:
    """A service of OPT-1.3B that fills that many GPUs; each has a key of its own."""
    made: Object = yaml.safe_load(_SAMPLE.read_text())
    made["metadata"]["name"] = f"svc-{index:04d}"
    made["spec"]["workload"]["outputTokens"] = 292 + index
    made["spec"]["replicas"] = PER_GPU * gpus
    return made


def profile(of: Object) -> Object:
    """A profile of the service's key with published figures as imported results: complete without a Job."""
    key = profile_key(LLMService.model_validate(of).spec)
    counts = {"requests": 2000, "preemptions": 0}
    points = [
        {
            "batch": batch,
            "totalTokensPerSecond": str(rate),
            "interTokenLatency": {"mean": f"{latency}ms"},
            "kvCacheTokensPeak": peak,
            **counts,
        }
        for batch, rate, latency, peak in _CURVE
    ]
    trials = [
        {
            "batch": batch,
            "replicas": PER_GPU,
            "totalTokensPerSecond": str(rate),
            "interTokenLatency": {"mean": f"{latency}ms"},
            **counts,
        }
        for batch, rate, latency in _TRIALS
    ]
    memory = {
        "confirmedBatch": 96,
        "blockSize": 16,
        "kvBytesPerToken": 196608,
        "kvCacheTokens": 65536,
        "kvCache": "12Gi",
    }
    memory |= {"replica": "20Gi", "nonKV": "8Gi", "contextMean": "403", "contextStd": "330", "deviceTotal": "80Gi"}
    return {
        "apiVersion": labels.API_VERSION,
        "kind": "BatchProfile",
        "metadata": {"name": of["metadata"]["name"], "namespace": of["metadata"]["namespace"]},
        "spec": {
            "key": key.to_dict(),
            "results": {
                "gpu": {"product": of["spec"]["accelerator"]["product"], "memory": "80Gi"},
                "engine": {"blockSize": 16, "maxModelLen": 2048, "maxNumBatchedTokens": 8192},
                "points": points,
                "trials": trials,
                "memory": memory,
            },
        },
    }


def plain(holders: Iterable[Object], sets: Iterable[Object]) -> list[Object]:
    """The yardstick: StatefulSets that make the pods of these holders and StatefulSets again, by themselves.

    Containers, volumes and requests are the same. What ties them to Tightship goes: owners, tokens, the node of a replica; and since
    nothing tells a replica of its holder any more, it runs a program that is ready at once.
    """
    return [_of_holder(each) for each in holders] + [_of_set(each) for each in sets]


def _of_holder(pod: Object) -> Object:
    spec = copy.deepcopy(pod["spec"])
    for name in ("nodeName", "serviceAccountName", "serviceAccount", "affinity", "priority", "preemptionPolicy"):
        spec.pop(name, None)
    spec["restartPolicy"] = "Always"
    return _statefulset(pod["metadata"]["name"], pod["metadata"], spec, 1)


def _of_set(found: Object) -> Object:
    template = copy.deepcopy(found["spec"]["template"])
    template["spec"].pop("affinity", None)
    for container in template["spec"]["containers"]:
        container["command"], container["args"] = ["sleep"], ["infinity"]
    return _statefulset(found["metadata"]["name"], found["metadata"], template["spec"], found["spec"]["replicas"])


def _statefulset(name: str, metadata: Mapping[str, Any], spec: Object, replicas: int) -> Object:
    own = {"bench": name[-60:]}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "namespace": metadata["namespace"]},
        "spec": {
            "replicas": replicas,
            "serviceName": "none",
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": own},
            "template": {"metadata": {"labels": {**(metadata.get("labels") or {}), **own}}, "spec": spec},
        },
    }
