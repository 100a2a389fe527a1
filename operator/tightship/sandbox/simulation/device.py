"""The device server: all simulated GPUs of a sandbox in one process, in real time, behind a Unix socket.

Every process that would open a GPU opens a connection instead; a JSON object a line, one answer a request, in order. What
a process allocated goes when its connection does, so a killed engine gives its memory back as under a real driver.

Requests (`op`): `gpus` lists them; `open` binds the connection to one; `alloc` and `release` move bytes; `run` queues a
GPU part that becomes ready at a given time and answers when it ends; `mps` registers the MPS daemon of a GPU, which is
told of faults; `control` is for tests. Errors answer `{"error": text}`; what nobody asked for comes as `{"event": ...}`.

Times on the wire are those of CLOCK_MONOTONIC, which all processes share; only lengths are scaled: `time_scale` real
seconds pass for each simulated one, so that a load generator on few cores can keep up with many engines. A request is
answered as soon as its turn in the queue is known, with the moment its service ends, and engines account in those
moments: a late timer delays a token by a millisecond, but never adds up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gpu import Gpu, Memory, OutOfMemoryError

DRIVER_VERSION = "580.105.08"
# What the driver keeps for itself on an idle GPU, so that "free" is never quite "total": half a GiB of 80.
DRIVER_SHARE = 160
# Work is queued this long before it is ready, so that a timer that fires a millisecond late can't leave the GPU idle or
# change the order. Requests come with their host part ahead, which is longer than that.
LOOKAHEAD = 0.002
_DRIVER = "driver"
_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Message = Mapping[str, Any]


class DeviceError(Exception):
    """A request that can't be served; the message is for its sender."""


@dataclass
class Slot:
    """A GPU in the server: the model, who is connected, and whether it has fallen off the bus."""

    gpu: Gpu
    index: int
    lost: bool = False
    connections: set[Connection] = field(default_factory=set)
    daemons: set[Connection] = field(default_factory=set)

    def describe(self, now: float) -> dict[str, Any]:
        """Return what tools may know of it. Bytes, shares of 1."""
        utilization = self.gpu.utilization(now)
        return {
            "uuid": self.gpu.uuid,
            "product": self.gpu.product,
            "node": self.gpu.node,
            "index": self.index,
            "total": self.gpu.memory.total,
            "used": self.gpu.memory.used,
            "free": self.gpu.memory.free,
            "gpu_utilization": utilization.gpu,
            "memory_utilization": utilization.memory,
            "lost": self.lost,
            "driver": DRIVER_VERSION,
            "pids": sorted(connection.pid for connection in self.connections),
        }


class Devices:
    """All GPUs of a sandbox, and what can be asked of them."""

    def __init__(self, gpus: list[Gpu], time_scale: float = 1.0) -> None:
        """`gpus` in the order of their indices on each node; `time_scale` in real seconds a simulated second."""
        if time_scale <= 0:
            raise ValueError(f"the time scale must be above 0, not {time_scale}")
        self.time_scale = time_scale
        self.slots: dict[str, Slot] = {}
        on_node: dict[str, int] = {}
        for gpu in gpus:
            if gpu.uuid in self.slots:
                raise ValueError(f"two GPUs have the UUID {gpu.uuid}")
            gpu.memory.allocate(_DRIVER, gpu.memory.total // DRIVER_SHARE)
            self.slots[gpu.uuid] = Slot(gpu, on_node.setdefault(gpu.node, 0))
            on_node[gpu.node] += 1

    def slot(self, uuid: object) -> Slot:
        """Return a GPU that is there and not lost.

        Raises:
            DeviceError: no such GPU, or it is lost.
        """
        slot = self.slots.get(str(uuid))
        if slot is None:
            raise DeviceError(f"no GPU {uuid}; there are {', '.join(self.slots) or 'none'}")
        if slot.lost:
            raise DeviceError(f"GPU {uuid} is lost")
        return slot

    async def serve(self, path: Path) -> asyncio.AbstractServer:
        """Listen on a Unix socket. An old socket file in its place is removed."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - once, at the start
        return await asyncio.get_running_loop().create_unix_server(lambda: Connection(self), str(path))

    def control(self, message: Message) -> dict[str, Any]:
        """Do to a GPU what no user can: `fault` its MPS, make it `lose` its bus or come back (`restore`), `kill` clients,
        or have what they run on it never end (`hang`)."""
        verb = message.get("verb")
        slot = self.slots.get(str(message.get("uuid")))
        if slot is None:
            raise DeviceError(f"no GPU {message.get('uuid')}")
        if verb == "fault":
            for daemon in slot.daemons:
                daemon.send({"event": "fault"})
            return {"daemons": len(slot.daemons)}
        if verb in ("lose", "restore"):
            slot.lost = verb == "lose"
            for connection in list(slot.connections) if slot.lost else []:
                connection.send({"event": "lost"})
            return {"lost": slot.lost}
        if verb == "kill":
            wanted = message.get("pid")
            pids = {connection.pid for connection in slot.connections if wanted in (None, connection.pid)}
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return {"killed": sorted(pids)}
        if verb == "hang":
            wanted = message.get("pid")
            hung = [connection for connection in slot.connections if wanted in (None, connection.pid)]
            for connection in hung:
                connection.hung = True
            return {"hung": sorted({connection.pid for connection in hung})}
        raise DeviceError(f"unknown control verb {verb!r}; there are fault, lose, restore, kill, hang")


class Connection(asyncio.Protocol):
    """One process's connection."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._buffer = b""
        self._slot: Slot | None = None
        self._pending: set[asyncio.TimerHandle] = set()
        self._loop = asyncio.get_running_loop()
        self._operations: dict[str, Callable[[Message], dict[str, Any] | None]] = {
            "gpus": self._gpus,
            "open": self._open,
            "alloc": self._alloc,
            "release": self._release,
            "run": self._run,
            "mps": self._mps,
            "control": devices.control,
        }
        self.pid = 0
        self.hung = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.pid = peer_pid(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the process had."""
        for timer in self._pending:
            timer.cancel()
        if self._slot is not None:
            self._slot.gpu.memory.release(self)
        for slot in self._devices.slots.values():
            slot.connections.discard(self)
            slot.daemons.discard(self)

    def data_received(self, data: bytes) -> None:
        """Answer each complete line."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                operation = self._operations.get(message.get("op"))
                if operation is None:
                    raise DeviceError(f"unknown operation {message.get('op')!r}")
                answer = operation(message)
            except OutOfMemoryError as error:
                answer = {"error": str(error), "requested": error.requested, "free": error.free, "total": error.total}
            except (DeviceError, ValueError, KeyError, TypeError, AttributeError) as error:
                answer = {"error": str(error)}
            if answer is not None:
                self.send(answer)

    def send(self, message: Message) -> None:
        """Send one object."""
        self._transport.write(json.dumps(message).encode() + b"\n")

    def _gpus(self, message: Message) -> dict[str, Any]:
        node = message.get("node")
        slots = [slot for slot in self._devices.slots.values() if node in (None, slot.gpu.node)]
        now = self._loop.time()
        return {"gpus": [slot.describe(now) for slot in slots], "time_scale": self._devices.time_scale}

    def _open(self, message: Message) -> dict[str, Any]:
        if self._slot is not None:
            raise DeviceError("this connection has a GPU already")
        self._slot = self._devices.slot(message["uuid"])
        self._slot.connections.add(self)
        memory = self._slot.gpu.memory
        return {"total": memory.total, "free": memory.free, "time_scale": self._devices.time_scale}

    def _bound(self) -> Slot:
        if self._slot is None:
            raise DeviceError("open a GPU first")
        if self._slot.lost:
            raise DeviceError(f"GPU {self._slot.gpu.uuid} is lost")
        return self._slot

    def _alloc(self, message: Message) -> dict[str, Any]:
        memory = self._bound().gpu.memory
        memory.allocate(self, int(message["bytes"]))
        return {"free": memory.free, "total": memory.total}

    def _release(self, message: Message) -> dict[str, Any]:
        memory = self._bound().gpu.memory
        memory.release(self, int(message["bytes"]))
        return {"free": memory.free, "total": memory.total}

    def _run(self, message: Message) -> None:
        """Queue just before the work is ready, not when it is asked for: others may be ready earlier and ask later."""
        slot = self._bound()
        if self.hung:
            return
        ready, mean = float(message["ready"]), float(message["gpu"]) * self._devices.time_scale
        share = float(message.get("memory", 0.0))
        timer: asyncio.TimerHandle | None = None

        def serve() -> None:
            if timer is not None:
                self._pending.discard(timer)
            self.send({"end": slot.gpu.serve(ready, mean, share, owner=self)})

        if ready - LOOKAHEAD <= self._loop.time():
            serve()
        else:
            timer = self._loop.call_at(ready - LOOKAHEAD, serve)
            self._pending.add(timer)

    def _mps(self, message: Message) -> dict[str, Any]:
        slot = self._devices.slot(message["uuid"])
        slot.daemons.add(self)
        return {"uuid": slot.gpu.uuid}


def peer_pid(transport: asyncio.BaseTransport) -> int:
    """Return the process at the other end of a Unix socket, as the kernel knows it."""
    peer: socket.socket = transport.get_extra_info("socket")
    pid: int = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    return pid


def parse_gpu(text: str, seed: int = 0) -> Gpu:
    """Read `node=NAME,uuid=GPU-...,product=NAME,memory=80Gi` (memory in bytes or with a Kubernetes suffix).

    Raises:
        ValueError: a part is missing, unknown or no quantity.
    """
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if set(parts) != {"node", "uuid", "product", "memory"}:
        raise ValueError(f"a GPU needs exactly node, uuid, product and memory, not {', '.join(parts)}")
    quantity = re.fullmatch(r"(\d+)([KMGT]i|[kMGT])?", parts["memory"])
    if quantity is None:
        raise ValueError(f"no quantity of memory: {parts['memory']!r}")
    memory = int(quantity[1]) * _UNITS[quantity[2] or ""]
    return Gpu(uuid=parts["uuid"], product=parts["product"], memory=Memory(memory), node=parts["node"], seed=seed)


async def _main(arguments: argparse.Namespace) -> None:
    gpus = [parse_gpu(text, seed=arguments.seed + number) for number, text in enumerate(arguments.gpu)]
    server = await Devices(gpus, arguments.time_scale).serve(arguments.socket)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        await stop.wait()
    arguments.socket.unlink(missing_ok=True)


def main() -> None:
    """Run the server until SIGTERM."""
    parser = argparse.ArgumentParser(prog="tightship.sandbox.simulation.device", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--gpu", action="append", default=[], help="node=...,uuid=...,product=...,memory=80Gi")
    parser.add_argument("--time-scale", type=float, default=1.0, help="real seconds a simulated second")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        asyncio.run(_main(arguments))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
