"""Stand-ins for `nvidia-smi`, as far as it is used here, and for the replicas' CUDA probe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .client import DeviceUnavailableError, list_visible
from .mps import MpsRefusedError
from .mps import probe as probe_mps

MIB = 2**20
_FIELDS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "index": lambda gpu: str(gpu["index"]),
    "uuid": lambda gpu: str(gpu["uuid"]),
    "gpu_uuid": lambda gpu: str(gpu["uuid"]),
    "name": lambda gpu: str(gpu["product"]),
    "gpu_name": lambda gpu: str(gpu["product"]),
    "driver_version": lambda gpu: str(gpu["driver"]),
    "memory.total": lambda gpu: f"{gpu['total'] // MIB} MiB",
    "memory.used": lambda gpu: f"{gpu['used'] // MIB} MiB",
    "memory.free": lambda gpu: f"{gpu['free'] // MIB} MiB",
    "utilization.gpu": lambda gpu: f"{round(100 * gpu['gpu_utilization'])} %",
    "utilization.memory": lambda gpu: f"{round(100 * gpu['memory_utilization'])} %",
    "compute_mode": lambda gpu: "Default",
    "mig.mode.current": lambda gpu: "Disabled",
}


def nvidia_smi(arguments: list[str]) -> int:
    """Print what `nvidia-smi --query-gpu=FIELDS --format=csv[,noheader][,nounits] [-i ID]` or `-L` would."""
    try:
        gpus = list_visible()
    except DeviceUnavailableError as error:
        print(f"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver: {error}", file=sys.stderr)
        return 9
    if not gpus:
        print("No devices were found", file=sys.stderr)
        return 6
    if arguments in (["-L"], ["--list-gpus"]):
        print("\n".join(f"GPU {gpu['index']}: {gpu['product']} (UUID: {gpu['uuid']})" for gpu in gpus))
        return 0
    options = _options(arguments)
    wanted = options.pop("--id", None)
    fields = options.pop("--query-gpu", "").split(",")
    layout = options.pop("--format", "").split(",")
    unknown = [field for field in fields if field not in _FIELDS] + list(options)
    if unknown or layout[0] != "csv":
        print(f'Field "{(unknown or layout)[0]}" is not a valid field to query.', file=sys.stderr)
        return 2
    if "noheader" not in layout:
        print(", ".join(fields))
    for gpu in gpus:
        if wanted in (None, gpu["uuid"], str(gpu["index"])):
            values = [_FIELDS[field](gpu) for field in fields]
            print(", ".join(_without_unit(value) if "nounits" in layout else value for value in values))
    return 0


def cuda_probe() -> int:
    """Print the preflight's line: the first GPU the engine will see, its memory in bytes, and whether MPS is behind it.

    Like any process that opens a GPU the probe becomes a client of MPS for a moment, and fails where MPS takes none.
    """
    try:
        served = probe_mps(os.environ) if list_visible() else None
        gpus = list_visible(served=served)
    except DeviceUnavailableError as error:
        print(f"no driver: {error}", file=sys.stderr)
        return 1
    except MpsRefusedError as error:
        print(f"CUDA error: {error}", file=sys.stderr)
        return 1
    first = gpus[0] if gpus else {"uuid": None, "product": None, "total": 0, "free": 0}
    figures = {"uuid": first["uuid"], "name": first["product"], "total": first["total"], "free": first["free"]}
    print(json.dumps({**figures, "mps": served is not None}))
    return 0


def _options(arguments: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, given, value = rest.pop(0).partition("=")
        name = "--id" if name == "-i" else name
        options[name] = value if given or not rest else rest.pop(0)
    return options


def _without_unit(value: str) -> str:
    return value.removesuffix(" MiB").removesuffix(" %")
