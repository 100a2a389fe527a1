"""The pods of a pack as the node shows them: whose a process is, and what replicas leave in the pack's directory.

preflight.<pod UID>.json   which GPU a replica saw before its engine started, and how much memory
terminate.<pod UID>        a replica asks for the end of its MPS clients, before it kills an engine that doesn't stop
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from tightship.node import control

# cgroupfs: .../pod0a1b2c3d-.../ ; systemd: ...-pod0a1b2c3d_..._....slice ; a static pod's UID is a hash without dashes.
_POD = re.compile(r"pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?![0-9a-f])")
# As many as MPS takes clients; a pod that was killed leaves its file behind.
_PREFLIGHTS = 64


def pod_uid(pid: int, proc: Path) -> str | None:
    """The UID of the pod that a process of the node belongs to; `None` when it has ended or is in no pod."""
    try:
        text = (proc / str(pid) / "cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _POD.findall(text)
    return found[-1].replace("_", "-") if found else None


def _of_pod(uid: str, proc: Path, pid: int) -> bool:
    return pod_uid(pid, proc) == uid


def preflights(directory: Path) -> dict[str, dict[str, Any]]:
    """What the pack's replicas saw, by pod UID: `uuid`, `total` and `free` (bytes); of too many the latest."""
    found: list[tuple[float, str, dict[str, Any]]] = []
    for path in directory.glob("preflight.*.json"):
        try:
            seen = json.loads(path.read_text(encoding="utf-8"))
            figures = {"uuid": seen["uuid"], "total": int(seen["total"]), "free": int(seen["free"])}
            found.append((path.stat().st_mtime, path.name.split(".")[1], figures))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # gone meanwhile, or not ours: the directory is the replicas' too
    return {uid: figures for _, uid, figures in sorted(found, key=lambda each: each[0])[-_PREFLIGHTS:]}


def terminate_asked(directory: Path, proc: Path) -> list[str]:
    """End the MPS clients of every pod that asked for it; returns a line about each.

    Raises:
        ControlError: the daemon does not answer; the requests stay.
    """
    lines = []
    for request in sorted(directory.glob("terminate.*")):
        uid = request.name.partition(".")[2]
        ended = control.terminate(partial(_of_pod, uid, proc))
        request.unlink(missing_ok=True)
        lines.append(f"ended {len(ended)} MPS clients of pod {uid}, which is about to be killed: {ended}")
    return lines
