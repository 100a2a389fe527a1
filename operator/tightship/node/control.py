"""Questions to a running MPS daemon, through `nvidia-cuda-mps-control`.

Its answers are text for people; what is relied on is the least there is: server PIDs are lines of digits, a status is a line
with FAULT in it or not, and `ps` prints a table whose first column is the client's PID.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PROGRAM = "nvidia-cuda-mps-control"
_TIMEOUT = 20.0

State = Literal["ACTIVE", "IDLE", "FAULT", "DOWN"]


class ControlError(Exception):
    """The daemon did not answer."""


@dataclass(frozen=True)
class Health:
    """What MPS is like: IDLE before the first client has made it start a server; PIDs as the daemon sees them."""

    state: State
    server: int | None = None
    clients: tuple[int, ...] = ()


def ask(command: str) -> str:
    """The answer to one control command.

    Raises:
        ControlError: there is no daemon, or it doesn't answer.
    """
    try:
        done = subprocess.run(
            [PROGRAM], input=f"{command}\n", capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ControlError(f"{PROGRAM}: {error}") from error
    if done.returncode != 0:
        raise ControlError((done.stderr or done.stdout).strip() or f"{PROGRAM} ended with {done.returncode}")
    return done.stdout


def health() -> Health:
    """The state of server and clients; DOWN when the daemon doesn't answer."""
    try:
        servers = parse_pids(ask("get_server_list"))
        if not servers:
            return Health("IDLE")
        faulty = [pid for pid in servers if "FAULT" in ask(f"get_server_status {pid}").upper()]
        clients = parse_clients(ask("ps"))
    except ControlError:
        return Health("DOWN")
    return Health("FAULT" if faulty else "ACTIVE", (faulty or servers)[0], clients)


def terminate(which: Callable[[int], bool]) -> list[int]:
    """Take the clients whose PID `which` says yes to out of MPS; returns them.

    Their work on the GPU is ended in order, so that a SIGKILL afterwards leaves the other clients as they are (NVIDIA's MPS
    documentation, `terminate_client`).

    Raises:
        ControlError: the daemon does not answer.
    """
    ended = []
    for server in parse_pids(ask("get_server_list")):
        for pid in filter(which, parse_pids(ask(f"get_client_list {server}"))):
            ask(f"terminate_client {server} {pid}")
            ended.append(pid)
    return ended


def parse_pids(answer: str) -> list[int]:
    """The PIDs in an answer that lists one a line."""
    return [int(line) for line in answer.split("\n") if line.strip().isdecimal()]


def parse_clients(answer: str) -> tuple[int, ...]:
    """The client PIDs in the table that `ps` prints, sorted."""
    firsts = (line.split()[0] for line in answer.splitlines() if line.strip())
    return tuple(sorted({int(first) for first in firsts if first.isdecimal()}))
