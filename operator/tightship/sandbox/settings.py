"""What a sandbox is made of, as one plain value that the command line, the tests and the supervisor share."""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLANES = ("embedded", "real")


@dataclass(frozen=True)
class Settings:
    """One sandbox.

    `state` is its directory; `sockets` a short path for Unix sockets. `memory` and `gpu_memory` are bytes. `timing` are
    fields of the agent's Timing; `environment` and `operator_arguments` go to the operator's process, `engine_environment` into
    engines. `node_grace` is how long a node may be silent before its pods count as lost (a cluster's default is 40), `eviction` how
    long pods stay on a lost node (300), in whole seconds. `hollow` are fields of HollowSettings: with it, if only {}, pods are state machines.
    With `dra` a fake of NVIDIA's DRA driver hands GPUs out by claims, in place of the device plugin.
    """

    state: str
    sockets: str
    plane: str = "embedded"
    nodes: int = 2
    cpus: int = 8
    memory: int = 256 * 2**30
    gpus_per_node: int = 2
    product: str = "NVIDIA-H100-80GB-HBM3"
    gpu_memory: int = 80 * 2**30
    engine_cores: list[int] = field(default_factory=list)
    operator: bool = True
    models: str | None = None
    engine_python: str | None = None
    engine_environment: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    device_arguments: list[str] = field(default_factory=list)
    crds: str | None = None
    dra: bool = False
    operator_arguments: list[str] = field(default_factory=list)
    node_grace: int = 20
    eviction: int = 20
    heartbeat: float = 5.0
    hollow: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def node_name(self, index: int) -> str:
        """The name of a node, counted from 0."""
        return f"sandbox-{index}"

    def node_address(self, index: int) -> str:
        """The InternalIP of a node, counted from 0."""
        return f"10.244.{index + 1}.1"

    def node_directory(self, index: int) -> Path:
        """Where a node keeps everything: pods, host paths (`root`), `proc`."""
        return Path(self.state) / "nodes" / self.node_name(index)

    def gpu_uuids(self, index: int) -> list[str]:
        """The GPUs of a node; the same for the same node of every sandbox."""
        space = uuid.uuid5(uuid.NAMESPACE_DNS, "sandbox.tightship.dev")
        return [f"GPU-{uuid.uuid5(space, f'{index}/{number}')}" for number in range(self.gpus_per_node)]

    def node_specs(self) -> list[dict[str, Any]]:
        """The nodes as the agent's NodeSpec fields."""
        return [
            {
                "name": self.node_name(index),
                "index": index,
                "cpus": self.cpus,
                "memory": self.memory,
                "gpus": self.gpu_uuids(index),
                "product": self.product,
                "gpu_memory": self.gpu_memory,
            }
            for index in range(self.nodes)
        ]
