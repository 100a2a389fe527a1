"""Files in the pack's directory by which a replica talks to its holder, which can reach the API and the MPS daemon.

    preflight.<pod UID>.json   which GPU the engine is about to see, and how much memory; the holder's watcher publishes it
    terminate.<pod UID>        asks the holder to have MPS end this pod's clients; the holder removes it when that is done

Both are written whole or not at all. That they can't be written stops no replica: they report and ease, they guard nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from tightship.replica.preflight import Gpu


def leave_preflight(directory: Path, pod_uid: str, pod: str, gpu: Gpu) -> bool:
    """Write down what the preflight saw (bytes; the time in epoch seconds); whether that worked."""
    seen = {"pod": pod, "uuid": gpu.uuid, "total": gpu.total, "free": gpu.free, "at": int(time.time())}
    return _write(preflight_path(directory, pod_uid), json.dumps(seen))


def preflight_path(directory: Path, pod_uid: str) -> Path:
    """Where a pod's preflight is written down."""
    return directory / f"preflight.{pod_uid}.json"


def remove_preflight(directory: Path, pod_uid: str) -> None:
    """Take it away with the replica."""
    with contextlib.suppress(OSError):
        preflight_path(directory, pod_uid).unlink()


def ask_to_terminate(directory: Path, pod_uid: str, words: str) -> Path | None:
    """Ask for this pod's MPS clients to be ended; returns the file that is there until it is done, None where it can't be asked."""
    path = directory / f"terminate.{pod_uid}"
    return path if _write(path, words) else None


def _write(path: Path, text: str) -> bool:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        return False
    return True
