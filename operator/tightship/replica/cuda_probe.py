"""Which GPU this process sees, as one line of JSON: `python3 -m tightship.replica.cuda_probe`.

`{"uuid": "GPU-...", "name": "...", "total": bytes, "free": bytes, "mps": bool}`, `uuid` null when the driver shows no GPU, `mps` null
when the driver is too old to say.
The driver library is asked itself, in a process of its own, so that the figures are those the engine will get (under the same
MPS server and limits) and no context stays behind. Meanings and numbers of the calls: CUDA driver API, cuda.h.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
# CUdevice_attribute: contexts made on this device are shared through MPS.
_ATTRIBUTE_MPS_ENABLED = 133


class DriverError(Exception):
    """A driver call that failed, with its result code."""

    def __init__(self, call: str, result: int) -> None:
        super().__init__(f"{call} returned CUDA error {result}")
        self.result = result


def _call(driver: Any, name: str, *arguments: Any) -> None:
    result = getattr(driver, name)(*arguments)
    if result != 0:
        raise DriverError(name, result)


def probe(driver: Any) -> dict[str, object]:
    """What the driver says of the first visible device.

    Raises:
        DriverError: a call failed otherwise than for want of a device.
    """
    count = ctypes.c_int()
    try:
        _call(driver, "cuInit", 0)
        _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    except DriverError as error:
        if error.result != _NO_DEVICE:
            raise
    if count.value == 0:
        return {"uuid": None, "name": None, "total": 0, "free": 0, "mps": False}
    device, context = ctypes.c_int(), ctypes.c_void_p()
    identity, name = (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(256)
    free, total, mps = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _call(driver, "cuDeviceGetUuid", ctypes.byref(identity), device)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    # Drivers before CUDA 12 don't know the attribute.
    known = driver.cuDeviceGetAttribute(ctypes.byref(mps), _ATTRIBUTE_MPS_ENABLED, device) == 0
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call(driver, "cuCtxSetCurrent", context)
    _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return {
        "uuid": format_uuid(bytes(identity)),
        "name": name.value.decode(errors="replace"),
        "total": total.value,
        "free": free.value,
        "mps": bool(mps.value) if known else None,
    }


def format_uuid(identity: bytes) -> str:
    """The 16 bytes of a UUID as nvidia-smi writes them."""
    digits = identity.hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def main() -> int:
    """Print the line; returns the exit status, 1 when the driver can't be asked."""
    try:
        print(json.dumps(probe(ctypes.CDLL(_LIBRARY))))
    except OSError:
        # The container toolkit mounts the library; without it the container got no GPU.
        print(json.dumps({"uuid": None, "name": None, "total": 0, "free": 0, "mps": False}))
    except DriverError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
