"""The node agent's pure parts, as tables: quantities, environment, devices, status, the plan of a root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tightship.sandbox.agent import env, rootfs, status
from tightship.sandbox.agent.devices import Addresses, Grant, Refused, Stock, qos_class
from tightship.sandbox.agent.proxy import Proxy
from tightship.sandbox.agent.status import ContainerState, Terminated

NOW = "2026-01-01T00:00:00Z"


def make_pod(uid: str = "u", *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "n", "uid": uid, "labels": {"b": 'say "hi"', "a": "1"}},
        "spec": {"containers": list(containers) or [make_container()], "nodeName": "node", **spec},
        "status": {"podIP": "10.244.1.2", "hostIP": "10.244.1.1"},
    }


def make_container(name: str = "c", requests: dict[str, str] | None = None, **limits: str) -> dict[str, Any]:
    fixed = {key.replace("gpu", "nvidia.com/gpu"): value for key, value in limits.items()}
    return {"name": name, "resources": {"limits": fixed, **({"requests": requests} if requests else {})}}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)", "1"),
        ("x$(A)$(B)y", "x12y"),
        ("$(NONE)", "$(NONE)"),
        ("$$(A)", "$(A)"),
        ("$A ${A}", "$A ${A}"),
    ],
)
def test_expansion(text: str, expanded: str) -> None:
    assert env.expand(text, {"A": "1", "B": "2"}) == expanded


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "p"),
        ("metadata.labels['a']", "1"),
        ("metadata.labels['absent']", ""),
        ("metadata.labels", 'a="1"\nb="say \\"hi\\""'),
        ("status.podIP", "10.244.1.2"),
        ("spec.serviceAccountName", "default"),
    ],
)
def test_fields(path: str, value: str) -> None:
    assert env.field_value(make_pod(), path) == value


def resolve(entries: list[dict[str, Any]], data: dict[tuple[str, str], dict[str, str]], **more: Any) -> dict[str, str]:
    container = {**make_container(cpu="1500m"), "env": entries, **more}
    scope = env.Scope(make_pod(), container, lambda *key: data.get(key), {"cpu": "8", "memory": "1Gi"})
    return env.resolve(scope, {"BASE": "b"})


def test_later_variables_see_earlier_ones_only() -> None:
    found = resolve([{"name": "A", "value": "$(BASE)$(B)"}, {"name": "B", "value": "$(A)"}], {})
    assert found == {"BASE": "b", "A": "b$(B)", "B": "b$(B)"}


def test_references_resolve_and_optional_ones_may_be_missing() -> None:
    data = {("configmap", "cm"): {"k": "v"}, ("secret", "s"): {"x": "y"}}
    entries = [
        {"name": "K", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k"}}},
        {"name": "GONE", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k", "optional": True}}},
        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ]
    found = resolve(entries, data, envFrom=[{"secretRef": {"name": "s"}, "prefix": "P_"}])
    assert found == {"BASE": "b", "P_x": "y", "K": "v", "CPU": "2", "MEM": "1024"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"configMapKeyRef": {"name": "none", "key": "k"}}, 'configmap "none" not found'),
        ({"secretKeyRef": {"name": "s", "key": "k"}}, "couldn't find key k in secret s"),
        ({"fieldRef": {"fieldPath": "spec.nonsense"}}, "unsupported fieldPath"),
    ],
)
def test_missing_references_are_named(source: dict[str, Any], message: str) -> None:
    with pytest.raises(env.ConfigError, match=message):
        resolve([{"name": "K", "valueFrom": source}], {("secret", "s"): {}})


def test_service_variables_are_of_the_namespace_and_of_the_api_server() -> None:
    def service(address: str, port: int) -> dict[str, Any]:
        return {"spec": {"clusterIP": address, "ports": [{"port": port, "name": "http"}]}}

    services = {
        "default/kubernetes": service("10.96.0.1", 443),
        "n/my-web": service("10.96.0.2", 80),
        "other/web": service("10.96.0.3", 80),
        "n/headless": service("None", 80),
    }
    found = env.service_variables(services, "n", links=True)
    assert {name for name in found if name.endswith("_HOST")} == {"KUBERNETES_SERVICE_HOST", "MY_WEB_SERVICE_HOST"}
    assert found["MY_WEB_PORT"] == "tcp://10.96.0.2:80"
    assert not [name for name in env.service_variables(services, "n", links=False) if name.startswith("MY")]


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (make_container(), "BestEffort"),
        (make_container(requests={"cpu": "1"}), "Burstable"),
        (make_container(cpu="1", memory="1Gi"), "Guaranteed"),
        (make_container(requests={"cpu": "1"}, cpu="2", memory="1Gi"), "Burstable"),
    ],
)
def test_qos_classes(container: dict[str, Any], expected: str) -> None:
    assert qos_class(make_pod("u", container)) == expected


def test_a_gpu_belongs_to_one_container_until_it_is_given_back() -> None:
    stock = Stock(("g0", "g1"), cpus=4, pods=10)
    assert stock.admit(make_pod("a", make_container(gpu="1"))) == {"c": Grant(("g0",))}
    assert stock.admit(make_pod("a", make_container(gpu="1"))) == {"c": Grant(("g0",))}, "admitting twice is once"
    assert stock.admit(make_pod("b", make_container(gpu="1"))) == {"c": Grant(("g1",))}
    with pytest.raises(Refused, match="Requested: 1, Available: 0") as refused:
        stock.admit(make_pod("c", make_container(gpu="1")))
    assert refused.value.reason == "UnexpectedAdmissionError"
    stock.release("a")
    assert stock.admit(make_pod("c", make_container(gpu="1"))) == {"c": Grant(("g0",))}


def test_a_missing_gpu_is_not_handed_out() -> None:
    stock = Stock(("g0", "g1"), cpus=4, pods=10, missing={"g0"})
    assert stock.healthy_gpus() == 1
    assert stock.admit(make_pod("a", make_container(gpu="1")))["c"].gpus == ("g1",)


def test_whole_cpus_of_guaranteed_pods_are_exclusive() -> None:
    stock = Stock((), cpus=4, pods=10, reserved_cpus=1)
    whole = {"cpu": "2", "memory": "1Gi"}
    assert stock.admit(make_pod("a", make_container(**whole)))["c"].cpus == (1, 2)
    assert stock.admit(make_pod("b", make_container(cpu="500m", memory="1Gi")))["c"].cpus == ()
    assert stock.admit(make_pod("c", make_container(requests={"cpu": "2"})))["c"].cpus == ()
    with pytest.raises(Refused) as refused:
        stock.admit(make_pod("d", make_container(**whole)))
    assert refused.value.reason == "OutOfcpu"


def test_no_place_for_another_pod() -> None:
    stock = Stock((), cpus=1, pods=1)
    stock.admit(make_pod("a"))
    with pytest.raises(Refused) as refused:
        stock.admit(make_pod("b"))
    assert refused.value.reason == "OutOfpods"


def test_an_address_is_not_used_again_at_once() -> None:
    addresses = Addresses("10.244.1")
    first = addresses.take()
    addresses.free(first)
    seen = [addresses.take() for _ in range(252)]
    assert first not in seen
    assert addresses.take() == first
    with pytest.raises(Refused, match="253 in use"):
        addresses.take()


def running(ready: bool = True) -> ContainerState:
    return ContainerState("c", "i", running_since=NOW, ready=ready, started=True)


def ended(code: int, good: bool = True) -> ContainerState:
    return ContainerState("c", "i", terminated=Terminated(code, "", "", NOW, NOW), finished_for_good=good)


def waiting(crashed: bool = False) -> ContainerState:
    return ContainerState("c", "i", last=Terminated(1, "", "", NOW, NOW) if crashed else None)


@pytest.mark.parametrize(
    ("policy", "inits", "mains", "expected"),
    [
        ("Always", [], [waiting()], "Pending"),
        ("Always", [running()], [waiting()], "Pending"),
        ("Never", [ended(1)], [waiting()], "Failed"),
        ("Always", [ended(1)], [waiting()], "Pending"),
        ("Always", [ended(0)], [running()], "Running"),
        ("Always", [], [running(), waiting()], "Running"),
        ("Always", [], [waiting(crashed=True)], "Running"),
        ("Always", [], [ended(0)], "Running"),
        ("Never", [], [ended(0), ended(0)], "Succeeded"),
        ("Never", [], [ended(0), ended(1)], "Failed"),
        ("Never", [], [ended(0), running()], "Running"),
        ("OnFailure", [], [ended(1, good=False)], "Running"),
        ("OnFailure", [], [ended(0)], "Succeeded"),
    ],
)
def test_phases(policy: str, inits: list[ContainerState], mains: list[ContainerState], expected: str) -> None:
    assert status.phase(policy, inits, mains) == expected


def conditions(pod: dict[str, Any], phase: str, *mains: ContainerState) -> dict[str, dict[str, Any]]:
    return {c["type"]: c for c in status.conditions(pod, phase, [], list(mains), "2026-02-02T00:00:00Z")}


def test_what_a_watch_shows_late_moves_no_condition_back() -> None:
    """Two versions under way would else be written in turn for ever, each because the other is shown."""
    late = make_pod()
    late["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Ready", "status": "True", "lastTransitionTime": NOW},
    ]
    own = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:01Z"}
    found = conditions(status.with_own(late, {"conditions": [own]}), "Running", running())
    assert found["Ready"]["lastTransitionTime"] == own["lastTransitionTime"]
    assert found["PodScheduled"]["status"] == "True"
    assert conditions(status.with_own(late, None), "Running", running())["Ready"]["lastTransitionTime"] == NOW


@pytest.mark.parametrize(
    ("seen", "contradicts"),
    [
        ({}, False),
        ({"Ready": "True"}, False),
        ({"Ready": "False"}, True),
        ({"PodScheduled": "False"}, False),
    ],
)
def test_a_condition_that_another_has_turned_is_noticed(seen: dict[str, str], contradicts: bool) -> None:
    """The node controller marks the pods of a node that it hears nothing from; the agent is to say otherwise when it is back."""
    pod = make_pod()
    pod["status"]["conditions"] = [{"type": kind, "status": value} for kind, value in seen.items()]
    wanted = {"conditions": [{"type": kind, "status": "True"} for kind in ("PodScheduled", "Ready")]}
    assert status.contradicted(pod, wanted) is contradicts


def test_conditions_move_only_when_they_flip_and_keep_what_others_wrote() -> None:
    pod = make_pod()
    pod["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": NOW},
        {"type": "Ready", "status": "True", "lastTransitionTime": NOW},
    ]
    same = conditions(pod, "Running", running())
    assert same["Ready"]["lastTransitionTime"] == NOW
    assert same["PodScheduled"]["status"] == "True"
    flipped = conditions(pod, "Running", running(ready=False))
    assert (flipped["Ready"]["status"], flipped["Ready"]["reason"]) == ("False", "ContainersNotReady")
    assert flipped["Ready"]["lastTransitionTime"] == "2026-02-02T00:00:00Z"
    assert flipped["Ready"]["message"] == "containers with unready status: [c]"


def test_a_completed_pod_says_so() -> None:
    found = conditions(make_pod(), "Succeeded", ended(0))
    assert {found[kind]["reason"] for kind in ("Initialized", "Ready", "ContainersReady")} == {"PodCompleted"}
    assert found["Initialized"]["status"] == "True"
    assert found["Ready"]["status"] == "False"


def test_a_readiness_gate_holds_ready_back_alone() -> None:
    found = conditions(make_pod(readinessGates=[{"conditionType": "x/gate"}]), "Running", running())
    assert (found["Ready"]["status"], found["Ready"]["reason"]) == ("False", "ReadinessGatesNotReady")
    assert found["ContainersReady"]["status"] == "True"


def test_the_root_is_rebuilt_only_where_a_mount_point_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "have" / "point").mkdir(parents=True)
    (tmp_path / "lack" / "other").mkdir(parents=True)
    (tmp_path / "lack" / "file").write_text("x")
    (tmp_path / "lack" / "link").symlink_to("file")
    base = str(tmp_path)
    mounts = [
        rootfs.Mount(f"{base}/have/point", "/source/a"),
        rootfs.Mount(f"{base}/lack/new/deep", "/source/b", read_only=True),
        rootfs.Mount(f"{base}/lack/new/deep/inner", None, size=4096),
    ]
    before = sorted(tmp_path.rglob("*"))
    operations = rootfs.plan(mounts)
    assert sorted(tmp_path.rglob("*")) == before, "planning touches nothing"
    assert ["bind", f"{base}/have", f"{base}/have", "rw"] in operations
    assert ["bind", "/source/a", f"{base}/have/point", "rw"] in operations
    assert ["bind", f"{base}/lack", f"{base}/lack", "rw"] not in operations
    assert ["bind", f"{base}/lack/other", f"{base}/lack/other", "rw"] in operations
    assert ["bind", f"{base}/lack/file", f"{base}/lack/file", "rw"] in operations
    assert ["link", f"{base}/lack/link", "file"] in operations
    assert ["bind", "/source/b", f"{base}/lack/new/deep", "ro"] in operations
    inner = operations.index(["tmpfs", f"{base}/lack/new/deep/inner", "mode=1777,size=4096"])
    assert operations.index(["bind", "/source/b", f"{base}/lack/new/deep", "ro"]) < inner


def test_the_proxy_knows_ready_addresses_by_port_name() -> None:
    subset = {
        "addresses": [{"ip": "10.244.1.2"}, {"ip": "10.244.2.2"}],
        "notReadyAddresses": [{"ip": "10.244.1.3"}],
        "ports": [{"name": "http", "port": 8000}, {"name": "metrics", "port": 9000}],
    }
    proxy = Proxy({}, {"n/web": {"subsets": [subset]}})
    assert proxy.targets("n/web", "http") == [("10.244.1.2", 8000), ("10.244.2.2", 8000)]
    assert proxy.targets("n/web", "other") == []
    assert proxy.targets("n/none", "http") == []
