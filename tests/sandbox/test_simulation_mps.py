"""The stand-in for MPS: who is a client, what a fault does, what a death does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation_helpers import ENGINE, OPERATOR, Machine, Process, machine, wait_for
from tightship.sandbox.simulation.device import DRIVER_SHARE

RESERVED = 80 * 2**30 // DRIVER_SHARE
SMALL = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G", "--max-num-seqs", "8", "--enforce-eager")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as one:
        yield one


def start_engines(host: Machine, count: int) -> list[Process]:
    engines = [host.engine(*SMALL) for _ in range(count)]
    for engine in engines:
        wait_for("the engine is healthy", engine.healthy)
    return engines


def clients(host: Machine) -> set[int]:
    rows = host.mps_command("ps").splitlines()[1:]
    return {int(row.split()[0]) for row in rows}


def test_there_is_no_server_before_the_first_client(host: Machine) -> None:
    daemon = host.mps()
    assert host.mps_command("get_server_list") == host.mps_command("ps") == ""
    assert json.loads(host.call(ENGINE, "cuda-probe").stdout)["mps"] is True
    assert host.mps_command("ps") == "", "the probe was a client for a moment only"
    engines = start_engines(host, 2)
    server = host.mps_command("get_server_list").strip()
    assert host.mps_command(f"get_server_status {server}") == "ACTIVE\n"
    assert clients(host) == {engine.popen.pid for engine in engines}
    listed = host.mps_command(f"get_client_list {server}")
    assert {int(pid) for pid in listed.split()} == clients(host)
    assert "not found" in host.mps_command("get_server_status 1")
    engines[0].popen.terminate()
    assert engines[0].wait() == 0
    wait_for("the client is gone", lambda: clients(host) == {engines[1].popen.pid})
    daemon.popen.terminate()
    assert daemon.wait() == 0


def test_without_a_daemon_an_engine_silently_runs_without_mps(host: Machine) -> None:
    (engine,) = start_engines(host, 1)
    assert engine.post("/v1/completions", {"prompt": "a b", "max_tokens": 2})["usage"]["completion_tokens"] == 2
    command = host.call(OPERATOR, "nvidia-cuda-mps-control", stdin="get_server_list\n")
    assert (command.returncode, command.stderr) == (1, "Cannot find MPS control daemon process\n")


def test_a_fault_takes_every_client_and_refuses_new_ones_until_they_have_left(host: Machine) -> None:
    host.mps()
    engines = start_engines(host, 2)
    server = host.mps_command("get_server_list").strip()
    assert host.control("fault") == {"daemons": 1}
    wait_for("the server is in FAULT", lambda: host.mps_command(f"get_server_status {server}") == "FAULT\n", 5)
    probe = host.call(ENGINE, "cuda-probe")
    assert (probe.returncode, probe.stderr) == (
        1,
        "CUDA error: the MPS server is not ready to accept new MPS client requests\n",
    )
    late = host.engine(*SMALL)
    assert late.wait() == 1
    assert "the MPS server is not ready to accept new MPS client requests" in late.output
    for engine in engines:
        assert engine.wait() == 1
        assert "EngineDeadError" in engine.output
        assert "CUDA error: unspecified launch failure" in engine.output
    wait_for("the server is well again", lambda: host.mps_command(f"get_server_status {server}") == "ACTIVE\n")
    assert host.gpu()["used"] == RESERVED
    start_engines(host, 1)


def test_clients_of_a_daemon_that_dies_die(host: Machine) -> None:
    daemon = host.mps()
    (engine,) = start_engines(host, 1)
    daemon.popen.kill()
    assert engine.wait() == 1
    assert "MPS client failed to connect to the MPS control daemon" in engine.output


def test_one_client_can_be_terminated_alone(host: Machine) -> None:
    host.mps()
    first, second = start_engines(host, 2)
    server = host.mps_command("get_server_list").strip()
    assert host.mps_command(f"terminate_client {server} {first.popen.pid}") == ""
    assert first.wait() == 1
    assert "MPS client has been terminated" in first.output
    assert second.healthy()
    assert "not found" in host.mps_command(f"terminate_client {server} 1")


def test_killed_clients_give_back_memory_and_membership(host: Machine) -> None:
    host.mps()
    first, second = start_engines(host, 2)
    assert host.control("kill", pid=first.popen.pid) == {"killed": [first.popen.pid]}
    assert first.wait() == -9
    wait_for("it is no client any more", lambda: clients(host) == {second.popen.pid})
    assert host.control("kill")["killed"] == [second.popen.pid]
    wait_for("the memory is back", lambda: host.gpu()["used"] == RESERVED)


def test_a_second_daemon_on_one_pipe_directory_refuses(host: Machine) -> None:
    host.mps()
    second = host.spawn(OPERATOR, "nvidia-cuda-mps-control", "-f")
    assert second.wait() == 1
    assert "already running" in second.output
    assert host.mps_command("get_server_list") == "", "the first one still answers"


def test_quit_ends_the_daemon_and_a_new_one_takes_its_place(host: Machine) -> None:
    daemon = host.mps()
    host.mps_command("quit")
    assert daemon.wait() == 0
    assert not (host.directory / "pipe" / "control").exists()
    host.mps()
    assert "Invalid command" in host.mps_command("make_coffee")


@pytest.mark.parametrize(("visible", "says"), [("", "0 are visible"), ("GPU-none", "0 are visible")])
def test_a_daemon_without_a_gpu_does_not_start(host: Machine, visible: str, says: str) -> None:
    done = host.call(OPERATOR, "nvidia-cuda-mps-control", "-f", NVIDIA_VISIBLE_DEVICES=visible)
    assert done.returncode == 1
    assert says in done.stderr
