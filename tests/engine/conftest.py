"""What the tests with the real engine need of the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


@pytest.fixture(scope="session")
def fair_cores() -> Iterator[None]:
    """Lets engines of different pods compete for a core thread by thread, for as long as these tests run.

    Without a container's control groups each pod's session is a scheduling group of its own (Linux's autogroup). Engines poll while they wait
    (`sched_yield`), and between groups Linux 6.18 lets the one that has been polling wait for up to a minute: then two replicas
    on one core take turns of 30 s, which no client can average over. No deployment puts two replicas on one core; this test does.
    """
    try:
        before = AUTOGROUP.read_text()
        AUTOGROUP.write_text("0")
    except OSError:  # no such kernel option, or not ours to change
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            AUTOGROUP.write_text(before)
