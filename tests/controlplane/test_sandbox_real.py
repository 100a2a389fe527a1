"""The node agent's stories on the real control plane."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import agent_stories
from tightship.sandbox.cluster import Sandbox

pytestmark = pytest.mark.needs("network_namespace")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, kube_assets: Path, kubectl: Path) -> Iterator[Sandbox]:
    with Sandbox(
        plane="real",
        state=tmp_path_factory.mktemp("sandbox"),
        operator=False,
        timing=agent_stories.TIMING,
        engine_cores=[max(os.sched_getaffinity(0))],
    ) as running:
        yield running


@pytest.mark.parametrize("tell", agent_stories.STORIES, ids=lambda tell: tell.__name__)
def test_story(sandbox: Sandbox, tell: Callable[[Sandbox], None]) -> None:
    try:
        tell(sandbox)
    finally:
        agent_stories.clean(sandbox)
