"""Which GPU this container was given, by `nvidia-smi`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_QUERY = ("nvidia-smi", "--query-gpu=uuid,name,memory.total,driver_version", "--format=csv,noheader,nounits")
_TIMEOUT = 60.0


class GPUError(Exception):
    """There is no single GPU to hold; the text says what is seen and what to do."""


@dataclass(frozen=True)
class GPU:
    """A GPU's identity; `memory` in bytes, `product` as in the node label `nvidia.com/gpu.product`."""

    uuid: str
    product: str
    memory: int
    driver: str


def identify(env: Mapping[str, str]) -> GPU:
    """The one GPU of this container.

    A privileged container sees all GPUs of the node; then the device plugin's NVIDIA_VISIBLE_DEVICES tells which one was given.

    Raises:
        GPUError: there is none, or it can't be told which.
    """
    seen = _query()
    if len(seen) > 1:
        named = env.get("NVIDIA_VISIBLE_DEVICES", "")
        seen = [gpu for gpu in seen if gpu.uuid in named]
    if len(seen) != 1:
        raise GPUError(
            f"{len(seen)} GPUs are this container's by nvidia-smi and NVIDIA_VISIBLE_DEVICES, not 1: "
            "check the device plugin, and that the pod is not privileged"
        )
    return seen[0]


def _query() -> list[GPU]:
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GPUError(
            f"nvidia-smi can't be asked ({error}): the container toolkit mounts it into GPU containers"
        ) from error
    if done.returncode != 0:
        raise GPUError(f"nvidia-smi ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return [_parse(line) for line in done.stdout.splitlines() if line.strip()]


def _parse(line: str) -> GPU:
    fields = [field.strip() for field in line.split(",")]
    try:
        uuid, name, mebibytes, driver = fields
        return GPU(uuid, name.replace(" ", "-"), int(mebibytes) << 20, driver)
    except ValueError as error:
        raise GPUError(f"nvidia-smi printed {line!r} instead of UUID, name, memory and driver") from error


def write(path: Path, gpu: GPU) -> None:
    """Write the identity for the watcher, whole or not at all, readable by everybody."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(gpu), file)
        os.fchmod(file.fileno(), 0o644)
    Path(name).replace(path)
