"""The operator as a process, on the embedded control plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import operator_stories
from tightship.sandbox.cluster import Sandbox

pytestmark = pytest.mark.needs("network_namespace", "kubectl")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    state = tmp_path_factory.mktemp("sandbox")
    with Sandbox(plane="embedded", state=state, operator=False, nodes=0) as running:
        yield running


@pytest.mark.parametrize("tell", operator_stories.STORIES, ids=lambda tell: tell.__name__)
def test_story(sandbox: Sandbox, tmp_path: Path, tell: Callable[[Sandbox, Path], None]) -> None:
    try:
        tell(sandbox, tmp_path / "operator.log")
    finally:
        operator_stories.clean(sandbox)
