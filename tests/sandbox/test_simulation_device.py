"""The device server, and the tools that read it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation_helpers import ENGINE, OPERATOR, Machine, machine, wait_for
from tightship.sandbox.simulation.client import DeviceUnavailableError, visible
from tightship.sandbox.simulation.device import DRIVER_SHARE, Devices, parse_gpu
from tightship.sandbox.simulation.gpu import Gpu, Memory

GIB = 2**30
RESERVED = 80 * GIB // DRIVER_SHARE


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("device")) as one:
        yield one


def test_a_process_that_goes_gives_its_memory_back(host: Machine) -> None:
    device = host.device()
    opened = device.request("open", uuid=host.uuid)
    assert (opened["total"], opened["free"]) == (80 * GIB, 80 * GIB - RESERVED)
    device.request("alloc", bytes=30 * GIB)
    device.request("release", bytes=10 * GIB)
    assert host.gpu()["used"] == 20 * GIB + RESERVED
    with pytest.raises(DeviceUnavailableError, match="bytes free"):
        device.request("alloc", bytes=70 * GIB)
    device.close()
    wait_for("the memory is back", lambda: host.gpu()["used"] == RESERVED)


def test_work_ends_after_it_is_ready_and_one_after_the_other(host: Machine) -> None:
    with host.device() as first, host.device() as second:
        first.request("open", uuid=host.uuid)
        second.request("open", uuid=host.uuid)
        ends = [device.request("run", ready=1.0, gpu=0.01)["end"] for device in (first, second, first)]
    assert 1.0 < ends[0] < ends[1] < ends[2]


@pytest.mark.parametrize(
    ("request_line", "says"),
    [
        ({"op": "levitate"}, "unknown operation"),
        ({"op": "open", "uuid": "GPU-none"}, "no GPU GPU-none"),
        ({"op": "alloc", "bytes": 1}, "open a GPU first"),
        ({"op": "open"}, "uuid"),
        (
            {"op": "control", "verb": "paint", "uuid": "GPU-11111111-2222-3333-4444-555555555555"},
            "unknown control verb",
        ),
        ([], "get"),
    ],
)
def test_what_cannot_be_served_is_answered_with_its_reason(host: Machine, request_line: object, says: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(host.socket))
        connection.sendall(json.dumps(request_line).encode() + b"\n")
        assert says in json.loads(connection.makefile().readline())["error"]


def test_a_lost_gpu_is_gone_until_it_is_restored(host: Machine) -> None:
    host.control("lose")
    assert json.loads(host.call(ENGINE, "cuda-probe").stdout)["uuid"] is None
    with pytest.raises(DeviceUnavailableError, match="is lost"):
        host.device().request("open", uuid=host.uuid)
    host.control("restore")
    assert json.loads(host.call(ENGINE, "cuda-probe").stdout)["uuid"] == host.uuid


def test_the_tools_say_what_they_say_on_hardware(host: Machine) -> None:
    query = "--query-gpu=uuid,name,memory.total,driver_version"
    smi = host.call(OPERATOR, "nvidia-smi", query, "--format=csv,noheader,nounits")
    assert smi.stdout == f"{host.uuid}, NVIDIA-H100-80GB-HBM3, 81920, 580.105.08\n"
    with_units = host.call(OPERATOR, "nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv")
    assert with_units.stdout.splitlines()[0] == "memory.used, utilization.gpu"
    assert with_units.stdout.splitlines()[1].startswith("512 MiB, ")
    assert host.uuid in host.call(OPERATOR, "nvidia-smi", "-L").stdout
    assert host.call(OPERATOR, "nvidia-smi", "--query-gpu=colour", "--format=csv").returncode == 2
    blind = host.call(OPERATOR, "nvidia-smi", query, "--format=csv", NVIDIA_VISIBLE_DEVICES="void")
    assert (blind.returncode, blind.stderr) == (6, "No devices were found\n")
    probe = json.loads(host.call(ENGINE, "cuda-probe").stdout)
    expected = {
        "uuid": host.uuid,
        "name": "NVIDIA-H100-80GB-HBM3",
        "total": 80 * GIB,
        "free": 80 * GIB - RESERVED,
        "mps": False,
    }
    assert probe == expected
    unseen = json.loads(host.call(ENGINE, "cuda-probe", NVIDIA_VISIBLE_DEVICES="").stdout)
    assert unseen == {"uuid": None, "name": None, "total": 0, "free": 0, "mps": False}


def test_nvml_reads_the_same_gpu(host: Machine) -> None:
    program = """
import json, pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
memory, rates = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetUtilizationRates(handle)
by_uuid = pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(handle))
try:
    pynvml.nvmlDeviceGetHandleByIndex(1)
except pynvml.NVMLError as error:
    missing = str(error)
print(json.dumps([pynvml.nvmlDeviceGetCount(), pynvml.nvmlDeviceGetName(by_uuid), memory.total, memory.used + memory.free,
                  rates.gpu, missing, pynvml.nvmlSystemGetDriverVersion()]))
pynvml.nvmlShutdown()
"""
    done = host.call(ENGINE, "python3", "-c", program)
    assert json.loads(done.stdout) == [
        *(1, "NVIDIA-H100-80GB-HBM3", 80 * GIB, 80 * GIB),
        *(pytest.approx(0, abs=100), "Not Found", "580.105.08"),
    ], done.stderr
    blind = host.call(ENGINE, "python3", "-c", "import pynvml; pynvml.nvmlInit()", NVIDIA_VISIBLE_DEVICES="")
    assert "Driver Not Loaded" in blind.stderr


GPUS = [{"uuid": "GPU-a", "index": 0}, {"uuid": "GPU-b", "index": 1}, {"uuid": "GPU-c", "index": 2}]


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, []),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, []),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, []),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, ["GPU-a", "GPU-b", "GPU-c"]),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-b"}, ["GPU-b"]),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-c,0"}, ["GPU-c", "GPU-a"]),
        ({"NVIDIA_VISIBLE_DEVICES": "k8s.device-plugin.nvidia.com/gpu=GPU-b"}, ["GPU-b"]),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-elsewhere"}, []),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-b,GPU-c", "CUDA_VISIBLE_DEVICES": "1"}, ["GPU-c"]),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-b,GPU-c", "CUDA_VISIBLE_DEVICES": "GPU-a"}, []),
        ({"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_a_container_sees_what_its_environment_names(environment: dict[str, str], seen: list[str]) -> None:
    assert [gpu["uuid"] for gpu in visible(GPUS, environment)] == seen


@pytest.mark.parametrize(
    ("cuda", "seen"), [(None, ["GPU-b"]), ("0", ["GPU-b"]), ("1", []), ("GPU-b", ["GPU-b"]), ("GPU-a", [])]
)
def test_a_client_of_mps_sees_the_daemons_gpu_as_its_first(cuda: str | None, seen: list[str]) -> None:
    environment = {"NVIDIA_VISIBLE_DEVICES": "all"} | ({} if cuda is None else {"CUDA_VISIBLE_DEVICES": cuda})
    assert [gpu["uuid"] for gpu in visible(GPUS, environment, served="GPU-b")] == seen


@pytest.mark.parametrize(
    "text", ["uuid=GPU-a", "node=n,uuid=u,product=p,memory=80Qi", "node=n,uuid=u,product=p,memory=1Gi,colour=red"]
)
def test_a_gpu_that_is_not_described_well_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"GPU needs|quantity"):
        parse_gpu(text)


def test_gpus_are_numbered_on_each_node_and_unique() -> None:
    texts = [f"node={node},uuid=GPU-{node}{n},product=p,memory=64Gi" for node in "ab" for n in range(2)]
    slots = Devices([parse_gpu(text) for text in texts]).slots
    assert [slot.index for slot in slots.values()] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="two GPUs"):
        Devices([Gpu("GPU-a", "p", Memory(1)), Gpu("GPU-a", "p", Memory(1))])
    with pytest.raises(ValueError, match="time scale"):
        Devices([], 0)


def test_a_bad_gpu_ends_the_server_with_its_reason(tmp_path: Path, host: Machine) -> None:
    command = ("python3", "-m", "tightship.sandbox.simulation.device", "--socket", str(tmp_path / "s"))
    done = host.call(OPERATOR, *command, "--gpu", "uuid=GPU-a")
    assert done.returncode == 2
    assert "a GPU needs exactly node, uuid, product and memory" in done.stderr
