"""The profiling Job: what is in it, and what must never be."""

from __future__ import annotations

from typing import Any

import pytest

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, KeyEngine, KeyModel, KeyWorkload, ProfileKey
from tightship.api.v1alpha1.spec import AcceleratorSpec
from tightship.api.v1alpha1.template import Resources
from tightship.manifests.podparts import OperatorImage
from tightship.manifests.profile_job import job_name, profile_job, profiler_access

IMAGE = OperatorImage("registry.example/tightship:1", "IfNotPresent")
CUDA = AcceleratorSpec(device="cuda", product="NVIDIA-H100-80GB-HBM3")
CPU = AcceleratorSpec(device="cpu", cores=4, cores_per_replica=2, memory="8Gi")

TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"team": "a", labels.PROFILE: "forged"}, "annotations": {"note": "x"}},
    "spec": {
        "nodeSelector": {"zone": "z1"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "imagePullSecrets": [{"name": "pull"}],
        "serviceAccountName": "replicas-only",
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "securityContext": {"runAsUser": 1000},
        "volumes": [{"name": "data", "emptyDir": {}}],
        "engine": {
            "env": [{"name": "HF_TOKEN", "value": "t"}, {"name": "PYTHONPATH", "value": "/evil"}],
            "envFrom": [{"secretRef": {"name": "hub"}}],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            "resources": {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "16Gi"}},
        },
    },
}


def make_profile(
    accelerator: AcceleratorSpec = CUDA, source: str = "hf://facebook/opt-1.3b", name: str = "opt", **measurement: Any
) -> BatchProfile:
    key = ProfileKey.of(
        model=KeyModel(source=source),
        engine=KeyEngine(image="vllm/vllm-openai:v0.33.0"),
        accelerator=accelerator,
        workload=KeyWorkload(input_tokens=111, output_tokens=292),
        resources=Resources(),
    )
    metadata = {"name": name, "namespace": "team", "uid": "u-1"}
    return BatchProfile.model_validate(
        {"metadata": metadata, "spec": {"key": key.to_dict(), "measurement": measurement}}
    )


def pod_of(profile: BatchProfile) -> Any:
    return profile_job(profile, 1, IMAGE)["spec"]["template"]["spec"]


def engine_of(profile: BatchProfile) -> Any:
    return pod_of(profile)["containers"][0]


def env_of(profile: BatchProfile) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in engine_of(profile)["env"]}


def test_the_job_is_the_profiles_and_names_its_attempt() -> None:
    job = profile_job(make_profile(rerun="again"), 3, IMAGE)
    assert job["metadata"]["name"] == "opt-3"
    assert job["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert job["metadata"]["annotations"] == {"tightship.dev/rerun": "again"}
    assert job["spec"]["backoffLimit"] <= 3
    assert "activeDeadlineSeconds" not in job["spec"]


def test_the_pod_gets_what_a_replicas_pod_gets_from_the_template() -> None:
    profile = make_profile(template=TEMPLATE)
    pod, spec = pod_of(profile), TEMPLATE["spec"]
    for field in ("affinity", "imagePullSecrets", "priorityClassName", "runtimeClassName", "securityContext"):
        assert pod[field] == spec[field]
    assert pod["tolerations"] == spec["tolerations"]
    assert pod["nodeSelector"] == {"zone": "z1", labels.NODE_GPU_PRODUCT: CUDA.product}
    assert spec["volumes"][0] in pod["volumes"]
    engine = engine_of(profile)
    assert engine["image"] == "vllm/vllm-openai:v0.33.0"
    assert engine["envFrom"] == spec["engine"]["envFrom"]
    assert {"name": "data", "mountPath": "/data"} in engine["volumeMounts"]
    assert engine["resources"] == {
        "requests": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"},
        "limits": {"memory": "16Gi", "nvidia.com/gpu": "1"},
    }


def test_the_template_cannot_forge_what_tightship_sets() -> None:
    profile = make_profile(template=TEMPLATE)
    template = profile_job(profile, 1, IMAGE)["spec"]["template"]
    assert template["metadata"]["labels"][labels.PROFILE] == "opt"
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["spec"]["serviceAccountName"] == "opt-profiler"
    assert env_of(profile)["PYTHONPATH"] == "/tightship/lib"  # of two, the later one counts


def test_the_profiler_finds_its_profile_token_and_model() -> None:
    env = env_of(make_profile())
    assert env["TIGHTSHIP_PROFILE_NAMESPACE"] == "team"
    assert env["TIGHTSHIP_PROFILE_NAME"] == "opt"
    assert env["TIGHTSHIP_MODEL_PATH"] == "facebook/opt-1.3b"
    assert env["TIGHTSHIP_DEVICE"] == "cuda"
    pod = pod_of(make_profile())
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    sources = next(volume for volume in pod["volumes"] if volume["name"] == "token")["projected"]["sources"]
    assert env["TIGHTSHIP_TOKEN_FILE"] == f"{mounts['token']}/{sources[0]['serviceAccountToken']['path']}"
    assert pod["containers"][0]["command"] == ["python3", "-m", "tightship.profiler"]


@pytest.mark.parametrize(
    ("source", "cache", "path", "claim", "home"),
    [
        ("hf://facebook/opt-1.3b", None, "facebook/opt-1.3b", None, None),
        ("hf://facebook/opt-1.3b", {"pvc": "models"}, "facebook/opt-1.3b", "models", "/models"),
        ("pvc://weights/llama/7b", None, "/models/llama/7b", "weights", None),
    ],
)
def test_where_the_model_is(source: str, cache: Any, path: str, claim: str | None, home: str | None) -> None:
    profile = make_profile(source=source, **({"cache": cache} if cache else {}))
    env = env_of(profile)
    assert env["TIGHTSHIP_MODEL_PATH"] == path
    assert env.get("HF_HOME") == home
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in pod_of(profile)["volumes"] if "persistentVolumeClaim" in v
    ]
    assert claims == ([claim] if claim else [])


def test_on_cpu_the_pod_is_guaranteed_whole_cores_of_one_replica() -> None:
    profile = make_profile(CPU)
    pod = pod_of(profile)
    amount = {"cpu": "2", "memory": "8Gi"}
    assert pod["containers"][0]["resources"] == {"requests": amount, "limits": amount}
    for container in pod["initContainers"]:
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert labels.NODE_GPU_PRODUCT not in pod.get("nodeSelector", {})
    assert env_of(profile)["TIGHTSHIP_DEVICE_MEMORY"] == str(8 * 2**30)


@pytest.mark.parametrize("budget", ["20m", "90s"])
def test_the_pods_deadline_is_far_beyond_the_budget(budget: str) -> None:
    seconds = {"20m": 1200, "90s": 90}[budget]
    assert pod_of(make_profile(budget=budget))["activeDeadlineSeconds"] == seconds + 7200


def test_the_pod_passes_pod_security_baseline() -> None:
    pod = pod_of(make_profile())
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("hostPath" not in volume for volume in pod["volumes"])
    for container in [*pod["initContainers"], *pod["containers"]]:
        context = container.get("securityContext", {})
        assert not context.get("privileged")
        assert not (context.get("capabilities") or {}).get("add")
        assert all("hostPort" not in port for port in container.get("ports", []))


def test_the_service_account_may_do_two_things_to_one_object() -> None:
    account, role, binding = profiler_access(make_profile())
    assert account["metadata"]["name"] == binding["subjects"][0]["name"] == pod_of(make_profile())["serviceAccountName"]
    assert role["rules"] == [
        {"apiGroups": ["tightship.dev"], "resources": ["batchprofiles"], "resourceNames": ["opt"], "verbs": ["get"]},
        {
            "apiGroups": ["tightship.dev"],
            "resources": ["batchprofiles/status"],
            "resourceNames": ["opt"],
            "verbs": ["get", "patch"],
        },
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


@pytest.mark.parametrize(("length", "attempt"), [(3, 1), (61, 1), (62, 1), (63, 12)])
def test_job_names_fit_into_a_label_and_end_in_the_attempt(length: int, attempt: int) -> None:
    name = job_name("p" * length, attempt)
    assert len(name) <= 63
    assert name.endswith(f"-{attempt}")
    assert name != job_name("p" * length, attempt + 1)
    assert name != job_name("p" * (length - 1) + "q", attempt)
