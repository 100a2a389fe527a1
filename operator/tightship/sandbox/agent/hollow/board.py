"""What the pods of one hollow node share: its packs with their locks, its GPUs with their memory and faults.

It stands for the node's kernel, driver and MPS daemons, and knows nothing of pods beyond their names. A lock has one owner, and a
GPU's memory is counted whoever uses it, so that two packs on one GPU would run out of it as on a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

IDLE, ACTIVE, FAULT, DOWN = "IDLE", "ACTIVE", "FAULT", "DOWN"
_pids = count(1000)


def new_pid() -> int:
    """A process ID that no other hollow process has."""
    return next(_pids)


@dataclass
class Pack:
    """One pack's directory on the node, and its MPS daemon.

    `gpu` is what the latest holder published; `daemon` whether its daemon serves, `server` the PID of the server that the first
    client made it start, `clients` pod UIDs by PID.
    """

    uid: str
    holder: str | None = None
    starter: str | None = None
    gpu: dict[str, Any] | None = None
    daemon: bool = False
    server: int | None = None
    fault: bool = False
    clients: dict[int, str] = field(default_factory=dict)
    _listeners: set[asyncio.Event] = field(default_factory=set)

    def listen(self, event: asyncio.Event) -> None:
        """Have `event` set at each change."""
        self._listeners.add(event)

    def forget(self, event: asyncio.Event) -> None:
        """Have it set no more."""
        self._listeners.discard(event)

    def changed(self) -> None:
        """Wake everybody who listens."""
        for event in self._listeners:
            event.set()

    @property
    def state(self) -> str:
        """MPS as a watcher sees it."""
        if not self.daemon:
            return DOWN
        if self.server is None:
            return IDLE
        return FAULT if self.fault else ACTIVE

    def attach(self, pid: int, pod: str) -> None:
        """A client comes; the first makes the daemon start a server."""
        self.server = self.server or new_pid()
        self.clients[pid] = pod
        self.changed()

    def detach(self, pid: int) -> None:
        """A client goes; with the last one a faulty server ends, so that the next client finds a new one."""
        if self.clients.pop(pid, None) is None:
            return
        if self.fault and not self.clients:
            self.fault, self.server = False, None
        self.changed()

    def break_server(self) -> None:
        """A client's fatal fault: the server takes no new client until the old ones have left. Without clients there is no fault."""
        self.fault = bool(self.clients)
        self.changed()


@dataclass
class Board:
    """One node. `gpus`: identity by UUID, as a holder publishes it; `lost`: those that no process finds any more."""

    gpus: Mapping[str, Mapping[str, Any]]
    lost: set[str] = field(default_factory=set)
    packs: dict[str, Pack] = field(default_factory=dict)
    engines: dict[int, tuple[str, int]] = field(default_factory=dict)
    """GPU and bytes by the engine's PID."""

    def pack(self, uid: str) -> Pack:
        """A pack's directory, made where it isn't there."""
        return self.packs.setdefault(uid, Pack(uid))

    def free(self, gpu: str) -> int:
        """Bytes of a GPU that no engine uses."""
        used = sum(memory for where, memory in self.engines.values() if where == gpu)
        return int(self.gpus[gpu]["memory"]) - used
