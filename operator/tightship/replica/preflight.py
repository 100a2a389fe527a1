"""What must be true before an engine may start: the right GPU, MPS behind it, and enough free memory.

CUDA takes neither a missing GPU nor a missing MPS daemon for an error that names itself: without the daemon a process quietly
gets the GPU to itself in turns. So each is looked at, and refused in words.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tightship.replica.outcome import Reason, RefusalError
from tightship.replica.settings import Settings

# What the driver answers while its MPS server takes no client: 806 MPS_RPC_FAILURE, 807 MPS_SERVER_NOT_READY (cuda.h), and their text.
_MPS_BUSY = re.compile(r"CUDA error 80[67]\b|MPS server is not ready")

PROBE_TIMEOUT = 120.0
"""Seconds the probe may take: a context on a busy GPU takes a few, a faulted MPS server never answers."""


_DAEMONS = {
    "Reservation": "the holder pod's container `mps`",
    "DRA": "the MPS control daemon of the claim's driver",
    "DevicePlugin": "the device plugin's MPS control daemon on this node",
}


_REFUSED = (
    "the container toolkit may refuse it for unprivileged pods (accept-nvidia-visible-devices-envvar-when-unprivileged), "
    "or the runtime class is not nvidia"
)
_NAMED_BY = {
    "legacy": f"its UUID in NVIDIA_VISIBLE_DEVICES: {_REFUSED}",
    "cdi": f"its CDI name in NVIDIA_VISIBLE_DEVICES: {_REFUSED}",
    "nri": "its CDI name in the annotation nvidia.cdi.k8s.io/container.engine: the NRI plugin may not run on this node",
}


@dataclass(frozen=True)
class Gpu:
    """The GPU as the engine will see it; memory in bytes, `mps` None where the probe doesn't say."""

    uuid: str | None
    name: str | None
    total: int
    free: int
    mps: bool | None = None


def run_probe(command: Sequence[str], timeout: float = PROBE_TIMEOUT) -> Gpu:
    """Ask the probe, in a process of its own.

    Raises:
        RefusalError: it failed, hung, or said nothing readable.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise RefusalError(
            Reason.MPS_NOT_ATTACHED,
            f"CUDA did not answer within {timeout:g} s: the MPS server may be in FAULT and wait for old clients to leave",
        ) from error
    except OSError as error:
        raise RefusalError(Reason.INVALID_SETTINGS, f"the CUDA probe {command[0]} does not run: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        if _MPS_BUSY.search(last):
            text = (
                f"the MPS server takes no clients ({last}): after a fatal fault it waits for the last old one to leave"
            )
            raise RefusalError(Reason.MPS_FAULT, text)
        raise RefusalError(Reason.GPU_NOT_VISIBLE, f"CUDA can't be initialised: {last}")
    try:
        seen = json.loads(done.stdout.strip().splitlines()[-1])
        mps = seen.get("mps")
        return Gpu(
            seen["uuid"], seen.get("name"), int(seen["total"]), int(seen["free"]), None if mps is None else bool(mps)
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusalError(
            Reason.GPU_NOT_VISIBLE, f"the CUDA probe printed {done.stdout[:200]!r}, no figures"
        ) from error


def check_pipe(settings: Settings) -> None:
    """Refuse when the pack has MPS and its daemon's pipe isn't there.

    Raises:
        RefusalError: with the cause.
    """
    pipe = settings.mps_pipe
    if pipe is None and settings.shared and not settings.held:
        who = (
            "the claim's driver has set no CUDA_MPS_PIPE_DIRECTORY (its MPSSupport feature gate may be off)"
            if settings.sharing == "DRA"
            else "the device plugin has set no CUDA_MPS_PIPE_DIRECTORY (it may share by time slicing)"
        )
        raise RefusalError(Reason.MPS_NOT_ATTACHED, f"{who}: the engine would run without MPS, taking turns")
    if pipe is not None and not (pipe / "control").exists():
        where = _DAEMONS[settings.sharing]
        raise RefusalError(
            Reason.MPS_NOT_ATTACHED,
            f"no MPS daemon at {pipe}: the engine would run without MPS, taking turns; {where} tells why",
        )


def check_gpu(settings: Settings, gpu: Gpu) -> None:
    """Refuse a GPU that isn't there, isn't the pack's, or isn't shared.

    Raises:
        RefusalError: with the cause.
    """
    if gpu.uuid is None and not settings.held:
        raise RefusalError(
            Reason.GPU_NOT_VISIBLE,
            "the container requests a GPU and sees none: look at the node's device plugin or DRA driver, and at its container toolkit",
        )
    if gpu.uuid is None:
        raise RefusalError(
            Reason.GPU_NOT_VISIBLE,
            f"the container sees no GPU, but should see {settings.gpu_uuid or 'one'}, which the pod names by "
            f"{_NAMED_BY[settings.gpu_naming]}; the operator's --gpu-naming (the chart's operator.gpuNaming) is {settings.gpu_naming}: "
            "it has to be legacy with the container toolkit's legacy or auto mode, cdi with its CDI mode, nri with the GPU operator's "
            "NRI plugin",
        )
    if settings.gpu_uuid is not None and gpu.uuid.lower() != settings.gpu_uuid.lower():
        raise RefusalError(
            Reason.GPU_MISMATCH, f"the container sees {gpu.uuid} ({gpu.name}), the pack holds {settings.gpu_uuid}"
        )
    if settings.mps_pipe is not None and gpu.mps is False:
        raise RefusalError(
            Reason.MPS_NOT_ATTACHED,
            f"the driver shares no contexts of {gpu.uuid} through MPS although a daemon's pipe is at {settings.mps_pipe}: "
            "replica and daemon must run as one user",
        )


def memory_share(memory: int, gpu: Gpu) -> float:
    """The `--gpu-memory-utilization` that covers `memory` bytes: their share of the total the engine sees, rounded up.

    vLLM refuses to start when free memory < total x share, so that is refused here with all the numbers.

    Raises:
        RefusalError: there is not that much, free or at all.
    """
    # Rounded to the digits that are passed on; the guard keeps an exact share from being rounded up by its float's error.
    share = math.ceil(memory / gpu.total * 10_000 - 1e-9) / 10_000
    if share > 1 or gpu.free < share * gpu.total:
        raise RefusalError(
            Reason.INSUFFICIENT_MEMORY,
            f"needs {_gib(memory)} of {gpu.uuid}, {_gib(gpu.free)} of {_gib(gpu.total)} are free: "
            "something outside the pack's ledger uses the GPU, or a replica that ended has not let go yet",
        )
    return share


def _gib(amount: int) -> str:
    return f"{amount / (1 << 30):.2f}Gi"
