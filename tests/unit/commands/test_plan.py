"""`tightship plan`: what it reads, what it says, how it ends, and that it says what the operator does."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pack_world import World, make_node
from story import PRODUCT, make_profile, make_service
from tightship.__main__ import main as tightship

SHARED = {"maxReplicasPerGPU": 2, "sharedWith": "SameNamespace"}
TOO_FAST = [{"metric": "InterTokenLatency", "statistic": "mean", "max": "2ms"}]


def make_measured(name: str, **changes: Any) -> list[dict[str, Any]]:
    """A service of a model of its own, and the profile that answers it: two replicas of 20Gi share a GPU of 80Gi."""
    service = make_service(name, model__source=f"hf://models/{name}", **changes)
    return [service, make_profile(service, name=f"profile-{name}")]


def write(path: Path, *objects: Mapping[str, Any]) -> str:
    path.write_text("---\n".join(yaml.safe_dump(dict(obj)) for obj in objects))
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    status = tightship(["plan", "-o", "json", "-f", *args])
    return status, json.loads(capsys.readouterr().out)


def packs(answer: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    return {
        pack["name"]: {each["service"]: each["replicas"] for each in pack["assignments"]} for pack in answer["packs"]
    }


def test_a_plan_without_nodes_says_how_many_gpus_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "all.yaml", *make_measured("opt", replicas=5))
    status, answer = ask(capsys, file)
    assert status == 0
    assert packs(answer) == {"default-opt-0": {"opt": 2}, "default-opt-1": {"opt": 2}, "default-opt-2": {"opt": 1}}
    assert answer["gpus"] == {"used": 3, "onePerReplica": 5, "saved": 2}
    first = answer["packs"][0]
    assert (first["node"], first["product"], first["measured"]) == (None, PRODUCT, True)
    assert first["assignments"][0]["memoryPerReplica"] == "20Gi"
    assert first["memoryFree"] == "36Gi"  # 80Gi less 5 % less two replicas
    assert answer["services"] == [
        {
            "namespace": "default",
            "name": "opt",
            "replicas": 5,
            "placed": 5,
            "replicasPerGPU": 2,
            "reason": None,
            "message": None,
        }
    ]


def test_services_that_allow_it_share_a_gpu_and_the_plan_says_that_nobody_measured_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = [*make_measured("one", replicas=1, packing=SHARED), *make_measured("two", replicas=1, packing=SHARED)]
    assert tightship(["plan", "-f", write(tmp_path / "all.yaml", *objects)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "PACK            NODE   DEVICE                  SERVICE       REPLICAS   BATCH   MEMORY       FREE",
        "default-one-0   any    NVIDIA-H100-80GB-HBM3   default/one   1          96      1 x 20.0Gi   36.0Gi",
        "                                               default/two   1          96      1 x 20.0Gi",
        "",
        f"1 GPU (1 {PRODUCT}) for 2 replicas: 1 fewer than with one replica on each",
        "note: default-one-0 is shared by default/one and default/two: each was measured without the other, so their latencies there are not known",
    ]
    objects[2]["spec"]["packing"]["sharedWith"] = "None"
    status, answer = ask(capsys, write(tmp_path / "apart.yaml", *objects))
    assert (status, packs(answer)) == (0, {"default-one-0": {"one": 1}, "default-two-0": {"two": 1}})


def test_too_few_gpus_are_said_with_numbers_and_a_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "all.yaml", *make_measured("opt", replicas=4))
    nodes = write(tmp_path / "nodes.yaml", {"kind": "NodeList", "items": [without(make_node("n0", 1), "kind")]})
    status, answer = ask(capsys, file, "--nodes", nodes)
    assert status == 3
    assert packs(answer) == {"default-opt-0": {"opt": 2}}
    assert answer["shortfalls"] == [
        {
            "namespace": "default",
            "service": "opt",
            "product": PRODUCT,
            "replicas": 2,
            "unitsNeeded": 1,
            "unitsFree": 0,
            "units": "GPUs",
        }
    ]
    (service,) = answer["services"]
    assert (service["placed"], service["reason"]) == (2, "InsufficientGPUs")
    assert "2 of 4 replicas have no place: they need 1 more" in service["message"]
    assert "Add a node" in service["message"]


def without(obj: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in obj.items() if name != key}


def test_spread_needs_a_second_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "all.yaml", *make_measured("opt", replicas=2, packing={"spread": True}))
    status, answer = ask(capsys, file)
    assert (status, packs(answer)) == (0, {"default-opt-0": {"opt": 1}, "default-opt-1": {"opt": 1}})
    status, answer = ask(capsys, file, "--nodes", write(tmp_path / "nodes.yaml", make_node("n0", 1)))
    assert status == 3
    assert "1 to a pack of 1, where 2 fit, for packing.spread" in answer["services"][0]["message"]


def test_sets_of_cores_name_their_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cores = {"device": "cpu", "cores": 2, "coresPerReplica": 1, "memory": "60Gi"}
    file = write(tmp_path / "all.yaml", *make_measured("opt", replicas=2, accelerator=cores))
    for args, node in (([], None), (["--nodes", write(tmp_path / "nodes.yaml", make_node("n0", 0))], "n0")):
        status, answer = ask(capsys, file, *args)
        assert status == 0
        assert [(pack["node"], pack["cores"]) for pack in answer["packs"]] == [(node, 2)]
        assert answer["gpus"] == {"used": 0, "onePerReplica": 0, "saved": 0}


def test_folders_files_lists_and_standard_input_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, profile), two = make_measured("one", replicas=1), make_measured("two", replicas=1)
    (tmp_path / "services" / "deep").mkdir(parents=True)
    write(tmp_path / "services" / "deep" / "one.yml", one, {"kind": "Deployment", "metadata": {"name": "x"}})
    (tmp_path / "services" / "one.json").write_text(json.dumps(profile))
    (tmp_path / "services" / "notes.txt").write_text("not a manifest")
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump({"kind": "List", "items": two})))
    status, answer = ask(capsys, str(tmp_path / "services"), "-")
    assert (status, packs(answer)) == (0, {"default-one-0": {"one": 1}, "default-two-0": {"two": 1}})


def test_a_profile_as_the_cluster_shows_it_decides_as_the_one_from_git(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service, profile = make_measured("opt", replicas=2)
    status = profile["spec"].pop("results")
    complete = {"type": "Complete", "status": "True", "reason": "Completed", "message": "6 points"}
    profile |= {"status": {**status, "conditions": [complete]}}
    profile["metadata"] |= {"resourceVersion": "77", "uid": "abc"}
    answered, answer = ask(capsys, write(tmp_path / "all.yaml", service, profile))
    assert (answered, packs(answer)) == (0, {"default-opt-0": {"opt": 2}})


def test_a_service_that_waits_for_approval_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = ask(capsys, write(tmp_path / "all.yaml", *make_measured("opt", autoApply=False)))
    assert (status, answer["packs"], answer["services"][0]["reason"]) == (0, [], "AwaitingApproval")
    assert "spec.autoApply" in answer["services"][0]["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slo__objectives": TOO_FAST}, ["SLOInfeasible", "3.62ms > 2ms", "relax the objective"]),
        ({"packing": {"memoryReserve": "75Gi"}}, ["InsufficientMemory"]),
    ],
)
def test_what_no_batch_meets_is_said_and_the_others_are_planned(
    changes: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = [*make_measured("bad", **changes), *make_measured("good", replicas=1)]
    assert tightship(["plan", "-f", write(tmp_path / "all.yaml", *objects)]) == 3
    out = capsys.readouterr().out
    assert "default-good-0" in out
    (line,) = [line for line in out.splitlines() if line.startswith("default/bad: ")]
    assert all(word in line for word in words)


def test_a_product_that_no_node_has_is_said_with_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = write(tmp_path / "nodes.yaml", make_node("n0", 4, product="NVIDIA-L40S"))
    status, answer = ask(capsys, write(tmp_path / "all.yaml", *make_measured("opt")), "--nodes", nodes)
    assert (status, answer["services"][0]["reason"]) == (3, "UnsupportedAccelerator")
    assert "NVIDIA-L40S (4 GPUs on 1 nodes)" in answer["services"][0]["message"]


def test_a_missing_profile_is_named_by_its_key_with_the_ways_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (service, profile), good = make_measured("bad"), make_measured("good", replicas=1)
    status = tightship(["plan", "-f", write(tmp_path / "all.yaml", service, *good)])
    out, err = capsys.readouterr()
    assert status == 2
    assert "default-good-0" in out
    key = profile["spec"]["key"]["hash"][:10]
    assert err.startswith(f"tightship plan: default/bad: no BatchProfile of its key {key} is among the manifests")
    assert "tightship profile -f" in err
    assert f"tightship profile export bad-{key} -n default" in err


def test_lengths_come_from_a_config_map_among_the_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = make_service(replicas=1, workload={"lengthsFrom": {"configMap": {"name": "chat", "key": "lengths.csv"}}})
    assert tightship(["plan", "-f", write(tmp_path / "all.yaml", service)]) == 2
    assert "ConfigMap chat is not in namespace default" in capsys.readouterr().err
    lengths = {"kind": "ConfigMap", "metadata": {"name": "chat"}, "data": {"lengths.csv": "111,292\n"}}
    assert tightship(["plan", "-f", write(tmp_path / "all.yaml", service, lengths)]) == 2
    assert "no BatchProfile of its key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file or directory"),
        ("a: [", "not YAML"),
        ("- just\n- words\n", "a manifest is a mapping, not list"),
        ("kind: LLMService\n", "a LLMService has no metadata.name"),
        ("metadata: {name: x}\n", "an object without a kind"),
        ("kind: Deployment\nmetadata: {name: x}\n", "a Deployment: give LLMService, BatchProfile, ConfigMap"),
        ("kind: Node\nmetadata: {name: x}\n", "nodes go to --nodes"),
        ("kind: BatchProfile\nmetadata: {name: x}\nspec: {}\n", "holds BatchProfile, no LLMService"),
        ("", "no LLMService: there is nothing to place"),
    ],
)
def test_a_wrong_file_is_said_in_one_line(
    text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.yaml"
    if text is not None:
        file.write_text(text)
    assert tightship(["plan", "-f", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert str(file) in err
    assert words in err


@pytest.mark.parametrize("text", ["", "kind: Pod\nmetadata: {name: x}\n", "kind: NodeList\nitems: []\n"])
def test_wrong_nodes_are_said(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text(text)
    assert tightship(["plan", "-f", write(tmp_path / "a.yaml", *make_measured("opt")), "--nodes", str(nodes)]) == 2
    assert "give what `kubectl get nodes -o yaml` prints" in capsys.readouterr().err


def test_the_same_object_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service, profile = make_measured("opt")
    one, other = write(tmp_path / "one.yaml", service, profile), write(tmp_path / "two.yaml", service)
    assert tightship(["plan", "-f", one, "-f", other]) == 2
    assert "LLMService default/opt is in " + one in capsys.readouterr().err


def test_a_manifest_that_the_api_refuses_is_said_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = make_service(engine__args=["--port=1"])
    assert tightship(["plan", "-f", write(tmp_path / "all.yaml", service)]) == 2
    assert "refused engine argument" in capsys.readouterr().err
    profile = make_measured("opt")[1]
    profile["spec"]["key"]["hash"] = "0" * 64
    assert tightship(["plan", "-f", write(tmp_path / "all.yaml", make_measured("opt")[0], profile)]) == 2
    assert "no BatchProfile of its key" in capsys.readouterr().err


async def test_the_operator_does_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = [
        *make_measured("one", replicas=3, packing=SHARED),
        *make_measured("two", replicas=1, packing=SHARED),
        *make_measured("three", replicas=2, packing={"spread": True}),
        *make_measured("four", replicas=3),
    ]
    nodes = [make_node("n0", 3), make_node("n1", 2)]
    status, answer = ask(
        capsys,
        write(tmp_path / "all.yaml", *objects),
        "--nodes",
        write(tmp_path / "nodes.yaml", {"kind": "List", "items": nodes}),
    )
    world = World(gpus=(3, 2), profiling=True)
    for obj in reversed(objects):
        world.put(obj)
    await world.run(rounds=20)
    made = {
        pack["metadata"]["name"]: {each["service"]: each["replicas"] for each in pack["spec"]["assignments"]}
        for pack in world.all("GPUPack")
    }
    assert packs(answer) == made
    for service in answer["services"]:
        condition = world.condition("LLMService", "default", service["name"], "Packed")
        if service["reason"] is not None:
            assert condition[1:] == (service["reason"], service["message"])
        else:
            assert condition[0] == "True"
    assert status == 3
