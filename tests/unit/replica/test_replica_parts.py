"""The supervisor's parts that need no process: arithmetic, command lines, the driver probe's text."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tightship
from tightship.inject import PACKAGES, inject
from tightship.replica import cuda_probe
from tightship.replica.engine import address, option
from tightship.replica.locks import FileLock, content, is_held
from tightship.replica.outcome import MESSAGE_BYTES, Reason, RefusalError, leave_message
from tightship.replica.preflight import Gpu, memory_share, run_probe
from tightship.replica.progress import Activity, Watchdog

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "total", "share"),
    [(8 * GIB, 80 * GIB, 0.1), (80 * GIB, 80 * GIB, 1.0), (8 * GIB + 1, 80 * GIB, 0.1001), (1, 80 * GIB, 0.0001)],
)
def test_the_share_covers_the_memory(memory: int, total: int, share: float) -> None:
    assert memory_share(memory, Gpu("GPU-1", "H100", total, total)) == share


@pytest.mark.parametrize(("memory", "free"), [(81, 80), (40, 39), (8, 7)])
def test_what_is_not_free_is_refused_with_numbers(memory: int, free: int) -> None:
    with pytest.raises(RefusalError, match=f"needs {memory}.00Gi of GPU-1, {free}.00Gi of 80.00Gi are free") as refused:
        memory_share(memory * GIB, Gpu("GPU-1", "H100", 80 * GIB, free * GIB))
    assert refused.value.reason is Reason.INSUFFICIENT_MEMORY


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ([], ("127.0.0.1", 8000)),
        (["--port", "9"], ("127.0.0.1", 9)),
        (["--port=9", "--host=10.0.0.7"], ("10.0.0.7", 9)),
        (["--host", "0.0.0.0", "--port", "1", "--port", "2"], ("127.0.0.1", 2)),
    ],
)
def test_the_engines_address_is_read_from_its_command(command: list[str], where: tuple[str, int]) -> None:
    assert address(["vllm", *command]) == where


def test_an_option_without_value_is_none() -> None:
    assert option(["--port"], "--port") is None


def test_a_lock_excludes_and_says_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine, other = FileLock(path), FileLock(path)
    assert not is_held(path)
    assert mine.try_acquire('{"pod": "a"}')
    assert not other.try_acquire('{"pod": "b"}')
    assert is_held(path)
    assert content(path) == {"pod": "a"}
    mine.release()
    assert not is_held(path)
    assert content(path) == {}
    assert other.try_acquire("[]")
    assert content(path) == {}
    other.release()
    other.release()


def test_messages_fit_what_the_kubelet_keeps(tmp_path: Path) -> None:
    leave_message(tmp_path / "message", "ä" * MESSAGE_BYTES)
    assert len((tmp_path / "message").read_bytes()) == MESSAGE_BYTES
    leave_message(tmp_path / "no" / "folder", "still ends")


class FakeDriver:
    """The calls of the CUDA driver that the probe makes."""

    def __init__(self, devices: int = 1, failing: dict[str, int] | None = None) -> None:
        self.devices, self.failing = devices, failing or {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name in self.failing:
                return self.failing[name]
            self.answer(name, *arguments)
            return 0

        return call

    def answer(self, name: str, *arguments: Any) -> None:
        if name == "cuDeviceGetCount":
            arguments[0]._obj.value = self.devices
        elif name == "cuDeviceGetUuid":
            arguments[0]._obj[:] = range(16)
        elif name == "cuDeviceGetName":
            arguments[0].value = b"NVIDIA H100"
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = 1
        elif name == "cuMemGetInfo_v2":
            arguments[0]._obj.value, arguments[1]._obj.value = 5, 7


def test_the_probe_tells_identity_and_memory() -> None:
    assert cuda_probe.probe(FakeDriver()) == {
        "uuid": "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f",
        "name": "NVIDIA H100",
        "total": 7,
        "free": 5,
        "mps": True,
    }


def test_a_driver_too_old_to_know_about_mps_still_tells_the_rest() -> None:
    seen = cuda_probe.probe(FakeDriver(failing={"cuDeviceGetAttribute": 1}))
    assert (seen["mps"], seen["total"]) == (None, 7)


@pytest.mark.parametrize("driver", [FakeDriver(devices=0), FakeDriver(failing={"cuInit": 100})])
def test_no_device_is_an_answer(driver: FakeDriver) -> None:
    assert cuda_probe.probe(driver)["uuid"] is None


def test_a_driver_that_fails_is_an_error() -> None:
    with pytest.raises(cuda_probe.DriverError, match="cuDevicePrimaryCtxRetain returned CUDA error 2"):
        cuda_probe.probe(FakeDriver(failing={"cuDevicePrimaryCtxRetain": 2}))


def test_without_the_driver_library_the_probe_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda_probe.main() == 0
    assert json.loads(capsys.readouterr().out)["uuid"] is None


def test_injection_copies_whole_packages_and_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "tightship").mkdir()
    (tmp_path / "tightship" / "half").touch()
    for _ in range(2):
        inject(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"tightship"}
    assert {path.name for path in (tmp_path / "tightship").iterdir()} == {*PACKAGES, "__init__.py"}
    assert not list(tmp_path.rglob("__pycache__"))
    source = Path(tightship.__file__).parent
    assert (tmp_path / "tightship/replica/locks.py").read_text() == (source / "replica/locks.py").read_text()


def test_the_injected_supervisor_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    inject(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import tightship.replica.__main__",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def idle(tokens: float) -> Activity:
    return Activity(0, int(tokens), (tokens,))


def busy(tokens: float, running: int = 3) -> Activity:
    return Activity(running, int(tokens), (tokens,))


@pytest.mark.parametrize(
    ("looks", "found"),
    [
        ([(0, busy(5)), (5, busy(6)), (10, busy(7)), (99, busy(8))], False),
        ([(0, busy(5)), (5, busy(5)), (10, busy(5)), (15, busy(5))], True),
        ([(0, idle(5)), (5, idle(5)), (10, idle(5)), (500, idle(5))], False),
        ([(0, busy(5)), (5, None), (10, None), (15, None), (20, None)], False),
        ([(0, busy(5)), (5, busy(5)), (10, busy(6)), (15, busy(6)), (20, busy(6))], False),
        ([(0, busy(5)), (5, busy(5)), (10, idle(5)), (15, busy(5)), (20, busy(5))], False),
        ([(0, busy(5)), (900, busy(5)), (905, busy(6))], False),  # the machine stood still, not the engine
    ],
    ids=["steps", "hangs", "idle", "silent", "steps again", "idle between", "paused"],
)
def test_a_hang_is_requests_that_run_without_a_step_for_long_enough(
    looks: list[tuple[float, Activity | None]], found: bool
) -> None:
    watchdog = Watchdog(limit=15, period=5)
    findings = [watchdog.look(seen, now) for now, seen in looks]
    assert bool(findings[-1]) == found
    assert not any(findings[:-1])
    if found:
        assert findings[-1] is not None
        assert findings[-1].startswith("3 requests run, and for 15 s (limit 15 s) no step ended: 5 tokens since")


def test_a_limit_of_nought_looks_for_no_hang() -> None:
    watchdog = Watchdog(limit=0, period=5)
    assert not any(watchdog.look(busy(5), now) for now in range(0, 10_000, 5))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("cuInit returned CUDA error 807", Reason.MPS_FAULT),
        ("CUDA error: the MPS server is not ready to accept new MPS client requests", Reason.MPS_FAULT),
        ("cuInit returned CUDA error 8071", Reason.GPU_NOT_VISIBLE),
        ("cuInit returned CUDA error 999", Reason.GPU_NOT_VISIBLE),
    ],
)
def test_a_server_that_takes_no_clients_is_told_from_a_gpu_that_is_not_there(said: str, reason: Reason) -> None:
    with pytest.raises(RefusalError) as refused:
        run_probe(["sh", "-c", f"echo '{said}' >&2; exit 1"])
    assert refused.value.reason is reason


def test_a_lock_on_a_file_that_is_no_longer_there_is_none(tmp_path: Path) -> None:
    """A holder that leaves removes the files; who opened one before must not take it for the new one of that name."""
    path, real = tmp_path / "lock", os.path.samestat
    first, second = FileLock(path), FileLock(path)

    def exchanged(one: os.stat_result, other: os.stat_result) -> bool:
        path.unlink()
        path.touch()
        return real(one, path.stat())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os.path, "samestat", exchanged)
        assert not first.try_acquire("{}")
    assert first.try_acquire("{}")
    assert not second.try_acquire("{}")
    first.release()
