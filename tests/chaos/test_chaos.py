"""The short run that is part of `make test`, with real processes too; `make chaos SEED= EVENTS=` is the long one."""

from __future__ import annotations

import os

import pytest

from chaos.runner import Run
from chaos.world import world

SEED = int(os.environ.get("SEED") or 1825)
EVENTS = {"processes": 6, "hollow": 10}


@pytest.mark.needs("network_namespace", "kubectl")
@pytest.mark.parametrize("kind", EVENTS)
def test_a_short_run_violates_nothing(kind: str) -> None:
    with world("embedded", hollow=kind == "hollow") as made:
        run = Run(made, SEED, EVENTS[kind])
        run.run()
        assert run.tracker.starts >= len(made.services)
    assert run.happened == EVENTS[kind]
