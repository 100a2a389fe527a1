"""The StatefulSet of a service on a pack: what a replica gets, and what must not change it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import ProfileEngine
from tightship.api.v1alpha1.gpupack import Assignment, GPUPack
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests.podparts import OperatorImage, model_argument, node_affinity
from tightship.manifests.replicas import (
    DRAIN_SECONDS,
    GRACE_SECONDS,
    Place,
    Setup,
    engine_command,
    memory_of,
    revision,
    set_name,
    statefulset,
)

GIB = 2**30


def make_setup(*, pack=None, engine=None, replicas=2, **changes):
    service = make_service(**changes)
    service["metadata"] |= {"uid": "service-uid", "generation": 3}
    spec = {"namespace": "default", "product": "H100", "runAsUser": 1000, "assignments": []} | (pack or {})
    return Setup(
        LLMService.model_validate(service),
        GPUPack.model_validate({"metadata": {"name": "default-opt-0", "uid": "pack-uid"}, "spec": spec}),
        Assignment(
            service="opt",
            uid="service-uid",
            replicas=replicas,
            batch=96,
            kv_cache="12Gi",
            memory_per_replica="20Gi",
            profile="p",
        ),
        Place("n0", "GPU-1", 80 * GIB),
        ProfileEngine.model_validate(
            engine or {"maxNumBatchedTokens": 8192, "captureSizes": [1, 2, 4], "modelCommit": "abc"}
        ),
        OperatorImage("tightship/operator:1"),
    )


def make_cpu_setup(**changes):
    accelerator = {"device": "cpu", "cores": 4, "coresPerReplica": 2, "memory": "64Gi"}
    pack = {"device": "cpu", "mode": "CPUSet", "node": "n0", "cores": 4, "memory": "64Gi", "runAsUser": 0}
    setup = make_setup(accelerator=accelerator, pack=pack, **changes)
    return replace(setup, place=Place("n0", None, 64 * GIB))


def pod(setup):
    return statefulset(setup, 2)["spec"]["template"]["spec"]


def environment(setup):
    return {each["name"]: each.get("value") for each in pod(setup)["containers"][0]["env"]}


def test_the_command_says_everything_that_was_decided_and_measured():
    command = engine_command(make_setup())
    assert command[:3] == ["python3", "-m", "vllm.entrypoints.openai.api_server"]
    text = " ".join(command)
    for part in (
        "--model facebook/opt-1.3b",
        "--served-model-name opt-1.3b",
        "--port 8000",
        "--revision abc",
        "--max-model-len 2048",
        "--dtype=float16",
        "--max-num-seqs 96",
        f"--kv-cache-memory-bytes {12 * GIB}",
        "--max-num-batched-tokens 8192",
        "--cudagraph-capture-sizes 1 2 4",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        (["--max_num_batched_tokens=64"], "--max-num-batched-tokens"),
        (["--enforce-eager"], "--cudagraph-capture-sizes"),
        (["--cudagraph-capture-sizes", "1"], "--cudagraph-capture-sizes 1 2 4"),
        (["--compilation-config={}"], "--cudagraph-capture-sizes"),
    ],
)
def test_what_the_user_says_of_an_engine_setting_stands(args, absent):
    assert absent not in " ".join(engine_command(make_setup(engine__args=args)))


CDI_NAME = "k8s.device-plugin.nvidia.com/gpu=GPU-1"


@pytest.mark.parametrize(
    ("naming", "visible", "told", "annotations"),
    [
        ("legacy", "GPU-1", None, {"a": "b"}),
        ("cdi", CDI_NAME, "cdi", {"a": "b"}),
        ("nri", "void", "nri", {"a": "b", "nvidia.cdi.k8s.io/container.engine": CDI_NAME}),
    ],
)
def test_the_three_ways_of_naming_the_gpu(naming, visible, told, annotations):
    setup = replace(make_setup(template__metadata={"annotations": {"a": "b"}}), naming=naming)
    values = environment(setup)
    assert (values["NVIDIA_VISIBLE_DEVICES"], values.get("TIGHTSHIP_GPU_NAMING")) == (visible, told)
    assert values["TIGHTSHIP_GPU_UUID"] == "GPU-1", "what the preflight compares"
    assert statefulset(setup, 2)["spec"]["template"]["metadata"]["annotations"] == annotations


@pytest.mark.parametrize("naming", ["legacy", "cdi", "nri"])
def test_replicas_with_a_gpu_of_their_own_name_none(naming):
    setup = replace(make_setup(pack={"mode": "Exclusive"}), place=Place(None, None, None), naming=naming)
    assert not {"NVIDIA_VISIBLE_DEVICES", "TIGHTSHIP_GPU_UUID", "TIGHTSHIP_GPU_NAMING"} & set(environment(setup))
    assert "annotations" not in statefulset(setup, 2)["spec"]["template"]["metadata"]


def test_a_gpu_replica_shares_what_it_must_and_nothing_more():
    setup = make_setup()
    values = environment(setup)
    assert values["TIGHTSHIP_MEMORY_BYTES"] == str(20 * GIB)
    assert values["CUDA_MPS_PIPE_DIRECTORY"] == "/mps/pipe"
    assert values["TIGHTSHIP_PACK_UID"] == "pack-uid"
    mounts = {each["name"]: each["mountPath"] for each in pod(setup)["containers"][0]["volumeMounts"]}
    assert mounts == {"tightship": "/tightship", "pack": "/run/tightship/pack", "mps": "/mps", "shm": "/dev/shm"}
    paths = {v["name"]: v["hostPath"]["path"] for v in pod(setup)["volumes"] if "hostPath" in v}
    assert paths == {
        "pack": "/run/tightship/pack-uid",
        "mps": "/run/tightship/pack-uid/mps",
        "shm": "/run/tightship/pack-uid/shm",
    }
    assert pod(setup)["securityContext"]["runAsUser"] == 1000
    assert DRAIN_SECONDS < GRACE_SECONDS - 10


def test_a_cpu_replica_is_guaranteed_whole_cores_and_its_share_of_the_reserve():
    setup = make_cpu_setup()
    resources = pod(setup)["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"] == "2"
    assert 20 * GIB < int(resources["limits"]["memory"]) <= 64 * GIB / 3
    assert not any(name.startswith(("CUDA_", "NVIDIA_", "VLLM_")) for name in environment(setup))
    assert "--cudagraph-capture-sizes" not in engine_command(setup)
    assert [each["name"] for each in pod(setup)["initContainers"]] == ["inject"]
    other = replace(
        setup, pack=setup.pack.model_copy(update={"spec": setup.pack.spec.model_copy(update={"run_as_user": 5})})
    )
    assert [each["name"] for each in pod(other)["initContainers"]] == ["prepare", "inject"]


def test_scaling_changes_no_pod_template():
    few, many = make_setup(replicas=1), make_setup(replicas=4)
    assert statefulset(few, 1)["spec"]["template"] == statefulset(many, 4)["spec"]["template"]


TEMPLATE = {
    "spec": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]}
}


@pytest.mark.parametrize(
    ("what", "changed", "same"),
    [
        ("the operator's image", lambda: replace(make_setup(), image=OperatorImage("tightship/operator:2", "Always")), True),
        ("how many there are", lambda: make_setup(replicas=4), True),
        ("how memory is written", lambda: with_assignment(memory_per_replica="20480Mi"), True),
        ("what is so anyway", lambda: make_setup(template={"spec": {}}, engine__args=["--dtype=float16"]), True),
        ("what is the holder's", lambda: make_setup(template=TEMPLATE), True),
        ("what is not for replicas", lambda: make_setup(rollout={"maxUnavailable": 2}), True),
        ("the engine's image", lambda: make_setup(engine__image="vllm/vllm-openai:next"), False),
        ("its arguments", lambda: make_setup(engine__args=["--enforce-eager"]), False),
        ("the model", lambda: make_setup(model__servedName="other"), False),
        ("the template", lambda: make_setup(template={"metadata": {"annotations": {"note": "new"}}}), False),
        ("the batch", lambda: with_assignment(batch=97), False),
        ("the KV cache", lambda: with_assignment(kv_cache="13Gi"), False),
        ("the memory", lambda: with_assignment(memory_per_replica="21Gi"), False),
        ("the node", lambda: replace(make_setup(), place=Place("n1", "GPU-1", 80 * GIB)), False),
        ("the GPU", lambda: replace(make_setup(), place=Place("n0", "GPU-2", 80 * GIB)), False),
        ("how it is named", lambda: replace(make_setup(), naming="cdi"), False),
        ("the user", lambda: make_setup(pack={"runAsUser": 5}), False),
        ("what was measured", lambda: make_setup(engine={"maxNumBatchedTokens": 4096, "captureSizes": [1, 2, 4], "modelCommit": "abc"}), False),
    ],
)  # fmt: skip
def test_the_revision_is_of_what_replicas_are_made_from(what, changed, same):
    assert (revision(make_setup()) == revision(changed())) is same, what
    if same and not what.startswith("the operator"):
        assert statefulset(make_setup(), 2)["spec"]["template"] == statefulset(changed(), 2)["spec"]["template"]


def with_assignment(**changes):
    setup = make_setup()
    return replace(setup, assignment=setup.assignment.model_copy(update=changes))


@pytest.mark.parametrize(
    ("reserve", "place"), [("8Gi", Place("n0", None, 64 * GIB)), ("4Gi", Place("n0", None, 65 * GIB))]
)
def test_on_cores_the_revision_is_also_of_what_makes_up_a_replica_s_memory(reserve, place):
    before = make_cpu_setup(packing={"memoryReserve": "4Gi"})
    after = replace(make_cpu_setup(packing={"memoryReserve": reserve}), place=place)
    assert revision(before) != revision(after)
    assert pod(before) != pod(after)


def test_our_labels_win_over_the_user_s_and_the_selector_names_replicas():
    setup = make_setup(template={"metadata": {"labels": {labels.COMPONENT: "mine", "team": "a"}}})
    made = statefulset(setup, 2)
    carried = made["spec"]["template"]["metadata"]["labels"]
    assert (carried[labels.COMPONENT], carried["team"]) == ("replica", "a")
    assert made["spec"]["selector"]["matchLabels"].items() <= carried.items()
    assert made["metadata"]["ownerReferences"][0]["uid"] == "service-uid"


def test_the_user_s_affinity_keeps_its_alternatives_and_gets_ours_in_each():
    base = {
        "podAntiAffinity": {"x": 1},
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"matchFields": []}]
            }
        },
    }
    made = node_affinity(base, node="n0")
    terms = made["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    pin = {"key": "metadata.name", "operator": "In", "values": ["n0"]}
    assert [term["matchFields"] for term in terms] == [[pin], [pin]]
    assert terms[0]["matchExpressions"] == [{"key": "a", "operator": "Exists"}]
    assert made["podAntiAffinity"] == {"x": 1}
    assert base["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][1] == {
        "matchFields": []
    }


@pytest.mark.parametrize(
    ("model", "argument", "mounts"),
    [
        ({"source": "hf://facebook/opt-1.3b"}, "facebook/opt-1.3b", []),
        ({"source": "hf://a/b", "cache": {"pvc": "hub"}}, "a/b", [{"name": "models", "mountPath": "/models"}]),
        (
            {"source": "pvc://models/tiny/llama"},
            "/models/tiny/llama",
            [{"name": "models", "mountPath": "/models", "readOnly": True}],
        ),
    ],
)
def test_where_the_model_comes_from(model, argument, mounts):
    setup = make_setup(model=model)
    assert model_argument(setup.service.spec.model) == argument
    assert [m for m in pod(setup)["containers"][0]["volumeMounts"] if m["name"] == "models"] == mounts
    assert ("HF_HOME" in environment(setup)) == ("cache" in model)


def test_a_pod_tells_what_the_ledger_grants_it():
    assert memory_of(statefulset(make_setup(), 1)["spec"]["template"]) == 20 * GIB
    assert memory_of({"spec": {"containers": [{"name": "x"}]}}) == 0


def test_set_names_stay_below_the_limit_of_their_pods():
    assert set_name("opt", "default-opt-0") == "opt-b6799853"
    assert len(set_name("s" * 40, "p" * 50)) < 52
