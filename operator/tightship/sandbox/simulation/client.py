"""How processes of the sandbox reach their GPUs: the blocking way for tools, and which GPUs a container may see."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any

SOCKET_VARIABLE = "TIGHTSHIP_SIM_SOCKET"
NODE_VARIABLE = "TIGHTSHIP_SIM_NODE"
_NOTHING_VISIBLE = ("", "void", "none")


class DeviceUnavailableError(Exception):
    """There is no device server, or it refused; the message says why."""


class Device:
    """A blocking connection to the device server."""

    def __init__(self, path: str, timeout: float = 5.0) -> None:
        """Connect; `timeout` in seconds bounds every wait.

        Raises:
            DeviceUnavailableError: nobody listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise DeviceUnavailableError(f"no device server at {path}: {error}") from error
        self._lines = self._socket.makefile("rb")

    def request(self, operation: str, **arguments: object) -> dict[str, Any]:
        """Ask and return the answer.

        Raises:
            DeviceUnavailableError: the server refused, with its message, or went away.
        """
        try:
            self._socket.sendall(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._lines.readline() or b'{"error": "the device server went away"}')
        except OSError as error:
            raise DeviceUnavailableError(f"the device server went away: {error}") from error
        if "error" in answer:
            raise DeviceUnavailableError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """Give everything back."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def visible(gpus: list[dict[str, Any]], environ: Mapping[str, str], served: str | None = None) -> list[dict[str, Any]]:
    """Return the GPUs a container sees: those NVIDIA_VISIBLE_DEVICES names, narrowed by CUDA_VISIBLE_DEVICES.

    A client of MPS sees of them the one that its daemon has (`served`, a UUID), and counts it as its first.

    Names are `all`, indices on the node, UUIDs, or CDI names that end in one. As under the container toolkit a container
    without the variable sees none; a name that fits nothing is passed over, and the order is the variable's.
    """
    names = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    seen = [] if names in _NOTHING_VISIBLE else _named(gpus, names)
    seen = [gpu for gpu in seen if served in (None, gpu["uuid"])]
    narrowed = environ.get("CUDA_VISIBLE_DEVICES")
    if narrowed is None:
        return seen
    # CUDA counts what the process sees, not what the node has.
    return _named([{**gpu, "index": number} for number, gpu in enumerate(seen)], narrowed)


def list_visible(environ: Mapping[str, str] = os.environ, served: str | None = None) -> list[dict[str, Any]]:
    """Ask the device server which GPUs this process sees; none without a server, since then there is no driver either.

    `served`: the GPU of the MPS daemon that it is a client of, if it is.

    Raises:
        DeviceUnavailableError: there should be a server and isn't.
    """
    path = environ.get(SOCKET_VARIABLE)
    if not path:
        return []
    with Device(path) as device:
        gpus = device.request("gpus", node=environ.get(NODE_VARIABLE))["gpus"]
    return visible([gpu for gpu in gpus if not gpu["lost"]], environ, served)


def _named(gpus: list[dict[str, Any]], names: str) -> list[dict[str, Any]]:
    if names == "all":
        return gpus
    found = []
    for name in (text.strip().rpartition("=")[2] for text in names.split(",")):
        found += [gpu for gpu in gpus if name in (gpu["uuid"], str(gpu["index"])) and gpu not in found]
    return found
