"""What a replica's pod tells its supervisor, read once from the environment."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tightship.replica.outcome import Reason, RefusalError

TERMINATION_MESSAGE_PATH = "/dev/termination-log"
NAMINGS = ("legacy", "cdi", "nri")
SHARING = ("Reservation", "DRA", "DevicePlugin", "Exclusive")
HANG_SECONDS = {"cuda": 120.0, "cpu": 600.0}
"""How long requests may run without a step ending: the longest prompt of one step takes seconds on a GPU, minutes on a CPU."""


@dataclass(frozen=True)
class Settings:
    """The supervisor's settings; times in seconds, memory in bytes (names in docs/architecture.md)."""

    device: str
    sharing: str
    pack_dir: Path
    pod_name: str
    pod_uid: str
    gpu_uuid: str | None
    gpu_naming: str
    memory_bytes: int | None
    start_timeout: float
    drain_timeout: float
    hang_timeout: float
    mps_pipe: Path | None
    probe: tuple[str, ...]
    termination_message: Path

    @property
    def cuda(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.device == "cuda"

    @property
    def held(self) -> bool:
        """Whether a holder has the GPU; else it is the pod's own as long as the pod lives, and nobody need be asked."""
        return self.cuda and self.sharing == "Reservation"

    @property
    def shared(self) -> bool:
        """Whether the GPU is shared, so that MPS must be behind it."""
        return self.cuda and self.sharing != "Exclusive"

    @property
    def holder_lock(self) -> Path:
        """Held by the holder while its daemon lives."""
        return self.pack_dir / "holder.lock"

    @property
    def start_lock(self) -> Path:
        """Held by the one replica that starts."""
        return self.pack_dir / "start.lock"

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Settings:
        """Read the variables.

        Raises:
            RefusalError: one is missing or makes no sense.
        """
        device = env.get("TIGHTSHIP_DEVICE", "")
        if device not in ("cuda", "cpu"):
            raise RefusalError(Reason.INVALID_SETTINGS, f"TIGHTSHIP_DEVICE is {device!r}, not cuda or cpu")
        sharing = env.get("TIGHTSHIP_SHARING") or "Reservation"
        if sharing not in SHARING:
            raise RefusalError(
                Reason.INVALID_SETTINGS, f"TIGHTSHIP_SHARING is {sharing!r}, not one of {', '.join(SHARING)}"
            )
        naming = env.get("TIGHTSHIP_GPU_NAMING") or "legacy"
        if naming not in NAMINGS:
            raise RefusalError(
                Reason.INVALID_SETTINGS, f"TIGHTSHIP_GPU_NAMING is {naming!r}, not one of {', '.join(NAMINGS)}"
            )
        pipe = env.get("CUDA_MPS_PIPE_DIRECTORY")
        memory = _number(env, "TIGHTSHIP_MEMORY_BYTES", 0)
        probe = env.get("TIGHTSHIP_CUDA_PROBE")
        return cls(
            device=device,
            sharing=sharing,
            pack_dir=Path(env.get("TIGHTSHIP_PACK_DIR") or "/run/tightship/pack"),
            pod_name=env.get("TIGHTSHIP_POD_NAME", ""),
            pod_uid=env.get("TIGHTSHIP_POD_UID", ""),
            gpu_uuid=env.get("TIGHTSHIP_GPU_UUID") or None,
            gpu_naming=naming,
            memory_bytes=int(memory) or None,
            start_timeout=_number(env, "TIGHTSHIP_START_TIMEOUT", 600),
            drain_timeout=_number(env, "TIGHTSHIP_DRAIN_TIMEOUT", 30),
            hang_timeout=_number(env, "TIGHTSHIP_HANG_TIMEOUT", HANG_SECONDS[device]),
            mps_pipe=Path(pipe) if pipe and device == "cuda" and sharing != "Exclusive" else None,
            probe=tuple(shlex.split(probe)) if probe else (sys.executable, "-m", "tightship.replica.cuda_probe"),
            termination_message=Path(env.get("TIGHTSHIP_TERMINATION_MESSAGE") or TERMINATION_MESSAGE_PATH),
        )


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise RefusalError(Reason.INVALID_SETTINGS, f"{name} is {text!r}, not a number of seconds or bytes")
    return number
