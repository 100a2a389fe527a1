"""How a replica ends: reasons, exit statuses, and the termination message that carries both to the operator."""

from __future__ import annotations

import contextlib
import sys
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path

# The kubelet keeps this much of a termination message.
MESSAGE_BYTES = 4096


class Reason(str, Enum):
    """Why a replica ended; the first word of its termination message, before a colon."""

    INVALID_SETTINGS = "InvalidSettings"
    HOLDER_LOST = "HolderLost"
    GPU_NOT_VISIBLE = "GPUNotVisible"
    GPU_MISMATCH = "GPUMismatch"
    MPS_NOT_ATTACHED = "MPSNotAttached"
    INSUFFICIENT_MEMORY = "InsufficientMemory"
    MPS_FAULT = "MPSFault"
    START_TIMEOUT = "StartTimeout"
    ENGINE_HUNG = "EngineHung"
    ENGINE_FAILED = "EngineFailed"


EXIT_STATUS = {
    Reason.INVALID_SETTINGS: 64,
    Reason.HOLDER_LOST: 70,
    Reason.GPU_NOT_VISIBLE: 71,
    Reason.GPU_MISMATCH: 72,
    Reason.MPS_NOT_ATTACHED: 73,
    Reason.INSUFFICIENT_MEMORY: 74,
    Reason.START_TIMEOUT: 75,
    Reason.ENGINE_HUNG: 76,
    Reason.MPS_FAULT: 77,
}
"""A failed engine's own status is passed on instead (128 + signal when a signal ended it)."""


class RefusalError(Exception):
    """The engine must not start, or not go on; `reason` and the text say why."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason.value}: {super().__str__()}"


def say(text: str) -> None:
    """A line of the supervisor's own on the pod's log, with the time (UTC): starts on one GPU can be told apart by it."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    print(f"{now} tightship: {text}", file=sys.stderr, flush=True)


def leave_message(path: Path, text: str) -> None:
    """Write the termination message, whole lines as far as the kubelet keeps them; a pod without one still ends."""
    kept = text.encode()[:MESSAGE_BYTES].decode(errors="ignore")
    with contextlib.suppress(OSError):
        path.write_text(kept, encoding="utf-8")
