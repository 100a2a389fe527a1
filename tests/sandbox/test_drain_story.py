"""`kubectl drain` of a node with all GPUs of a service: it waits until they have moved, and nobody notices; with nowhere to go it doesn't wait."""

from __future__ import annotations

import threading

import pytest

import story
from chaos.world import HOLLOW, LEASE, TIMING
from tightship.reconcile import podstate
from tightship.sandbox.cluster import Sandbox

NODE, OTHER = "sandbox-0", "sandbox-1"


def on(sandbox: Sandbox, node: str) -> list[str]:
    """Names of the pods that are on a node."""
    pods = story.items(sandbox, "pods", "--all-namespaces")
    return [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName") == node]


def drain(sandbox: Sandbox, node: str) -> None:
    sandbox.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")


@pytest.mark.needs("network_namespace", "kubectl")
def test_a_drain_waits_for_what_can_move_and_for_nothing_else() -> None:
    with Sandbox(
        plane="embedded", nodes=2, gpus_per_node=2, cpus=64, hollow=HOLLOW, timing=TIMING, operator_arguments=LEASE
    ) as sandbox:
        sandbox.kubectl("cordon", OTHER)
        service = story.make_service()
        story.apply(sandbox, story.make_profile(service), service)
        story.wait_ready(sandbox, "opt", 4)
        sandbox.kubectl("uncordon", OTHER)

        draining = threading.Thread(target=drain, args=(sandbox, NODE))
        draining.start()
        least = 4
        while draining.is_alive():
            ready = sum(podstate.is_ready(pod) for pod in story.replica_pods(sandbox, "opt"))
            least = min(least, ready)
        draining.join()
        assert on(sandbox, NODE) == []
        assert least >= 3, "rollout.maxUnavailable is 1"
        story.wait_ready(sandbox, "opt", 4)
        assert {pod["spec"]["nodeName"] for pod in story.replica_pods(sandbox, "opt")} == {OTHER}

        drain(sandbox, OTHER)  # NODE is cordoned still
        assert on(sandbox, OTHER) == []
        found = story.condition(story.get(sandbox, "llm/opt"), "Ready")
        assert found["reason"] == "InsufficientGPUs", found
        sandbox.kubectl("uncordon", NODE)
        story.wait_ready(sandbox, "opt", 4)
