"""What the end-to-end stories share: manifests, waiting for what users wait for, and what must hold of a settled cluster.

A story drives a `Sandbox` with kubectl as a user would. It waits for conditions, never for a time; when a wait runs out, the
failure shows what a user would look at: the conditions, the pods, the events.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from tightship.api.v1alpha1.labels import ANNOTATION_MPS
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import profile_key
from tightship.sandbox.cluster import Sandbox

PRODUCT = "NVIDIA-H100-80GB-HBM3"
GATES = ("Accepted", "Profiled", "Recommended", "Packed", "Available", "Ready")


def make_service(name: str = "opt", **changes: Any) -> dict[str, Any]:
    """An LLMService of OPT-1.3B on a simulated H100; `changes` set parts of its spec by dotted path (`engine__args=[...]`)."""
    service: dict[str, Any] = {
        "apiVersion": "tightship.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "model": {"source": "hf://facebook/opt-1.3b", "servedName": "opt-1.3b"},
            "engine": {"image": "vllm/vllm-openai:v0.33.0", "args": ["--dtype=float16"], "maxModelLen": 2048},
            "accelerator": {"device": "cuda", "product": PRODUCT},
            "workload": {"inputTokens": 111, "outputTokens": 292},
            "slo": {"objectives": [{"metric": "InterTokenLatency", "statistic": "mean", "max": "30ms"}]},
            "profiling": {"budget": "45s"},
            "packing": {"maxReplicasPerGPU": 2},
            "replicas": 4,
        },
    }
    for path, value in changes.items():
        target = service["spec"]
        *parents, last = path.split("__")
        for part in parents:
            target = target.setdefault(part, {})
        target[last] = value
    return service


# Points of OPT-1.3B on ShareGPT (one H100), rounded: batch, total tokens/s, mean inter-token latency in ms, utilisation, peak KV tokens.
# Source: raw results published with arXiv:2503.08311.
CURVE = (
    (1, 381.4, 3.62, 0.865, 1872),
    (8, 2400.4, 4.57, 0.761, 6224),
    (32, 5734.1, 7.51, 0.643, 17184),
    (64, 8143.7, 10.40, 0.612, 30384),
    (96, 9032.8, 13.89, 0.575, 47376),
    (256, 10870.9, 29.26, 0.530, 111968),
)

# Two replicas on one GPU, of the same source: batch, replicas, total tokens/s of both, mean inter-token latency in ms.
TRIALS = ((96, 2, 12313.9, 18.98), (256, 2, 14669.5, 37.07))


def make_profile(service: Mapping[str, Any], *, name: str = "imported", replica: int = 20) -> dict[str, Any]:
    """A BatchProfile with the service's key and published figures as imported results, so that no Job needs to run."""
    key = profile_key(LLMService.model_validate(service).spec)
    points = [
        {
            "batch": batch,
            "totalTokensPerSecond": str(total),
            "outputTokensPerSecond": str(round(total * 292 / 403, 1)),
            "interTokenLatency": {"mean": f"{latency}ms"},
            "kvCacheTokensPeak": kv,
            "requests": 2000,
            "preemptions": 0,
            "gpuUtilization": str(utilisation),
        }
        for batch, total, latency, utilisation, kv in CURVE
    ]
    return {
        "apiVersion": "tightship.dev/v1alpha1",
        "kind": "BatchProfile",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "key": key.to_dict(),
            "results": {
                "gpu": {"product": PRODUCT, "memory": "80Gi"},
                "engine": {"blockSize": 16, "maxModelLen": 2048, "maxNumBatchedTokens": 8192},
                "points": points,
                "trials": [
                    {
                        "batch": batch,
                        "replicas": replicas,
                        "totalTokensPerSecond": str(total),
                        "interTokenLatency": {"mean": f"{latency}ms"},
                        "requests": 4000,
                        "preemptions": 0,
                    }
                    for batch, replicas, total, latency in TRIALS
                ],
                "memory": {
                    "confirmedBatch": 96,
                    "deviceTotal": "80Gi",
                    "blockSize": 16,
                    "kvBytesPerToken": 196608,
                    "kvCacheTokens": 65536,
                    "kvCache": "12Gi",
                    "replica": f"{replica}Gi",
                    "nonKV": f"{replica - 12}Gi",
                    "contextMean": "403",
                    "contextStd": "330",
                    "basis": "Assumed",
                },
            },
        },
    }


def apply(sandbox: Sandbox, *objects: Mapping[str, Any]) -> None:
    """`kubectl apply` of the objects, as a user does it."""
    text = "---\n".join(yaml.safe_dump(dict(obj)) for obj in objects)
    sandbox.kubectl("apply", "--validate=false", "-f", "-", stdin=text)


def get(sandbox: Sandbox, *words: str) -> dict[str, Any]:
    """One object, or a list, as `kubectl get -o json` prints it; {} when there is none."""
    text = sandbox.kubectl("get", *words, "-o", "json", "--ignore-not-found")
    return dict(json.loads(text)) if text.strip() else {}


def items(sandbox: Sandbox, *words: str) -> list[dict[str, Any]]:
    """The objects of a list."""
    return list(get(sandbox, *words).get("items", []))


def condition(obj: Mapping[str, Any], kind: str) -> dict[str, str]:
    """The condition of that type, or one with status Unknown where the object has none yet."""
    conditions = obj.get("status", {}).get("conditions", [])
    return next(
        (dict(entry) for entry in conditions if entry["type"] == kind),
        {"type": kind, "status": "Unknown", "reason": ""},
    )


def serves(sandbox: Sandbox, version: str) -> bool:
    """Whether the cluster serves an API version, such as policy/v1."""
    return version in sandbox.kubectl("api-versions").split()


def wait_until(sandbox: Sandbox, what: str, holds: Callable[[], object], seconds: float = 60) -> None:
    """Poll until `holds()` is true; past `seconds` fail with what a user would look at."""
    deadline = time.monotonic() + seconds
    while True:
        if holds():
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s still not: {what}\n{describe(sandbox)}")
        time.sleep(0.5)


def describe(sandbox: Sandbox) -> str:
    """The cluster as someone who debugs it would print it."""
    parts = []
    for words in (
        ("get", "llm,bprof,gpack", "-A", "-o", "wide"),
        ("get", "pods,sts,jobs", "-A", "-o", "wide"),
        ("get", "events", "-A", "--sort-by=.lastTimestamp"),
    ):
        parts.append(f"$ kubectl {' '.join(words)}\n{sandbox.kubectl(*words, check=False)[-6000:]}")
    return "\n".join(parts)


def wait_condition(
    sandbox: Sandbox, target: str, kind: str, status: str = "True", reason: str = "", *, seconds: float = 60
) -> dict[str, str]:
    """Wait for a condition of `target` (`llm/opt`), with a reason if given; returns it."""
    seen: dict[str, str] = {}

    def holds() -> bool:
        seen.update(condition(get(sandbox, target), kind))
        return seen["status"] == status and reason in ("", seen["reason"])

    wait_until(sandbox, f"{target} {kind}={status} {reason}", holds, seconds)
    return seen


def wait_ready(sandbox: Sandbox, name: str, replicas: int, seconds: float = 120) -> dict[str, Any]:
    """Wait until the service is Ready with exactly this many replicas, of this generation; returns it."""
    service: dict[str, Any] = {}

    def holds() -> bool:
        service.clear()
        service.update(get(sandbox, f"llm/{name}"))
        status = service.get("status", {})
        return (
            condition(service, "Ready")["status"] == "True"
            and status.get("readyReplicas") == replicas
            and status.get("observedGeneration") == service["metadata"]["generation"]
            and len(replica_pods(sandbox, name)) == replicas
        )

    wait_until(sandbox, f"{name} Ready with {replicas} replicas", holds, seconds)
    return service


def replica_pods(sandbox: Sandbox, service: str) -> list[dict[str, Any]]:
    """The service's replica pods that aren't being deleted."""
    pods = items(sandbox, "pods", "-l", f"tightship.dev/service={service},app.kubernetes.io/component=replica")
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def packs(sandbox: Sandbox) -> dict[str, int]:
    """Replicas assigned to every pack."""
    return {
        pack["metadata"]["name"]: sum(entry["replicas"] for entry in pack["spec"].get("assignments", []))
        for pack in items(sandbox, "gpupacks")
    }


def complete(sandbox: Sandbox, service: str, model: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """One completion through the Service, from outside."""
    payload = {"model": model, "max_tokens": 8, **(body or {"prompt": "The sea was"})}
    request = urllib.request.Request(
        f"{sandbox.gateway_url}/default/{service}{path}",
        data=json.dumps(payload).encode(),
        headers={"Content-Type": "application/json", "Connection": "close"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.load(response))


def answers(sandbox: Sandbox, service: str, model: str) -> bool:
    """Whether the Service answers at all."""
    try:
        return bool(complete(sandbox, service, model)["choices"])
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def check_settled(sandbox: Sandbox) -> None:
    """What must hold of any settled cluster: no GPU held twice or for nothing, and soon no orphans (they are collected, not deleted)."""
    gpacks = items(sandbox, "gpupacks")
    gpus = [pack["status"]["gpu"]["uuid"] for pack in gpacks if pack.get("status", {}).get("gpu", {}).get("uuid")]
    assert len(gpus) == len(set(gpus)), f"a GPU is held twice: {gpus}"
    for pack in gpacks:
        held_for = sum(entry["replicas"] for entry in pack["spec"].get("assignments", []))
        assert held_for, f"{pack['metadata']['name']} holds a GPU for nothing"
    names = {pack["metadata"]["name"] for pack in gpacks}

    def orphans() -> list[str]:
        return [
            f"{kind} {obj['metadata']['name']}"
            for kind in ("pods", "sts")
            for obj in items(sandbox, kind, "-A", "-l", "tightship.dev/pack")
            if obj["metadata"]["labels"]["tightship.dev/pack"] not in names
        ]

    wait_until(sandbox, "nothing is left of packs that are gone", lambda: not orphans())


def attached_pods(sandbox: Sandbox) -> set[str]:
    """UIDs of the replica pods that MPS daemons list as clients."""
    holders = items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/component=holder")
    attached: set[str] = set()
    for holder in holders:
        mps = json.loads(holder["metadata"].get("annotations", {}).get(ANNOTATION_MPS, "{}"))
        attached.update(client["podUID"] for client in mps.get("clients", []) if client.get("podUID"))
    return attached
