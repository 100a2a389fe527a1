"""The stories of simulated GPUs on the real control plane."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gpu_stories
import story
from tightship.sandbox.cluster import Sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, kube_assets: Path) -> Iterator[Sandbox]:
    models = gpu_stories.make_models(tmp_path_factory.mktemp("models"))
    with Sandbox(plane="real", state=tmp_path_factory.mktemp("sandbox"), operator=True, models=models) as running:
        yield running


@pytest.mark.parametrize("tell", gpu_stories.STORIES, ids=lambda tell: tell.__name__)
def test_story(sandbox: Sandbox, tell: Callable[[Sandbox], None]) -> None:
    try:
        tell(sandbox)
    finally:
        gpu_stories.clean(sandbox)


def test_a_namespace_that_refuses_pods_is_quoted_and_nothing_is_half_made(sandbox: Sandbox) -> None:
    """A LimitRange keeps the pack from taking its GPU; a quota lets one replica of two in. Both come in the server's words."""

    def rule(kind: str, **spec: object) -> None:
        made = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "rule", "namespace": "default"}, "spec": spec}
        sandbox.kubectl("apply", "-f", "-", stdin=json.dumps(made))

    def refused(words: str) -> None:
        def told() -> bool:
            packed = story.condition(story.get(sandbox, "llm/opt"), "Packed")
            return packed["reason"] == "SharingUnavailable" and words in packed["message"]

        story.wait_until(sandbox, f"Packed=False SharingUnavailable with {words!r}", told, 90)

    try:
        rule("LimitRange", limits=[{"type": "Container", "max": {"memory": "1Mi"}}])
        service = story.make_service(replicas=2)
        story.apply(sandbox, story.make_profile(service), service)
        refused("maximum memory usage per Container is 1Mi")
        assert not story.items(sandbox, "pods,sts,sa,role", "-A", "-l", "tightship.dev/pack")
        rule("ResourceQuota", hard={"pods": "1"})
        sandbox.kubectl("delete", "limitrange", "rule")
        refused("exceeded quota: rule, requested: pods=1, used: pods=1, limited: pods=1")
        assert len(story.replica_pods(sandbox, "opt")) == 1
    finally:
        sandbox.kubectl("delete", "limitrange,resourcequota", "rule", "--ignore-not-found")
        gpu_stories.clean(sandbox)
