"""Faults of a GPU that two packs' worth of replicas are served from, with real processes: who stops, who doesn't, and what users see.

One service with two replicas on each of two GPUs runs through all stories in a row, and a client asks it all the time: whatever happens to
one GPU, each of its requests is answered, if not at the first try.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import story
from tightship.api.v1alpha1.labels import ANNOTATION_MPS
from tightship.sandbox.cluster import Sandbox

SYSTEM = "tightship-system"
ANSWER_SECONDS = 20.0
"""What a request may take with all its tries: replicas that stop are endpoints until the control plane has heard of it."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, kubectl: Path) -> Iterator[Sandbox]:
    """One node with two GPUs; the kubelet's first back-off and the limit of a hang are shorter than in a cluster."""
    with Sandbox(
        plane="embedded",
        state=tmp_path_factory.mktemp("sandbox"),
        operator=True,
        nodes=1,
        timing={"backoff_first": 1.0},
        engine_environment={"TIGHTSHIP_HANG_TIMEOUT": "4", "TIGHTSHIP_SIM_START_SECONDS": "0.5"},
    ) as running:
        service = story.make_service()
        story.apply(running, story.make_profile(service), service)
        story.wait_ready(running, "opt", 4)
        yield running


class Client:
    """Asks the Service all the time; `slowest` is the longest that a request took with all its tries, in seconds."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._url = f"{sandbox.gateway_url}/default/opt/v1/completions"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = 0
        self.tries = 0
        self.slowest = 0.0

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            begun = time.monotonic()
            while not self._ask() and time.monotonic() - begun < 3 * ANSWER_SECONDS:
                time.sleep(0.2)
            self.answers += 1
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def _ask(self) -> bool:
        body = json.dumps({"model": "opt-1.3b", "prompt": "The sea was", "max_tokens": 8}).encode()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        self.tries += 1
        try:
            with urllib.request.urlopen(urllib.request.Request(self._url, body, headers), timeout=3) as response:
                return bool(json.load(response)["choices"])
        except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError, KeyError):
            return False


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    """A client beside the story; at its end every request has been answered."""
    with Client(sandbox) as asking:
        yield asking
        give_up = time.monotonic() + ANSWER_SECONDS
        while asking.answers <= 5 and time.monotonic() < give_up:
            time.sleep(0.2)
    assert asking.answers > 5
    assert asking.slowest < ANSWER_SECONDS, f"{asking.answers} answers took {asking.tries} tries"


def packs(sandbox: Sandbox) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pack that a story breaks, and the one that nothing may happen to."""
    first, second = sorted(story.items(sandbox, "gpupacks"), key=lambda pack: str(pack["metadata"]["name"]))
    return first, second


def containers(sandbox: Sandbox, pack: dict[str, Any]) -> dict[tuple[str, str], int]:
    """How often each container of each pod of a pack was started anew, by pod UID and name."""
    pods = story.items(sandbox, "pods", "-A", "-l", f"tightship.dev/pack={pack['metadata']['name']}")
    return {
        (pod["metadata"]["uid"], each["name"]): int(each["restartCount"])
        for pod in pods
        for each in pod["status"].get("containerStatuses", [])
    }


def holder_of(sandbox: Sandbox, pack: dict[str, Any]) -> dict[str, Any]:
    return story.get(sandbox, "pod", "-n", SYSTEM, f"holder-{pack['metadata']['name']}")


def engines(counts: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return {key: count for key, count in counts.items() if key[1] == "engine"}


def wait_well(sandbox: Sandbox, pack: dict[str, Any]) -> None:
    """The service is Ready again, and every replica of the pack is attached."""
    story.wait_ready(sandbox, "opt", 4)
    story.wait_condition(sandbox, f"gpack/{pack['metadata']['name']}", "SharingReady", "True", "MPSActive")


def test_a_fatal_fault_takes_the_replicas_of_its_gpu_and_no_others(sandbox: Sandbox, client: Client) -> None:
    broken, well = packs(sandbox)
    name = broken["metadata"]["name"]
    before, others = containers(sandbox, broken), containers(sandbox, well)
    sandbox.control_gpu(broken["status"]["gpu"]["uuid"], "fault")
    words = story.wait_condition(sandbox, f"gpack/{name}", "SharingReady", "False", "MPSFault")["message"]
    assert "clients left; fault 1 within an hour" in words
    story.wait_until(
        sandbox, "the repair has ended", lambda: "ended" in story.get(sandbox, f"gpack/{name}")["status"]["repair"]
    )
    wait_well(sandbox, broken)
    after = containers(sandbox, broken)
    assert set(engines(before)).isdisjoint(engines(after)), "both replicas were made anew"
    assert {key: count for key, count in after.items() if key in before} == {
        key: count for key, count in before.items() if key[1] != "engine"
    }, "the holder stayed as it was"
    assert containers(sandbox, well) == others
    for replica in story.get(sandbox, f"gpack/{name}")["status"]["replicas"]:
        assert replica["preflight"]["uuid"] == broken["status"]["gpu"]["uuid"]


def test_a_killed_daemon_restarts_the_replicas_of_its_gpu_in_place(sandbox: Sandbox, client: Client) -> None:
    broken, well = packs(sandbox)
    before, others = containers(sandbox, broken), containers(sandbox, well)
    pipe = sandbox.node_dir(0) / "root/run/tightship" / broken["metadata"]["uid"] / "mps/pipe"
    pid = (pipe / "nvidia-cuda-mps-control.pid").read_text().strip()
    sandbox.exec_in_namespace(["kill", "-KILL", pid])
    story.wait_until(
        sandbox,
        "daemon and engines were started anew",
        lambda: all(
            containers(sandbox, broken).get(key, 0) > count for key, count in before.items() if key[1] != "watch"
        ),
    )
    wait_well(sandbox, broken)
    after = containers(sandbox, broken)
    assert set(after) == set(before), "no pod was made anew"
    (mps,) = (each for each in holder_of(sandbox, broken)["status"]["containerStatuses"] if each["name"] == "mps")
    assert "ended by itself with signal 9" in mps["lastState"]["terminated"]["message"]
    assert containers(sandbox, well) == others


def test_a_killed_watcher_stops_nothing(sandbox: Sandbox, client: Client) -> None:
    broken, well = packs(sandbox)
    before, others = containers(sandbox, broken), containers(sandbox, well)
    holder = holder_of(sandbox, broken)["metadata"]
    watch = (holder["uid"], "watch")
    sandbox.kill_container(holder["name"], "watch", reason="Error", namespace=SYSTEM)
    story.wait_until(
        sandbox, "the watcher runs again", lambda: containers(sandbox, broken).get(watch, 0) > before[watch]
    )
    wait_well(sandbox, broken)
    assert containers(sandbox, broken) == before | {watch: before[watch] + 1}
    assert containers(sandbox, well) == others


def test_an_engine_that_hangs_while_health_answers_is_started_anew(sandbox: Sandbox, client: Client) -> None:
    broken, well = packs(sandbox)
    before, others = containers(sandbox, broken), containers(sandbox, well)
    seen = json.loads(holder_of(sandbox, broken)["metadata"]["annotations"][ANNOTATION_MPS])["clients"][0]
    hung = (seen["podUID"], "engine")
    sandbox.control_gpu(broken["status"]["gpu"]["uuid"], "hang", pid=seen["pid"])
    words = story.wait_condition(
        sandbox, f"gpack/{broken['metadata']['name']}", "ReplicasReady", "False", "EngineHung"
    )["message"]
    assert "(limit 4 s) no step ended" in words
    wait_well(sandbox, broken)
    assert containers(sandbox, broken) == before | {hung: before[hung] + 1}, "nobody else was touched"
    assert containers(sandbox, well) == others


def test_holders_that_leave_in_order_leave_nothing_on_the_node(sandbox: Sandbox) -> None:
    directories = [sandbox.node_dir(0) / "root/run/tightship" / pack["metadata"]["uid"] for pack in packs(sandbox)]
    assert all((path / "gpu.json").exists() for path in directories)
    sandbox.kubectl("delete", "llm/opt")
    story.wait_until(
        sandbox,
        "packs and pods are gone",
        lambda: (
            not story.packs(sandbox)
            and not story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/part-of=tightship")
        ),
        90,
    )
    assert [[each for each in path.rglob("*") if not each.is_dir()] for path in directories] == [[], []]
