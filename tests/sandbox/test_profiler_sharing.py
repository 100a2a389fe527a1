"""The Job's own MPS daemon, against the simulated `nvidia-cuda-mps-control` and engines that are its clients."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation_helpers import ENGINE, Machine, machine, wait_for
from tightship.profiler import sharing
from tightship.profiler.clock import SystemClock
from tightship.profiler.gpu import DeviceIdentity
from tightship.profiler.sharing import MpsSharing, NotAttachedError, SharingError, open_sharing


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as started:
        yield started


def make(one: Machine, tmp_path: Path) -> MpsSharing:
    """A daemon for the machine's GPU, started as in a container of the engine image."""
    environ = one.environment(ENGINE)
    environ.pop("CUDA_MPS_PIPE_DIRECTORY")
    return MpsSharing(one.uuid, environ, SystemClock(), preferred=tmp_path)


def start(one: Machine, environment: dict[str, str]) -> None:
    engine = one.engine("--kv-cache-memory-bytes=1000000000", "--gpu-memory-utilization=0.1", **environment)
    wait_for("the engine is healthy", engine.healthy)


def of_client(mps: MpsSharing, index: int = 0) -> dict[str, str]:
    """What an engine's environment gets to be a client."""
    return {name: value or "" for name, value in mps.environment(index).items()}


class Running:
    """An engine of these tests: its processes, each of which may be a client."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids

    def owns(self, pid: int) -> bool:
        return pid in self._pids


def engines(one: Machine) -> list[Running]:
    """Those that were started, without the machine's device server."""
    return [Running(process.pid) for process in one.processes[1:]]


def homes(directory: Path) -> list[Path]:
    """What daemons have left behind."""
    return list(directory.glob("mps-*"))


async def test_engines_are_proven_to_be_clients_and_the_daemon_ends_with_the_trials(
    one: Machine, tmp_path: Path
) -> None:
    mps = make(one, tmp_path)
    await mps.open()
    environment = of_client(mps)
    pipe = Path(environment["CUDA_MPS_PIPE_DIRECTORY"])
    assert (pipe / "control").exists()

    await asyncio.to_thread(start, one, environment)
    await mps.prove(engines(one))
    await asyncio.to_thread(start, one, environment)
    await mps.prove(engines(one))
    assert await mps.condition() is None

    for process in one.processes[1:]:
        process.terminate()
        await asyncio.to_thread(process.wait)
    await mps.close()
    assert not pipe.parent.exists()
    await mps.close()


SECOND = "GPU-22222222-2222-3333-4444-555555555555"


@pytest.mark.parametrize("visible", ["1", SECOND, f"{SECOND[:12]}"])
async def test_clients_count_the_daemons_gpu_anew(tmp_path: Path, visible: str) -> None:
    """On a machine with several GPUs the number or UUID that chose one for the sweep is nothing to the clients of its daemon."""
    with machine(tmp_path, others=(SECOND,)) as one:
        chosen = {"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": visible}
        idle = one.gpu(1)["used"]
        environ = one.environment(ENGINE, **chosen)
        environ.pop("CUDA_MPS_PIPE_DIRECTORY")
        mps = MpsSharing(SECOND, environ, SystemClock(), preferred=tmp_path)
        await mps.open()
        for index in (0, 1):
            environment = of_client(mps, index)
            await asyncio.to_thread(start, one, {**chosen, **environment})
            await mps.prove(engines(one))
        assert one.gpu(1)["used"] > idle + 2 * 10**9
        assert one.gpu(0)["used"] == idle
        # What chose the GPU before chooses none of the daemon's.
        kept = {**chosen, "CUDA_MPS_PIPE_DIRECTORY": environment["CUDA_MPS_PIPE_DIRECTORY"]}
        lost = one.engine("--gpu-memory-utilization=0.1", **kept)
        if visible == "1":
            assert await asyncio.to_thread(lost.wait) == 1
            assert "Failed to infer device type" in lost.output
        lost.popen.kill()
        await mps.close()


async def test_an_engine_that_is_no_client_is_found_out(
    one: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "ATTACH_SECONDS", 0.5)
    mps = make(one, tmp_path)
    await mps.open()
    environment = of_client(mps)
    await asyncio.to_thread(start, one, environment)
    # To CUDA an empty pipe directory is no error: the engine starts, and takes turns.
    await asyncio.to_thread(start, one, {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "elsewhere")})
    with pytest.raises(
        NotAttachedError,
        match=r"MPSNotAttached: 2 engines run, but the MPS daemon says: 1 clients, none of them of engine 2",
    ):
        await mps.prove(engines(one))
    await mps.close()


async def test_two_clients_of_one_engine_prove_nothing_of_another(
    one: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's engine core and its API server are a client each."""
    monkeypatch.setattr(sharing, "ATTACH_SECONDS", 0.5)
    mps = make(one, tmp_path)
    await mps.open()
    environment = of_client(mps)
    for _ in range(2):
        await asyncio.to_thread(start, one, environment)
    core, server = (process.pid for process in one.processes[1:])
    await mps.prove([Running(core, server)])
    with pytest.raises(
        NotAttachedError, match=r"2 engines run, but the MPS daemon says: 2 clients, none of them of engine 2"
    ):
        await mps.prove([Running(core, server), Running(1)])
    await mps.close()


async def test_a_fault_is_told(one: Machine, tmp_path: Path) -> None:
    mps = make(one, tmp_path)
    await mps.open()
    await asyncio.to_thread(start, one, of_client(mps))
    await mps.prove(engines(one))
    one.control("fault")
    assert "FAULT" in (await mps.condition() or "")
    await mps.close()


async def test_without_the_program_it_is_said_what_to_do(one: Machine, tmp_path: Path) -> None:
    mps = MpsSharing(one.uuid, {"PATH": str(tmp_path)}, SystemClock(), preferred=tmp_path)
    with pytest.raises(SharingError, match="NVIDIA_DRIVER_CAPABILITIES=compute,utility"):
        await mps.open()
    assert not homes(tmp_path)


async def test_a_daemon_that_ends_at_once_is_no_daemon(
    one: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mps = MpsSharing("GPU-nothing", one.environment(ENGINE), SystemClock(), preferred=tmp_path)
    with pytest.raises(SharingError, match="ended with 1"):
        await mps.open()
    assert not homes(tmp_path)
    assert "nvidia-cuda-mps-control: this stand-in serves exactly one GPU; 0 are visible" in caplog.messages


def test_the_way_to_share_fits_the_device() -> None:
    gpu = DeviceIdentity("cuda", "H100", 1, uuid="GPU-1")
    assert isinstance(open_sharing(gpu, None, {}, SystemClock()), MpsSharing)
    cores = len(os.sched_getaffinity(0))
    cpu = open_sharing(DeviceIdentity("cpu", "cpu", 1), None, {}, SystemClock())
    assert cpu.doubt(cores) is None, "one core each, unless the manifest says otherwise"
    assert f"the {cores} cores this Job may use" in (cpu.doubt(cores + 1) or "")
