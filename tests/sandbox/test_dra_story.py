"""GPUs by dynamic resource allocation, told from the manifest to the last claim: a fake of NVIDIA's driver on the embedded control plane."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gpu_stories
import story
from tightship.sandbox.cluster import Sandbox

pytest.importorskip("celpy", reason="the embedded scheduler evaluates device selectors with cel-python")

ASK_DAEMON = """
import os, pathlib, sys, tightship.sandbox.simulation.mps as mps
os.chdir(sys.argv[1])  # a socket's address may be no longer than a hundred characters
print(mps.command(pathlib.Path("."), "ps"))
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, kubectl: Path) -> Iterator[Sandbox]:
    with Sandbox(plane="embedded", state=tmp_path_factory.mktemp("sandbox"), operator=True, dra=True) as running:
        yield running


def claims(sandbox: Sandbox) -> dict[str, dict[str, Any]]:
    return {claim["metadata"]["name"]: claim for claim in story.items(sandbox, "resourceclaims")}


def device_of(claim: dict[str, Any]) -> tuple[str, str]:
    (result,) = claim["status"]["allocation"]["devices"]["results"]
    return result["pool"], result["device"]


def clients(sandbox: Sandbox, pack: dict[str, Any]) -> list[str]:
    """What the MPS daemon of a pack's claim answers to `ps`, a line a client."""
    node = int(pack["status"]["node"].rpartition("-")[2])
    uid = claims(sandbox)[pack["metadata"]["name"]]["metadata"]["uid"]
    pipe = sandbox.node_dir(node) / "mps" / uid / "pipe"
    done = sandbox.exec_in_namespace([sys.executable, "-c", ASK_DAEMON, str(pipe)])
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    # The first line has the columns' names, as NVIDIA's.
    return [line for line in done.stdout.splitlines()[1:] if line.strip()]


def test_from_the_manifest_to_claims_and_back(sandbox: Sandbox) -> None:
    """Four replicas on two claimed GPUs under the driver's MPS; scaled, restarted together, and given back; then one GPU each, without."""
    service = story.make_service()
    story.apply(sandbox, story.make_profile(service), service)
    story.wait_ready(sandbox, "opt", 4)
    packs = story.items(sandbox, "gpupacks")
    assert [(pack["spec"]["mode"], pack["status"]["readyReplicas"]) for pack in packs] == [("DRA", 2)] * 2
    assert not story.items(sandbox, "pods", "-A", "-l", "app.kubernetes.io/component=holder")
    for pack in packs:
        shared = story.condition(pack, "SharingReady")
        assert (shared["status"], shared["reason"]) == ("True", "MPSActive")
        assert "mode DRA, chosen by Auto: driver gpu.nvidia.com offers 4 such GPUs" in shared["message"]
        assert pack["status"]["mps"]["attachedReplicas"] == 2
        assert len(clients(sandbox, pack)) == 2, "the driver's daemon says so too"
    assert len({device_of(claim) for claim in claims(sandbox).values()}) == 2
    gpu_stories.check_starts(sandbox, 4)
    assert story.complete(sandbox, "opt", "opt-1.3b")["choices"][0]["text"]
    story.check_settled(sandbox)

    for pod in story.replica_pods(sandbox, "opt"):
        sandbox.kill_container(pod["metadata"]["name"], "engine", reason="Error")
    story.wait_until(
        sandbox,
        "every engine was restarted",
        lambda: all(
            status["restartCount"] >= 1
            for pod in story.replica_pods(sandbox, "opt")
            for status in pod["status"].get("containerStatuses", [{"restartCount": 0}])
        ),
    )
    story.wait_ready(sandbox, "opt", 4)
    gpu_stories.check_starts(sandbox, 8)

    sandbox.kubectl("scale", "llm/opt", "--replicas=1")
    story.wait_ready(sandbox, "opt", 1)
    story.wait_until(sandbox, "one claim is left", lambda: list(claims(sandbox)) == ["default-opt-0"])
    assert len(clients(sandbox, story.items(sandbox, "gpupacks")[0])) == 1

    sandbox.kubectl("patch", "llm/opt", "--type=merge", "-p", '{"spec":{"replicas":2,"packing":{"mode":"Exclusive"}}}')
    story.wait_ready(sandbox, "opt", 2)
    for pack in story.items(sandbox, "gpupacks"):
        assert (pack["spec"]["mode"], pack["spec"]["allocator"]) == ("Exclusive", "DRA")
        assert story.condition(pack, "SharingReady")["reason"] == "Exclusive"
        assert "mps" not in pack["status"]
        assert pack["status"]["gpu"]["uuid"].startswith("GPU-")
    assert story.complete(sandbox, "opt", "opt-1.3b")["choices"][0]["text"]
    story.check_settled(sandbox)

    sandbox.kubectl("delete", "llm/opt")
    story.wait_until(sandbox, "everything is given back", lambda: not story.packs(sandbox) and not claims(sandbox), 90)


def test_a_measurement_claims_its_gpu(sandbox: Sandbox) -> None:
    """Where only DRA has GPUs the profiling Job names a claim, and its engine runs on the GPU that it gets."""
    story.apply(sandbox, story.make_service("new", engine__maxModelLen=1024))

    def seen() -> bool:
        measured = [each for each in story.items(sandbox, "bprof") if each["metadata"]["name"] != "imported"]
        return any(each.get("status", {}).get("gpu", {}).get("product") == story.PRODUCT for each in measured)

    story.wait_until(sandbox, "the profiler has told of its GPU", seen, 90)
    (claim,) = claims(sandbox).values()
    assert claim["metadata"]["name"].endswith("-profiler")
    sandbox.kubectl("delete", "llm/new", "--wait=false")
    sandbox.kubectl("delete", "bprof", "--all")
    story.wait_until(sandbox, "the claim is gone", lambda: not claims(sandbox))
