"""The stories of simulated GPUs on the embedded control plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gpu_stories
from tightship.sandbox.cluster import Sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, kubectl: Path) -> Iterator[Sandbox]:
    models = gpu_stories.make_models(tmp_path_factory.mktemp("models"))
    with Sandbox(plane="embedded", state=tmp_path_factory.mktemp("sandbox"), operator=True, models=models) as running:
        yield running


@pytest.mark.parametrize("tell", gpu_stories.STORIES, ids=lambda tell: tell.__name__)
def test_story(sandbox: Sandbox, tell: Callable[[Sandbox], None]) -> None:
    try:
        tell(sandbox)
    finally:
        gpu_stories.clean(sandbox)
