"""The profiling Job: what is in it, and what must never be."""

from __future__ import annotations

from typing import Any

import pytest

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, KeyEngine, KeyModel, KeyWorkload, ProfileKey
from tightship.api.v1alpha1.spec import AcceleratorSpec
from tightship.api.v1alpha1.template import Resources
from tightship.manifests.podparts import OperatorImage
from tightship.manifests.profile_job import fingerprint, job_name, profile_job, profiler_access, room_on

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
    job = profile_job(make_profile(rerun="again", extend=PAIR), 3, IMAGE)
    assert job["metadata"]["name"] == "opt-3"
    assert job["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    annotations = dict(job["metadata"]["annotations"])
    assert len(annotations.pop("tightship.dev/template")) == 16
    assert annotations == {"tightship.dev/rerun": "again", "tightship.dev/extend": "a"}
    assert job["spec"]["backoffLimit"] <= 3
    assert "activeDeadlineSeconds" not in job["spec"]


def test_an_empty_text_asks_for_nothing() -> None:
    assert set(profile_job(make_profile(rerun=""), 1, IMAGE)["metadata"]["annotations"]) == {"tightship.dev/template"}


@pytest.mark.parametrize(
    ("measurement", "same"),
    [
        ({}, True),
        ({"rerun": "again"}, True),
        ({"minimumGain": "2"}, True),  # read by the profiler when it starts
        ({"budget": "1h"}, False),
        ({"maxReplicasPerGPU": 2}, False),
        ({"cache": {"pvc": "models"}}, False),
        ({"template": {"spec": {"imagePullSecrets": [{"name": "pull"}]}}}, False),
        ({"template": {"metadata": {"annotations": {"a": "b"}}}}, False),
    ],
)
def test_the_fingerprint_is_of_what_the_pod_is_made_from(measurement: dict[str, Any], same: bool) -> None:
    assert (fingerprint(make_profile(**measurement)) == fingerprint(make_profile())) == same
    newer = OperatorImage("registry.example/tightship:2")
    jobs = [profile_job(make_profile(**measurement), 1, *rest) for rest in ((IMAGE,), (newer, 3))]
    told = {job["metadata"]["annotations"][labels.ANNOTATION_TEMPLATE] for job in jobs}
    assert told == {fingerprint(make_profile(**measurement))}


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
        "requests": {"cpu": "32", "memory": "128Gi", "nvidia.com/gpu": "1"},
        "limits": {"memory": "128Gi", "nvidia.com/gpu": "1"},
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


def resources_with(resources: dict[str, Any], room: int | None, **measurement: Any) -> Any:
    profile = make_profile(template={"spec": {"engine": {"resources": resources}}}, **measurement)
    return profile_job(profile, 1, IMAGE, room)["spec"]["template"]["spec"]["containers"][0]["resources"]


GPU = {"nvidia.com/gpu": "1"}
PAIR = {"request": "a", "pairs": [{"batch": 96, "replicas": 3}]}


@pytest.mark.parametrize(
    ("resources", "room", "measurement", "requests", "limits"),
    [
        pytest.param({}, None, {}, {}, {}, id="nothing asked"),
        pytest.param({"requests": {"cpu": "500m"}}, 8, {"maxReplicasPerGPU": 3}, {"cpu": "1500m"}, {}, id="all fit"),
        pytest.param({"requests": {"cpu": "4"}}, 2, {"maxReplicasPerGPU": 3}, {"cpu": "8"}, {}, id="two fit"),
        pytest.param(
            {"limits": {"cpu": "4", "memory": "8Gi"}},
            1,
            {"maxReplicasPerGPU": 2},
            {"cpu": "4", "memory": "8Gi"},
            {"cpu": "8", "memory": "16Gi"},
            id="a limit doesn't become the request of all",
        ),
        pytest.param(
            {"requests": {"cpu": "1"}},
            None,
            {"maxReplicasPerGPU": 1, "extend": PAIR},
            {"cpu": "3"},
            {},
            id="an extension",
        ),
        pytest.param(
            {"requests": {"ephemeral-storage": "10Gi"}}, 8, {}, {"ephemeral-storage": "10Gi"}, {}, id="the pod's own"
        ),
    ],
)
def test_the_pod_has_cpu_and_memory_of_the_replicas_that_are_tried(
    resources: Any, room: int | None, measurement: Any, requests: Any, limits: Any
) -> None:
    assert resources_with(resources, room, **measurement) == {"requests": requests | GPU, "limits": limits | GPU}


@pytest.mark.parametrize(
    ("asked", "node", "room"),
    [
        ({}, {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}, None),
        ({"requests": {"cpu": "2"}}, {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}, 3),  # 0.9 x 8 cores a GPU
        ({"requests": {"cpu": "2"}}, {"cpu": "64", "nvidia.com/gpu": "1"}, 28),
        (
            {"requests": {"cpu": "2"}, "limits": {"memory": "30Gi"}},
            {"cpu": "64", "memory": "128Gi", "nvidia.com/gpu": "1"},
            3,
        ),
        ({"requests": {"cpu": "9"}}, {"cpu": "64", "nvidia.com/gpu": "8"}, 1),
        ({"requests": {"cpu": "2"}}, {"cpu": "64", "nvidia.com/gpu": "0"}, None),
    ],
)
def test_a_node_has_room_beside_one_gpu_for_so_many(asked: Any, node: Any, room: int | None) -> None:
    assert room_on(make_profile(template={"spec": {"engine": {"resources": asked}}}), node) == room


def test_trials_find_a_place_for_mps_and_shared_memory_on_a_gpu_alone() -> None:
    pod = pod_of(make_profile(maxReplicasPerGPU=3))
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/mps"]]["emptyDir"] == {}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}
    assert not {"/mps", "/dev/shm"} & {mount["mountPath"] for mount in engine_of(make_profile(CPU))["volumeMounts"]}


def test_the_lengths_are_mounted_as_they_were_at_the_start() -> None:
    profile = make_profile(lengthsFrom={"configMap": {"name": "chat", "key": "lengths.csv"}})
    volume = next(volume for volume in pod_of(profile)["volumes"] if volume["name"] == "tightship-lengths")
    mount = next(mount for mount in engine_of(profile)["volumeMounts"] if mount["name"] == "tightship-lengths")
    assert volume["configMap"] == {"name": "chat", "items": [{"key": "lengths.csv", "path": "lengths"}]}
    assert mount["readOnly"] is True
    assert mount["subPath"] == "lengths"
    assert env_of(profile)["TIGHTSHIP_LENGTHS_FILE"] == mount["mountPath"]
    assert "TIGHTSHIP_LENGTHS_FILE" not in env_of(make_profile())


@pytest.mark.parametrize(("most", "cores"), [(8, "4"), (1, "2")])
def test_on_cpu_the_pod_is_guaranteed_whole_cores_of_the_replicas_it_tries(most: int, cores: str) -> None:
    profile = make_profile(CPU, maxReplicasPerGPU=most)
    pod = pod_of(profile)
    amount = {"cpu": cores, "memory": "8Gi"}
    assert pod["containers"][0]["resources"] == {"requests": amount, "limits": amount}
    for container in pod["initContainers"]:
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert labels.NODE_GPU_PRODUCT not in pod.get("nodeSelector", {})
    assert env_of(profile)["TIGHTSHIP_DEVICE_MEMORY"] == str(8 * 2**30)


@pytest.mark.parametrize("budget", ["20m", "90s"])
def test_the_pods_deadline_is_far_beyond_the_budget(budget: str) -> None:
    seconds = {"20m": 1200, "90s": 90}[budget]
    profile = make_profile(budget=budget, maxReplicasPerGPU=2)
    assert pod_of(profile)["activeDeadlineSeconds"] == seconds + 7200 + 2 * 600
    profile = make_profile(budget=budget, maxReplicasPerGPU=2, extend={**PAIR, "budget": "10m"})
    assert pod_of(profile)["activeDeadlineSeconds"] == seconds + 600 + 7200 + 3 * 600


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
