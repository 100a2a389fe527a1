"""The generated CRDs: no drift, every field explained, structural, and the CEL rules do what their messages say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import pytest
import yaml

from tightship.api import crds
from tightship.api.v1alpha1 import batchprofile, labels, validation
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.core.placement import MPS_REPLICAS

ROOT = Path(__file__).resolve().parents[3]
KINDS = crds.definitions()


def schema_of(plural: str) -> dict[str, Any]:
    schema: dict[str, Any] = KINDS[plural]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of a schema with its path, lists and maps included."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field, f"{path}.{name}")
    for inner, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(inner), dict):
            yield path + mark, schema[inner]
            yield from fields(schema[inner], path + mark)


def test_files_are_what_the_models_say() -> None:
    differing = [str(path) for path, text in crds.files(ROOT).items() if not path.exists() or path.read_text() != text]
    assert not differing, f"run `make crds`: {differing}"


@pytest.mark.parametrize("plural", KINDS)
def test_every_field_is_explained_typed_and_bounded(plural: str) -> None:
    for path, field in fields(schema_of(plural)):
        named = not path.endswith(("[]", "{}"))
        assert not named or path == ".metadata" or field.get("description"), f"{path} has no description"
        assert "type" in field or field.get("x-kubernetes-int-or-string"), f"{path} has no type"
        if field.get("type") == "array":
            assert "maxItems" in field, f"{path} is an unbounded list"
            assert field.get("x-kubernetes-list-type") in ("map", "set", "atomic"), f"{path} doesn't say how it merges"
        assert not {"$ref", "oneOf", "allOf", "title", "nullable"} & set(field), f"{path} is not structural"
        assert "anyOf" not in field or field.get("x-kubernetes-int-or-string"), f"{path} is not structural"
        assert field.get("type") != "number", f"{path} is a float"


@pytest.mark.parametrize("plural", KINDS)
def test_status_has_no_defaults(plural: str) -> None:
    assert not [path for path, field in fields(schema_of(plural)["properties"]["status"]) if "default" in field]


def test_defaults_reach_fields_of_absent_objects() -> None:
    spec = schema_of("llmservices")["properties"]["spec"]["properties"]
    assert spec["profiling"]["default"] == {}
    assert spec["profiling"]["properties"]["budget"]["default"] == "20m"
    assert spec["replicas"]["default"] == 1
    assert spec["autoApply"]["default"] is True


@pytest.mark.parametrize(
    ("plural", "short", "scope"),
    [("llmservices", "llm", "Namespaced"), ("batchprofiles", "bprof", "Namespaced"), ("gpupacks", "gpack", "Cluster")],
)
def test_names(plural: str, short: str, scope: str) -> None:
    spec = KINDS[plural]["spec"]
    assert (spec["group"], spec["scope"], spec["names"]["shortNames"]) == (labels.GROUP, scope, [short])
    assert "status" in spec["versions"][0]["subresources"]


def test_scale_subresource_points_at_replicas() -> None:
    scale = KINDS["llmservices"]["spec"]["versions"][0]["subresources"]["scale"]
    assert scale == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }


def cel(rule: str, **variables: Any) -> bool:
    """What a CEL rule says of `self` (and `oldSelf`)."""
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({name: celpy.json_to_cel(value) for name, value in variables.items()}))


def admitted(schema: dict[str, Any], value: Any, old: Any = None) -> list[str]:
    """The messages of every rule of the schema that `value` breaks, as an API server of 1.25 or later gives them."""
    messages = []
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"] and old is None:
            continue
        if not cel(rule["rule"], self=value, **({"oldSelf": old} if old is not None else {})):
            messages.append(rule["message"])
    for name, field in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            messages += admitted(field, value[name], (old or {}).get(name))
    return messages


def make_service(**changes: Any) -> dict[str, Any]:
    """A valid LLMService; `changes` replace parts of its spec by dotted path (`model__source=...`)."""
    service: dict[str, Any] = yaml.safe_load(
        """
        apiVersion: tightship.dev/v1alpha1
        kind: LLMService
        metadata: {name: opt, namespace: default}
        spec:
          model: {source: hf://facebook/opt-1.3b}
          engine: {image: "vllm/vllm-openai:v0.33.0"}
          accelerator: {device: cuda, product: NVIDIA-H100-80GB-HBM3}
          workload: {inputTokens: 111, outputTokens: 292}
        """
    )
    for path, value in changes.items():
        target = service
        *parents, last = path.split("__")
        for part in parents:
            target = target.setdefault(part, {})
        target[last] = value
    return service


REFUSED = [
    "--model=x",
    "--model",
    "--served-model-name=x",
    "--served_model_name=x",
    "--port=1",
    "--host=0.0.0.0",
    "--uds=/x",
    "--config=/etc/x.yaml",
    "--revision=main",
    "--max-model-len=8",
    "--max_model_len",
    "--max-num-seqs=512",
    "--gpu-memory-utilization=0.9",
    "--gpu_memory_utilization=0.9",
    "--kv-cache-memory-bytes=1G",
    "--kv_cache_memory_bytes",
    "--api-key=secret",
    "--ssl-keyfile=/x",
    "--ssl_certfile",
    "--gpu-mem=0.9",
    "--max_num_s=7",
    "--ud=/x",
    "--served=x",
    "--tensor=2",
    "--tensor-parallel-size=2",
    "--tensor_parallel_size=2",
    "--tensor-parallel-size",
    "-tp=2",
    "-tp",
    "-pp=2",
    "-dp",
    "--pipeline-parallel-size=4",
    "--data-parallel-size=11",
]
ALLOWED = [
    "--dtype=float16",
    "--enforce-eager",
    "--model-impl=vllm",
    "--max-num-batched-tokens=8192",
    "--tensor-parallel-size=1",
    "-tp=1",
    "--port-like=1",
    "--config-format=hf",
    "--tokenizer-revision=main",
    "--max-logprobs=5",
    "--hf-overrides={}",
    '--speculative-config={"method": "ngram", "num_speculative_tokens": 4}',
    "--enable-lora",
    "--lora-modules=sql=/models/sql",
    "--max-loras=4",
    "--max-lora-rank=16",
    "--max-cpu-loras=8",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
]
SPREAD = [{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}]
LENGTHS_FROM = {"configMap": {"name": "chat", "key": "lengths.csv"}}
BAD = [
    ("spec__model__source", "facebook/opt-1.3b"),
    ("spec__model__source", "hf://opt"),
    ("spec__model__source", "s3://bucket/model"),
    ("spec__model__source", "pvc://models/../etc"),
    ("spec__model__source", "pvc://models"),
    ("spec__accelerator", {"device": "cuda"}),
    ("spec__accelerator", {"device": "cpu", "cores": 2}),
    ("spec__accelerator", {"device": "cpu", "cores": 2, "memory": "8Gi", "coresPerReplica": 3}),
    ("spec__template__spec__engine__env", [{"name": "CUDA_VISIBLE_DEVICES", "value": "1"}]),
    ("spec__template__spec__engine__env", [{"name": "TIGHTSHIP_X", "value": "1"}]),
    ("spec__template__metadata__labels", {"tightship.dev/pack": "mine"}),
    ("spec__template__metadata__labels", {"team": "a", "app.kubernetes.io/part-of": "chat"}),
    ("spec__template__metadata__annotations", {"tightship.dev/gpu": "{}"}),
    ("spec__routing", {"mode": "InferencePool"}),
    ("spec__workload", {}),
    ("spec__workload", {"inputTokens": 111}),
    ("spec__workload", {"outputTokens": 292}),
    ("spec__workload", {"inputTokens": 111, "outputTokens": 292, "lengthsFrom": LENGTHS_FROM}),
    ("spec__workload", {"inputTokens": 111, "lengthsFrom": LENGTHS_FROM}),
    ("spec__workload", {"outputTokens": 292, "lengthsFrom": LENGTHS_FROM}),
    ("metadata__name", "x" * 41),
    ("metadata__name", "1opt"),
    ("metadata__name", "opt.v1"),
    *(("spec__engine__args", [arg]) for arg in REFUSED),
]
GOOD = [
    ("spec__model__source", "pvc://models/llama/3"),
    ("spec__accelerator", {"device": "cpu", "cores": 4, "memory": "8Gi", "coresPerReplica": 2}),
    ("spec__template__spec__engine__env", [{"name": "HF_HOME", "value": "/models"}]),
    (
        "spec__template__metadata__labels",
        {"team": "a", "example.com/tightship.dev": "b", "app.kubernetes.io/version": "1"},
    ),
    ("spec__template__metadata__annotations", {"app.kubernetes.io/name": "chat", "tightship.development/x": "y"}),
    ("spec__template__spec__topologySpreadConstraints", SPREAD),
    ("spec__routing", {"mode": "InferencePool", "endpointPicker": {"name": "epp", "failureMode": "FailOpen"}}),
    ("spec__routing", {"endpointPicker": {"name": "epp"}}),
    ("spec__workload", {"inputTokens": 1, "outputTokens": 2}),
    ("spec__workload", {"lengthsFrom": LENGTHS_FROM}),
    ("metadata__name", "x" * 40),
    *(("spec__engine__args", [arg]) for arg in ALLOWED),
]


@pytest.mark.parametrize(("path", "value"), BAD)
def test_both_sides_refuse(path: str, value: Any) -> None:
    """What CEL refuses on newer clusters, the operator refuses on older ones."""
    service = make_service(**{path: value})
    assert admitted(schema_of("llmservices"), service), "the CEL rules let it pass"
    with pytest.raises(validation.InvalidSpecError):
        validation.parse_service(service)


@pytest.mark.parametrize(("path", "value"), GOOD)
def test_both_sides_admit(path: str, value: Any) -> None:
    service = make_service(**{path: value})
    assert admitted(schema_of("llmservices"), service) == []
    validation.parse_service(service)


def test_no_more_replicas_are_asked_for_on_a_gpu_than_mps_takes() -> None:
    packing = schema_of("llmservices")["properties"]["spec"]["properties"]["packing"]["properties"]
    assert packing["maxReplicasPerGPU"]["maximum"] == MPS_REPLICAS == 24
    validation.parse_service(make_service(spec__packing={"maxReplicasPerGPU": 24}))
    with pytest.raises(validation.InvalidSpecError, match="maxReplicasPerGPU"):
        validation.parse_service(make_service(spec__packing={"maxReplicasPerGPU": 25}))


def test_nodes_of_cpu_packs_are_not_the_schedulers_to_choose() -> None:
    cpu = {"device": "cpu", "cores": 4, "memory": "8Gi"}
    service = make_service(spec__accelerator=cpu, spec__template__spec__topologySpreadConstraints=SPREAD)
    (told,) = admitted(schema_of("llmservices"), service)
    assert "topologySpreadConstraints" in told
    with pytest.raises(validation.InvalidSpecError, match="topologySpreadConstraints"):
        validation.parse_service(service)
    service["spec"]["template"]["spec"]["topologySpreadConstraints"] = []
    assert admitted(schema_of("llmservices"), service) == []
    validation.parse_service(service)


def test_two_constraints_of_one_kind_and_key_are_refused_where_the_schema_is_not_enforced() -> None:
    with pytest.raises(validation.InvalidSpecError, match="given 2 times"):
        validation.parse_service(make_service(spec__template__spec__topologySpreadConstraints=SPREAD * 2))


SHARES = [
    # maxUnavailable, replicas, how many have to serve (None: the value is refused)
    (1, 4, 3),
    (1, 1, 1),  # the only replica: nothing is available without it
    (1, 0, 0),
    (3, 8, 5),
    (8, 4, 1),
    ("25%", 4, 3),
    ("25%", 5, 3),  # 1.25 rounds up to 2, as a PodDisruptionBudget's percentage does
    ("1%", 3, 2),
    ("100%", 3, 1),
    (0, 4, None),
    (-1, 4, None),
    ("0%", 4, None),
    ("101%", 4, None),
    ("2", 4, None),
    ("a%", 4, None),
]


@pytest.mark.parametrize(("share", "replicas", "least"), SHARES)
def test_max_unavailable(share: int | str, replicas: int, least: int | None) -> None:
    """What the schema takes is what the operator takes, and at least one of any replicas has to serve."""
    field = schema_of("llmservices")["properties"]["spec"]["properties"]["rollout"]["properties"]["maxUnavailable"]
    assert jsonschema.Draft202012Validator(field).is_valid(share) == (least is not None)
    service = make_service(spec__rollout__maxUnavailable=share)
    if least is None:
        with pytest.raises(validation.InvalidSpecError, match=r"rollout\.maxUnavailable"):
            validation.parse_service(service)
    else:
        assert validation.parse_service(service).spec.rollout.least_serving(replicas) == least


def make_profile() -> dict[str, Any]:
    key = validation.profile_key(LLMService.model_validate(make_service()).spec).to_dict()
    return {"metadata": {"name": "p"}, "spec": {"key": key, "measurement": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": {"hash": "0" * 64}}, "a profile's key is immutable"),
        ({"results": {"points": [{"batch": 2}]}}, "results are immutable"),
        ({"results": None}, "results are given when a profile is created, or never"),
    ],
)
def test_key_and_results_are_immutable(change: dict[str, Any], message: str) -> None:
    old = make_profile()
    old["spec"]["results"] = {"points": [{"batch": 1}]}
    new = {**old, "spec": {name: value for name, value in {**old["spec"], **change}.items() if value is not None}}
    assert admitted(schema_of("batchprofiles"), new, old) == [message]
    assert admitted(schema_of("batchprofiles"), old, old) == []


def test_rules_keep_to_what_1_25_has() -> None:
    """Functions that later versions brought (optionals, quantity(), isURL ...) would make the CRD invalid on 1.25."""
    known = {"matches", "all", "exists", "has", "size", "contains", "startsWith", "endsWith"}
    for plural in KINDS:
        for path, field in [("", schema_of(plural)), *fields(schema_of(plural))]:
            for rule in field.get("x-kubernetes-validations", []):
                without_literals = re.sub(r"'[^']*'", "''", rule["rule"])
                called = set(re.findall(r"([a-zA-Z]+)\(", without_literals))
                assert called <= known, f"{path}: {called - known}"


def test_nobody_is_given_results_that_nobody_wrote() -> None:
    """A default inside `spec.results` would make the API server fill it in, and an empty import is an import."""
    spec = crds.definition(batchprofile)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    results = spec["properties"]["results"]
    assert "default" not in results
    assert not [name for name, field in results["properties"].items() if "default" in field and field["default"] != []]
