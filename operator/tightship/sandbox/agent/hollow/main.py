"""`python -m tightship.sandbox.agent --hollow CONFIG`: run hollow nodes, anywhere the API server can be reached from.

CONFIG is a JSON file with the fields of `HollowConfig`. Nothing of the sandbox has to be there: no namespaces, no bridge, no
certificates of nodes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightship.sandbox.agent.api import Api
from tightship.sandbox.agent.hollow.control import Control
from tightship.sandbox.agent.hollow.journal import Journal
from tightship.sandbox.agent.hollow.machine import Machine
from tightship.sandbox.agent.hollow.settings import HollowSettings
from tightship.sandbox.agent.host import Timing
from tightship.sandbox.agent.node import NodeSpec


@dataclass(frozen=True)
class HollowConfig:
    """What the hollow agent is started with.

    `nodes` are the fields of NodeSpec, `timing` of Timing, `hollow` of HollowSettings. `control` is the path of the Unix socket that
    faults are asked for at, `journal` of the file that says what happened; both may be left out.
    """

    server: str
    nodes: list[dict[str, Any]]
    token: str | None = None
    ca: str | None = None
    timing: dict[str, float] = field(default_factory=dict)
    hollow: dict[str, Any] = field(default_factory=dict)
    heartbeat: float = 10.0
    control: str | None = None
    journal: str | None = None


async def run(config: HollowConfig) -> None:
    """Serve all nodes until cancelled."""
    specs = [NodeSpec(**{**entry, "gpus": tuple(entry.get("gpus") or ())}) for entry in config.nodes]
    given = {**config.hollow, "missing_images": tuple(config.hollow.get("missing_images") or ())}
    with tempfile.TemporaryDirectory(prefix="tightship-hollow-") as directory:
        async with Api(config.server, config.token, config.ca) as api:
            machine = Machine(
                api,
                specs,
                Path(directory),
                settings=HollowSettings(**given),
                timing=Timing(**config.timing),
                heartbeat=config.heartbeat,
                journal=Journal(Path(config.journal) if config.journal else None),
            )
            control = await Control(machine).start(config.control) if config.control else None
            try:
                await machine.run()
            finally:
                if control is not None:
                    await control.cleanup()
