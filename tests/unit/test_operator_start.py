"""The operator's start: the lease is kept while the cluster is read, and losing it then ends the start."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tightship.kube.lease import LeaseLost
from tightship.kube.transport import load_configuration
from tightship.operator_main import Operator, Options

CONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
users: [{name: u, user: {}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


class Starting(Operator):
    """An operator whose reading of the cluster never ends, with a lease that is lost at a word."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.reading, self.lose = asyncio.Event(), asyncio.Event()

    def _lease(self) -> Starting:  # type: ignore[override]
        return self

    async def _prepare(self, lease: object) -> None:
        return None

    async def _look_around(self) -> None:
        self.reading.set()
        await asyncio.Event().wait()

    async def keep(self) -> None:
        await self.lose.wait()
        raise LeaseLost("lease x is held by another now")

    async def release(self) -> None:
        return None


async def make_operator(folder: Path) -> Starting:
    file = folder / "config"
    file.write_text(CONFIG)
    configuration = await load_configuration(str(file), None)
    return Starting(configuration, Options(telemetry_host="127.0.0.1", telemetry_port=0))


async def test_a_lease_lost_while_the_cluster_is_read_ends_the_process(tmp_path: Path) -> None:
    operator = await make_operator(tmp_path)
    running = asyncio.create_task(operator.run(asyncio.Event()))
    await operator.reading.wait()
    operator.lose.set()
    assert await running == 1
    assert operator.health.problem == "lease x is held by another now"


async def test_a_stop_while_the_cluster_is_read_is_a_clean_one(tmp_path: Path) -> None:
    operator, stop = await make_operator(tmp_path), asyncio.Event()
    running = asyncio.create_task(operator.run(stop))
    await operator.reading.wait()
    stop.set()
    assert await running == 0
