"""A network namespace for each pod, on the bridge of the sandbox.

So every pod has its own loopback and its own port 8000, as on a real node. The namespace lives as long as the agent holds
its descriptor; when the agent ends, the kernel takes the namespace and its link away.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from dataclasses import dataclass
from itertools import count

BRIDGE = "tightship0"
GATEWAY = "10.244.0.1"
SERVICE_RANGE = "10.96.0.0/16"
MTU = 65000
_CLONE_NEWNET = 0x40000000
_links = count(1)


@dataclass
class PodNetwork:
    """An open network namespace and the address in it."""

    descriptor: int
    address: str

    def close(self) -> None:
        """Let the namespace go."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _new_namespace() -> int:
    """A descriptor of a new network namespace; made by a thread of its own, since a namespace is a thread's."""
    result: list[int] = []
    failure: list[int] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            failure.append(ctypes.get_errno())
            return
        result.append(os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failure:
        raise OSError(failure[0], f"no network namespace for a pod: {os.strerror(failure[0])}")
    return result[0]


async def create(address: str) -> PodNetwork:
    """Make a pod's namespace and connect it to the bridge.

    Raises:
        OSError: a namespace or its link could not be made.
    """
    network = PodNetwork(await asyncio.to_thread(_new_namespace), address)
    link = f"pod{next(_links)}-{os.getpid()}"
    path = f"/proc/self/fd/{network.descriptor}"
    try:
        await _run(
            ["ip", "-batch", "-"],
            f"link add {link} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {path}\n"
            f"link set {link} master {BRIDGE} up\n",
            network.descriptor,
        )
        await _run(
            ["nsenter", f"--net={path}", "ip", "-batch", "-"],
            f"link set lo up\naddr add {address}/16 dev eth0\nlink set eth0 up\n"
            f"route add {SERVICE_RANGE} via {GATEWAY} dev eth0\n",
            network.descriptor,
        )
    except BaseException:
        network.close()
        raise
    return network


async def _run(command: list[str], script: str, descriptor: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=[descriptor],
    )
    output, _ = await process.communicate(script.encode())
    if process.returncode:
        raise OSError(f"{' '.join(command)}: {output.decode(errors='replace').strip()}")
