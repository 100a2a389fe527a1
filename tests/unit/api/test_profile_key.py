"""The profile key: what it holds measures again under a new key, what it doesn't costs no GPU time."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import profile_key

BASE = """
apiVersion: tightship.dev/v1alpha1
kind: LLMService
metadata: {name: opt, namespace: default}
spec:
  model: {source: hf://facebook/opt-1.3b, revision: main}
  engine: {image: "vllm/vllm-openai:v0.33.0", args: ["--dtype=float16"], maxModelLen: 2048}
  accelerator: {device: cuda, product: NVIDIA-H100-80GB-HBM3}
  workload: {inputTokens: 111, outputTokens: 292}
  slo: {objectives: [{metric: InterTokenLatency, max: 30ms}]}
  template: {spec: {engine: {env: [{name: A, value: "1"}], envFrom: [{secretRef: {name: hub}}]}}}
"""


def key_with(**changes: Any) -> str:
    service = yaml.safe_load(BASE)
    for path, value in changes.items():
        target = service["spec"]
        *parents, last = path.split("__")
        for part in parents:
            target = target.setdefault(part, {})
        target[last] = value
    return profile_key(LLMService.model_validate(service).spec).hash


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model__source", "hf://facebook/opt-2.7b"),
        ("model__revision", "v2"),
        ("engine__image", "vllm/vllm-openai:v0.34.0"),
        ("engine__args", ["--dtype=bfloat16"]),
        ("engine__args", ["--dtype=float16", '--speculative-config={"method": "ngram"}']),
        ("engine__args", ["--dtype=float16", "--enable-lora"]),
        ("engine__args", ["--dtype=float16", "--enable-prefix-caching"]),
        ("engine__maxModelLen", 1024),
        ("accelerator__product", "NVIDIA-A100-SXM4-80GB"),
        ("workload__outputTokens", 293),
        ("template__spec__engine__env", [{"name": "A", "value": "2"}]),
        ("template__spec__engine__envFrom", [{"secretRef": {"name": "other"}}]),
        ("template__spec__engine__resources", {"requests": {"cpu": "4"}}),
    ],
)
def test_measured_anew(path: str, value: Any) -> None:
    assert key_with(**{path: value}) != key_with()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("slo__objectives", [{"metric": "InterTokenLatency", "max": "10ms"}]),
        ("advisor", {"efficiencyFloor": "0.2"}),
        ("packing", {"minimumGain": "1.2", "memoryReserve": "10%", "maxReplicasPerGPU": 2}),
        ("profiling", {"budget": "1h"}),
        ("profiling", {"extend": "once more"}),
        ("replicas", 9),
        ("autoApply", False),
        ("model__servedName", "other"),
        ("template__spec__nodeSelector", {"zone": "a"}),
    ],
)
def test_decided_again_from_the_same_curve(path: str, value: Any) -> None:
    assert key_with(**{path: value}) == key_with()


def lengths_key(text: str, name: str = "chat", entry: str = "lengths.csv") -> str:
    service = yaml.safe_load(BASE)
    service["spec"]["workload"] = {"lengthsFrom": {"configMap": {"name": name, "key": entry}}}
    return profile_key(LLMService.model_validate(service).spec, text).hash


def test_lengths_are_keyed_by_what_they_are_not_by_where_they_lie() -> None:
    assert lengths_key("10,20\n") == lengths_key("10,20\n", name="other", entry="x")
    assert len({lengths_key("10,20\n"), lengths_key("10,21\n"), key_with()}) == 3


def test_a_key_without_its_lengths_is_refused() -> None:
    service = yaml.safe_load(BASE)
    service["spec"]["workload"] = {"lengthsFrom": {"configMap": {"name": "chat", "key": "lengths.csv"}}}
    with pytest.raises(ValueError, match="needs the text of its lengths"):
        profile_key(LLMService.model_validate(service).spec)


def test_the_hash_is_of_the_content() -> None:
    key = profile_key(LLMService.model_validate(yaml.safe_load(BASE)).spec)
    again = type(key).of(
        **{name: getattr(key, name) for name in ("model", "engine", "accelerator", "workload", "resources")}
    )
    assert key == again
    assert len(key.hash) == 64
