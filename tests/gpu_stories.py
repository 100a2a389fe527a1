"""The stories of simulated GPUs, told once and run on both control planes.

Each is a function of a `Sandbox` with two nodes of two simulated H100s and a running operator, and leaves it as it found it.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import story
from tightship.sandbox.cluster import Sandbox

SAMPLES = Path(__file__).resolve().parent.parent / "docs" / "samples"
STORIES: list[Callable[[Sandbox], None]] = []


def told(function: Callable[[Sandbox], None]) -> Callable[[Sandbox], None]:
    """Register a story."""
    STORIES.append(function)
    return function


def make_models(folder: Path) -> str:
    """What the volume behind the claim `models` holds: `too-big`, whose 70 billion weights no simulated GPU takes."""
    config = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
        "vocab_size": 128256,
    }
    (folder / "too-big").mkdir()
    (folder / "too-big" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return str(folder)


def clean(sandbox: Sandbox) -> None:
    """Delete what a story made, and see that nothing is left of it."""
    sandbox.kubectl("delete", "llm,bprof", "--all", "--wait=false")
    story.wait_until(
        sandbox,
        "every pack, holder, replica and Job is gone",
        lambda: (
            not story.packs(sandbox)
            and not story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/part-of=tightship")
        ),
        90,
    )


@told
def from_apply_to_packed_replicas(sandbox: Sandbox) -> None:
    """Apply the sample; it is measured, advised, packed two by two on two GPUs, answers, scales, and goes, its profile stays."""
    service = yaml.safe_load((SAMPLES / "llmservice-opt.yaml").read_text())
    name, model = service["metadata"]["name"], service["spec"]["model"]["servedName"]
    service["spec"]["profiling"]["budget"] = "75s"
    story.apply(sandbox, service)
    sandbox.kubectl("wait", f"llm/{name}", "--for=condition=Profiled", "--timeout=240s")
    for gate in ("Recommended", "Packed", "Ready"):
        sandbox.kubectl("wait", f"llm/{name}", f"--for=condition={gate}", "--timeout=120s")
    ready = story.wait_ready(sandbox, name, 4)

    profile = story.get(sandbox, f"bprof/{ready['status']['profile']['name']}")
    curve = sorted((p["batch"], float(p["totalTokensPerSecond"])) for p in profile["status"]["points"])
    assert len(curve) >= 5
    assert all(later > earlier for (_, earlier), (_, later) in itertools.pairwise(curve[:4])), (
        f"the curve doesn't rise: {curve}"
    )
    gains = [later / earlier for (_, earlier), (_, later) in itertools.pairwise(curve)]
    assert gains[-1] < gains[0] * 0.75, f"the curve doesn't flatten: {curve}"
    assert profile["status"]["memory"]["replica"]
    assert ready["status"]["recommendation"]["replicasPerGPU"] == 2
    assert sorted(story.packs(sandbox).values()) == [2, 2]
    assert ready["status"]["gpus"] == {"used": 2, "saved": 2}

    uids = {pod["metadata"]["uid"] for pod in story.replica_pods(sandbox, name)}
    story.wait_until(
        sandbox, "every replica is attached to its MPS daemon", lambda: story.attached_pods(sandbox) >= uids, 60
    )
    for pack in story.items(sandbox, "gpupacks"):
        assert story.condition(pack, "SharingReady")["reason"] == "MPSActive"
    assert story.complete(sandbox, name, model)["choices"][0]["text"]
    chat = story.complete(sandbox, name, model, "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
    assert chat["choices"][0]["message"]["content"]
    story.check_settled(sandbox)

    by_age = sorted(story.items(sandbox, "gpupacks"), key=lambda pack: pack["metadata"]["name"])
    sandbox.kubectl("scale", f"llm/{name}", "--replicas=3")
    story.wait_ready(sandbox, name, 3)
    assert story.packs(sandbox) == {by_age[0]["metadata"]["name"]: 2, by_age[1]["metadata"]["name"]: 1}, (
        "the newest pack empties first"
    )
    sandbox.kubectl("scale", f"llm/{name}", "--replicas=1")
    story.wait_ready(sandbox, name, 1)
    story.wait_until(sandbox, "the emptied pack is gone", lambda: list(story.packs(sandbox).values()) == [1])
    sandbox.kubectl("scale", f"llm/{name}", "--replicas=2")
    story.wait_ready(sandbox, name, 2)
    assert list(story.packs(sandbox).values()) == [2], "a partly used pack is filled before another is opened"
    story.check_settled(sandbox)

    sandbox.kubectl("delete", f"llm/{name}")
    story.wait_until(
        sandbox,
        "its packs and pods are gone",
        lambda: not story.packs(sandbox) and not story.replica_pods(sandbox, name),
        90,
    )
    assert not story.items(sandbox, "sts,svc", "-l", f"tightship.dev/service={name}")
    assert [p["metadata"]["name"] for p in story.items(sandbox, "bprof")] == [profile["metadata"]["name"]], (
        "the profile stays"
    )


@told
def the_same_key_costs_no_gpu_time(sandbox: Sandbox) -> None:
    """A profile imported from Git serves a service with its key at once; a changed objective is decided again without a Job."""
    service = story.make_service()
    story.apply(sandbox, story.make_profile(service), service)
    assert story.wait_condition(sandbox, "llm/opt", "Profiled")["reason"] in ("CacheHit", "Imported")
    ready = story.wait_ready(sandbox, "opt", 4)
    first = ready["status"]["recommendation"]
    tighter = story.make_service(slo__objectives=[{"metric": "InterTokenLatency", "statistic": "mean", "max": "11ms"}])
    story.apply(sandbox, tighter)
    story.wait_until(
        sandbox,
        "a smaller batch is recommended",
        lambda: story.get(sandbox, "llm/opt")["status"]["recommendation"]["batch"] < first["batch"],
        30,
    )
    assert not story.items(sandbox, "jobs"), "nothing was measured again"
    assert story.condition(story.get(sandbox, "bprof/imported"), "Complete")["reason"] == "Imported"


def start_spans(sandbox: Sandbox) -> dict[str, list[tuple[str, str]]]:
    """For every pack, when engines were starting: (start, healthy) times from the replicas' own logs."""
    spans: dict[str, list[tuple[str, str]]] = {}
    for pod in story.items(sandbox, "pods", "-l", "app.kubernetes.io/component=replica"):
        name, pack = pod["metadata"]["name"], pod["metadata"]["labels"]["tightship.dev/pack"]
        for words in (("logs", name, "-c", "engine"), ("logs", name, "-c", "engine", "--previous")):
            log = sandbox.kubectl(*words, check=False)
            events = re.findall(r"(?m)^(\S+) tightship: (starting|the engine is healthy)", log)
            for (since, what), (until, then) in itertools.pairwise(events):
                if (what, then) == ("starting", "the engine is healthy"):
                    spans.setdefault(pack, []).append((since, until))
    return spans


def check_starts(sandbox: Sandbox, least: int) -> None:
    """No two engines of one GPU were starting at once; at least `least` starts were seen."""
    spans = start_spans(sandbox)
    assert sum(map(len, spans.values())) >= least, f"too few starts seen: {spans}"
    for pack, times in spans.items():
        times.sort()
        for (_, until), (since, _) in itertools.pairwise(times):
            assert since >= until, f"two engines started at once on {pack}: {times}"


@told
def starts_are_one_at_a_time(sandbox: Sandbox) -> None:
    """Replicas of one GPU start one after the other, also after all of them crash together."""
    service = story.make_service()
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 4)
    check_starts(sandbox, 4)
    pods = story.replica_pods(sandbox, "opt")
    uids = {pod["metadata"]["uid"] for pod in pods}
    for pod in pods:
        sandbox.kill_container(pod["metadata"]["name"], "engine", reason="Error")
    story.wait_until(
        sandbox,
        "every replica was restarted",
        lambda: all(
            status["restartCount"] >= 1
            for pod in story.replica_pods(sandbox, "opt")
            for status in pod["status"].get("containerStatuses", [{"restartCount": 0}])
        ),
        60,
    )
    story.wait_ready(sandbox, "opt", 4)
    check_starts(sandbox, 8)
    assert {pod["metadata"]["uid"] for pod in story.replica_pods(sandbox, "opt")} == uids, (
        "crashed replicas restart in place"
    )


@told
def a_lost_holder_is_replaced(sandbox: Sandbox) -> None:
    """Without its holder nobody may use the GPU: the replicas stop, a new holder comes, the replicas start again."""
    service = story.make_service(replicas=2)
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 2)
    holder = story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/component=holder")[0]
    sandbox.kill_pod_processes(holder["metadata"]["uid"])
    sandbox.kubectl(
        "delete",
        "pod",
        "-n",
        holder["metadata"]["namespace"],
        holder["metadata"]["name"],
        "--grace-period=0",
        "--force",
    )
    story.wait_until(
        sandbox,
        "another holder holds the GPU",
        lambda: (
            [
                pod["metadata"]["uid"]
                for pod in story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/component=holder")
                if story.condition(pod, "Ready")["status"] == "True"
            ]
            not in ([], [holder["metadata"]["uid"]])
        ),
        90,
    )
    story.wait_ready(sandbox, "opt", 2, 180)
    story.check_settled(sandbox)
    uids = {pod["metadata"]["uid"] for pod in story.replica_pods(sandbox, "opt")}
    story.wait_until(sandbox, "every replica is attached again", lambda: story.attached_pods(sandbox) >= uids)


@told
def the_operator_may_die_at_any_moment(sandbox: Sandbox) -> None:
    """Killed while measuring, while packing, while scaling and while deleting, the operator ends in the same state."""
    service = story.make_service(profiling__budget="45s")
    story.apply(sandbox, service)
    story.wait_condition(sandbox, "llm/opt", "Profiled", "False", "Measuring", seconds=90)
    restart(sandbox)
    story.wait_condition(sandbox, "llm/opt", "Profiled", seconds=180)
    restart(sandbox)
    story.wait_until(sandbox, "the first pack is made", lambda: bool(story.packs(sandbox)))
    restart(sandbox)
    story.wait_ready(sandbox, "opt", 4)
    sandbox.kubectl("scale", "llm/opt", "--replicas=1")
    restart(sandbox)
    story.wait_ready(sandbox, "opt", 1)
    story.wait_until(sandbox, "one pack is left", lambda: list(story.packs(sandbox).values()) == [1])
    story.check_settled(sandbox)
    assert len(story.items(sandbox, "jobs")) == 1, "nothing was measured twice"
    sandbox.kubectl("delete", "llm/opt")
    restart(sandbox)
    story.wait_until(sandbox, "its packs are gone", lambda: not story.packs(sandbox), 90)


def after(seconds: float, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `look` sees some time later: the only way to see that nothing happens."""
    time.sleep(seconds)
    return look()


def restart(sandbox: Sandbox) -> None:
    """Kill the operator (SIGKILL) and start it again."""
    sandbox.kill_operator()
    sandbox.start_operator()


@told
def evictions_stay_within_the_budget(sandbox: Sandbox) -> None:
    """Of four replicas evictions get one at a time, and the service stays available; where there are no budgets, it says so."""
    service = story.make_service()
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 4)
    if not story.serves(sandbox, "policy/v1"):
        said = story.condition(story.get(sandbox, "llm/opt"), "Accepted")["message"]
        assert "doesn't serve policy/v1 (PodDisruptionBudget)" in said
        return
    story.wait_until(
        sandbox,
        "one disruption is allowed",
        lambda: story.get(sandbox, "pdb/opt").get("status", {}).get("disruptionsAllowed") == 1,
    )
    assert re.search(r"^opt\s+N/A\s+1\s+1\s", sandbox.kubectl("get", "pdb"), re.MULTILINE)
    first, second = story.replica_pods(sandbox, "opt")[:2]
    assert "TooManyRequests" not in evict(sandbox, first)
    assert "disruption budget" in evict(sandbox, second)
    story.wait_until(
        sandbox,
        "the evicted replica is seen to be missing",
        lambda: ready_replicas(sandbox) < 4 or gone(sandbox, first),
    )
    assert story.condition(story.get(sandbox, "llm/opt"), "Available")["status"] == "True"
    story.wait_ready(sandbox, "opt", 4)
    assert second["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in story.replica_pods(sandbox, "opt")}
    sandbox.kubectl("delete", "llm/opt")
    story.wait_until(sandbox, "the budget goes with its service", lambda: not story.get(sandbox, "pdb/opt"))


def evict(sandbox: Sandbox, pod: dict[str, Any]) -> str:
    """Ask for a pod's eviction, as a drain does; the answer."""
    metadata = {name: pod["metadata"][name] for name in ("name", "namespace")}
    body = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
    return sandbox.kubectl("create", "--raw", path, "-f", "-", stdin=body, check=False)


def ready_replicas(sandbox: Sandbox) -> int:
    return int(story.get(sandbox, "llm/opt")["status"]["readyReplicas"])


def gone(sandbox: Sandbox, pod: dict[str, Any]) -> bool:
    """Whether that very pod is there no more."""
    return pod["metadata"]["uid"] not in {each["metadata"]["uid"] for each in story.replica_pods(sandbox, "opt")}


@told
def a_settled_cluster_is_left_alone(sandbox: Sandbox) -> None:
    """Nothing changes, so nothing is written: resource versions stand still, and nothing differs after an operator's restart."""
    service = story.make_service(replicas=2)
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 2)

    def objects(*left_out: str) -> dict[str, Any]:
        """The objects of the story, less some metadata."""
        return {
            f"{obj['kind']}/{obj['metadata']['name']}": {
                **obj,
                "metadata": {
                    key: value for key, value in obj["metadata"].items() if key not in ("managedFields", *left_out)
                },
            }
            for kind in ("llm", "bprof", "gpack", "sts", "svc", "pdb", "pods")
            for obj in story.items(sandbox, kind)
        }

    story.wait_until(sandbox, "nothing is written any more", lambda: objects() == after(4, objects), 60)
    # A new operator asks the server once whether all is as it should be; 1.20 stamps the time of that into managedFields.
    before = objects("resourceVersion")
    restart(sandbox)
    later = after(8, lambda: objects("resourceVersion"))
    assert later == before, {name for name in later if later[name] != before.get(name)}


@told
def wrong_input_is_told_at_once(sandbox: Sandbox) -> None:
    """Every wrong manifest ends in a condition or an admission error that says what to do, and nothing half-made."""
    story.apply(sandbox, story.make_service("unknown", accelerator__product="NVIDIA-B300"))
    told_so = story.wait_condition(sandbox, "llm/unknown", "Accepted", "False", "UnsupportedAccelerator")
    assert story.PRODUCT in told_so["message"], "the products that the cluster has are named"

    story.apply(
        sandbox,
        story.make_service("elsewhere", profileRef={"name": "imported"}),
        story.make_profile(story.make_service(engine__args=[])),
    )
    told_so = story.wait_condition(sandbox, "llm/elsewhere", "Accepted", "False", "InvalidSpec")
    assert "imported" in told_so["message"]

    slow = story.make_service(
        "slow", slo__objectives=[{"metric": "InterTokenLatency", "statistic": "mean", "max": "2ms"}]
    )
    story.apply(sandbox, story.make_profile(slow, name="published"), slow)
    told_so = story.wait_condition(sandbox, "llm/slow", "Recommended", "False", "SLOInfeasible")
    assert "3.62ms" in told_so["message"], "the best that can be had is said"
    big = story.make_service("big", engine__args=["--dtype=auto"])
    story.apply(sandbox, story.make_profile(big, name="too-big", replica=90), big)
    told_so = story.wait_condition(sandbox, "llm/big", "Recommended", "False", "InsufficientMemory")
    assert "80" in told_so["message"]

    # Admission refuses these where it knows CEL; where it doesn't, the operator does, in the same words.
    for number, arg in enumerate(("--max_num_seqs=7", "--gpu-memory-util=0.9", "-tp=2", "--port", "--ssl-keyfile=x")):
        refused = story.make_service(f"arg-{number}", engine__args=[arg])
        answer = sandbox.kubectl("apply", "--validate=false", "-f", "-", stdin=json.dumps(refused), check=False)
        if "created" in answer:
            answer = story.wait_condition(sandbox, f"llm/arg-{number}", "Accepted", "False", "InvalidSpec")["message"]
        assert "refused engine argument" in answer or "parallel sizes above 1 are refused" in answer

    sandbox.kubectl("create", "service", "clusterip", "taken", "--tcp=80:80")
    taken = story.make_service("taken")
    story.apply(sandbox, taken)
    assert "taken" in story.wait_condition(sandbox, "llm/taken", "Accepted", "False", "NameConflict")["message"]
    assert "tightship" not in json.dumps(story.get(sandbox, "svc/taken")["spec"])
    # The service first: once the name is free it would be packed, by the profile that `slow` has.
    sandbox.kubectl("delete", "llm/taken")
    sandbox.kubectl("delete", "svc/taken")

    assert "greater than or equal to 0" in sandbox.kubectl("scale", "llm/slow", "--replicas=-1", check=False)
    negative = story.make_service("negative", replicas=-1)
    assert "spec.replicas" in sandbox.kubectl(
        "apply", "--validate=false", "-f", "-", stdin=json.dumps(negative), check=False
    )
    assert not story.packs(sandbox)
    assert not story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/part-of=tightship")


@told
def the_engines_own_words_reach_the_user(sandbox: Sandbox) -> None:
    """A model path that isn't there and an argument that vLLM refuses end in EngineFailed with vLLM's last words."""
    absent = story.make_service("absent", model__source="pvc://models/no/such/model")
    story.apply(sandbox, absent)
    refused = story.make_service("refused", engine__args=["--no-such-flag"])
    story.apply(sandbox, refused)
    for name, words in (("absent", "no/such/model"), ("refused", "unrecognized arguments: --no-such-flag")):
        told_so = story.wait_condition(sandbox, f"llm/{name}", "Profiled", "False", "EngineFailed", seconds=120)
        assert words in told_so["message"]
        assert story.condition(story.get(sandbox, f"llm/{name}"), "Ready")["reason"] == "EngineFailed"
    heavy = story.make_service("heavy", model__source="pvc://models/too-big")
    story.apply(sandbox, heavy)
    told_so = story.wait_condition(sandbox, "llm/heavy", "Profiled", "False", "InsufficientMemory", seconds=120)
    assert "CUDA out of memory" in told_so["message"]
    assert not story.packs(sandbox)


@told
def more_replicas_than_gpus(sandbox: Sandbox) -> None:
    """Four GPUs hold eight replicas: the ninth is said to be missing, the eight serve, and all is well again at eight."""
    service = story.make_service(replicas=9)
    story.apply(sandbox, story.make_profile(service), service)
    told_so = story.wait_condition(sandbox, "llm/opt", "Packed", "False", "InsufficientGPUs")
    assert re.search(r"\b8\b.*\b9\b|\b9\b.*\b8\b|\b1\b", told_so["message"]), told_so
    story.wait_until(
        sandbox, "eight replicas serve", lambda: story.get(sandbox, "llm/opt")["status"].get("readyReplicas") == 8, 180
    )
    sandbox.kubectl("scale", "llm/opt", "--replicas=8")
    story.wait_ready(sandbox, "opt", 8)


@told
def a_manifest_changed_while_measuring(sandbox: Sandbox) -> None:
    """A new key takes a new profile; the measurement nobody wants any more gives its GPU back."""
    story.apply(sandbox, story.make_service(profiling__budget="60s"))
    story.wait_condition(sandbox, "llm/opt", "Profiled", "False", "Measuring", seconds=90)
    changed = story.make_service(engine__maxModelLen=1024, replicas=1)
    story.apply(sandbox, story.make_profile(changed), changed)
    story.wait_ready(sandbox, "opt", 1)
    story.wait_until(
        sandbox,
        "the old measurement's pod is gone",
        lambda: not story.items(sandbox, "pods", "-l", "app.kubernetes.io/component=profiler"),
        60,
    )


@told
def waiting_for_approval(sandbox: Sandbox) -> None:
    """autoApply: false stops at the recommendation; true packs it."""
    service = story.make_service(replicas=1, autoApply=False)
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_condition(sandbox, "llm/opt", "Packed", "False", "AwaitingApproval")
    waiting: dict[str, Any] = story.get(sandbox, "llm/opt")
    assert waiting["status"]["recommendation"]["batch"] > 0
    assert not story.packs(sandbox)
    sandbox.kubectl("patch", "llm/opt", "--type=merge", "-p", '{"spec":{"autoApply":true}}')
    story.wait_ready(sandbox, "opt", 1)


@told
def a_gpu_each(sandbox: Sandbox) -> None:
    """Exclusive: each replica requests its own GPU, without holder and MPS, says which one it got, and gives it back."""
    service = story.make_service(replicas=2, packing={"mode": "Exclusive"})
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 2)
    gpacks = story.items(sandbox, "gpupacks")
    there = {uuid for node in range(2) for uuid in sandbox.gpu_uuids(node)}
    assert len({pack["status"]["gpu"]["uuid"] for pack in gpacks} & there) == 2
    for pack in gpacks:
        assert story.condition(pack, "SharingReady")["reason"] == "Exclusive"
    assert not story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/component=holder")
    assert story.complete(sandbox, "opt", "opt-1.3b")["choices"][0]["text"]
    story.check_settled(sandbox)


@told
def two_services_share_a_gpu(sandbox: Sandbox) -> None:
    """Services that allow it run on one GPU under one MPS daemon, started one after the other; who opened the GPU may go, the other stays."""
    sharing = {"maxReplicasPerGPU": 2, "sharedWith": "SameNamespace"}
    one = story.make_service("one", replicas=1, packing=sharing)
    two = story.make_service(
        "two", replicas=1, packing=sharing, engine__maxModelLen=1024, model__servedName="opt-short"
    )
    served = {"one": "opt-1.3b", "two": "opt-short"}
    story.apply(sandbox, story.make_profile(one, name="first"), story.make_profile(two, name="second"), one, two)
    for name in served:
        story.wait_ready(sandbox, name, 1)
    assert list(story.packs(sandbox).values()) == [2]
    pods = {name: story.replica_pods(sandbox, name)[0]["metadata"]["uid"] for name in served}
    story.wait_until(
        sandbox, "both are attached to one daemon", lambda: story.attached_pods(sandbox) >= set(pods.values())
    )
    check_starts(sandbox, 2)
    for name, model in served.items():
        assert story.complete(sandbox, name, model)["choices"][0]["text"]
        assert "that mix was not measured" in story.wait_condition(sandbox, f"llm/{name}", "Packed")["message"]
    story.check_settled(sandbox)

    (pack,) = story.items(sandbox, "gpupacks")
    owner = pack["metadata"]["labels"]["tightship.dev/service"]
    (tenant,) = set(served) - {owner}
    sandbox.kubectl("delete", f"llm/{owner}")
    story.wait_until(sandbox, "only the tenant is left", lambda: story.packs(sandbox) == {pack["metadata"]["name"]: 1})
    story.wait_until(sandbox, "the owner's pod is gone", lambda: not story.replica_pods(sandbox, owner))
    story.wait_ready(sandbox, tenant, 1)
    assert story.replica_pods(sandbox, tenant)[0]["metadata"]["uid"] == pods[tenant], "the tenant was left alone"
    assert story.complete(sandbox, tenant, served[tenant])["choices"][0]["text"]
    story.check_settled(sandbox)


class Users:
    """Threads that send one request after the other to a service, each on a connection of its own, and remember what failed."""

    def __init__(self, sandbox: Sandbox, model: str, threads: int = 4) -> None:
        self.answered, self.failed = 0, []  # type: ignore[var-annotated]
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(sandbox, model)) for _ in range(threads)]

    def _ask(self, sandbox: Sandbox, model: str) -> None:
        while not self._end.is_set():
            try:
                made = story.complete(sandbox, "opt", model, prompt="The sea was", max_tokens=64)
                assert made["usage"]["completion_tokens"] == 64
                self.answered += 1
            except (OSError, AssertionError, KeyError) as error:
                self.failed.append(repr(error))

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


@told
def changes_reach_the_replicas_without_an_outage(sandbox: Sandbox) -> None:
    """A change is rolled out, and then a node is emptied, while users send requests: none fails, and never two replicas are away."""
    service = story.make_service()
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 4)
    before = {pod["metadata"]["uid"] for pod in story.replica_pods(sandbox, "opt")}
    least = 4

    def unless_done(done: Callable[[], bool]) -> bool:
        nonlocal least
        least = min(least, ready_replicas(sandbox))
        return done()

    def rolled() -> bool:
        return not before & {pod["metadata"]["uid"] for pod in story.replica_pods(sandbox, "opt")}

    with Users(sandbox, "opt-1.3b") as users:
        changed = {"template": {"metadata": {"annotations": {"example.com/note": "changed"}}}}
        sandbox.kubectl("patch", "llm/opt", "--type=merge", "-p", json.dumps({"spec": changed}))
        story.wait_until(sandbox, "every replica is a new one", lambda: unless_done(rolled), 90)
        story.wait_ready(sandbox, "opt", 4)
        assert least >= 3
        node = story.items(sandbox, "gpupacks")[0]["status"]["node"]
        sandbox.kubectl("cordon", node)
        try:

            def emptied() -> bool:
                return node not in {pack.get("status", {}).get("node") for pack in story.items(sandbox, "gpupacks")}

            least = 4
            story.wait_until(sandbox, f"nothing is left on {node}", lambda: unless_done(emptied), 90)
            story.wait_ready(sandbox, "opt", 4)
        finally:
            sandbox.kubectl("uncordon", node)
        assert least >= 3  # all four, unless a loaded machine makes one late to answer its probe
    assert not users.failed, f"{len(users.failed)} of {len(users.failed) + users.answered} failed: {users.failed[:3]}"
    assert users.answered > 20
    story.check_settled(sandbox)
