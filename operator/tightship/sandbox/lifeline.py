"""What the sandbox's two supervising processes say to each other: lines of JSON on a pipe, and the end of the pipe."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

API_SOCKET, GATEWAY_SOCKET, CONTROL_SOCKET, DEVICE_SOCKET = "api.sock", "gateway.sock", "control.sock", "devices.sock"
HOLLOW_SOCKET = "hollow.sock"
"""Names in the directory of the Unix sockets."""
HOLLOW_JOURNAL = "journal.jsonl"
"""What happened on hollow nodes, in the state directory."""


async def end_of_input() -> None:
    """Return when standard input is closed: whoever held its other end is gone, or wants us gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(4096):
        pass


def say(message: dict[str, Any]) -> None:
    """Write one line of JSON to standard output."""
    print(json.dumps(message), flush=True)
