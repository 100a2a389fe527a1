"""A replica's life, with real processes, signals and locks; only the engine and the GPU are stood in for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tightship.replica.locks import FileLock, is_held
from tightship.replica.outcome import EXIT_STATUS, Reason

ENGINE = Path(__file__).with_name("fake_engine.py")
UUID = "GPU-00000000-0000-0000-0000-000000000001"
GIB = 1 << 30


class Pack:
    """A pack's directory, and the replicas that a test starts on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self.gpu = folder / "gpu"
        self.holder = FileLock(folder / "holder.lock")
        self.replicas: list[Replica] = []
        (folder / "mps").mkdir()
        (folder / "mps" / "control").touch()
        self.see(uuid=UUID)
        self.hold()

    def hold(self, gpu: str = UUID, session: str = "first") -> None:
        """A holder takes the pack's lock."""
        assert self.holder.try_acquire(json.dumps({"pack": "p", "gpu": gpu, "session": session}))

    def see(self, **gpu: Any) -> None:
        """What the driver will show."""
        self.gpu.write_text(json.dumps({"name": "H100", "total": 80 * GIB, "free": 79 * GIB, **gpu}))

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def start(self, *engine: str, device: str = "cuda", **env: str) -> Replica:
        replica = Replica(self, list(engine), device, env)
        self.replicas.append(replica)
        return replica


class Replica:
    """One supervisor process."""

    def __init__(self, pack: Pack, engine: list[str], device: str, env: dict[str, str]) -> None:
        self.message_path = pack.folder / f"message-{len(pack.replicas)}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(ENGINE), "--port", str(port), "--journal", str(pack.journal), *engine]
        mps = (
            {"CUDA_MPS_PIPE_DIRECTORY": str(pack.folder / "mps"), "TIGHTSHIP_GPU_UUID": UUID}
            if device == "cuda"
            else {}
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tightship.replica", "--", *command],
            env={
                **os.environ,
                "TIGHTSHIP_DEVICE": device,
                "TIGHTSHIP_PACK_DIR": str(pack.folder),
                "TIGHTSHIP_POD_NAME": f"replica-{len(pack.replicas)}",
                "TIGHTSHIP_POD_UID": f"uid-{len(pack.replicas)}",
                "TIGHTSHIP_DRAIN_TIMEOUT": "20",
                "TIGHTSHIP_CUDA_PROBE": f"cat {pack.gpu}",
                "TIGHTSHIP_TERMINATION_MESSAGE": str(self.message_path),
                **mps,
                **env,
            },
        )

    @property
    def message(self) -> str:
        return self.message_path.read_text()

    def ends(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    made = Pack(tmp_path)
    yield made
    made.holder.release()
    for replica in made.replicas:
        replica.process.kill()
        replica.process.wait()
    for event in made.events("start"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(event["pid"], signal.SIGKILL)


def eventually(holds: Callable[[], object], timeout: float = 20) -> None:
    give_up = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.05)


def serving(pack: Pack, engines: int = 1) -> Callable[[], bool]:
    def holds() -> bool:
        return len({event["pid"] for event in pack.events("healthy")}) >= engines and not is_held(
            pack.folder / "start.lock"
        )

    return holds


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_it_serves_until_asked_to_stop_and_ends_well(pack: Pack) -> None:
    replica = pack.start(TIGHTSHIP_MEMORY_BYTES=str(8 * GIB))
    eventually(serving(pack))
    replica.process.terminate()

    assert replica.ends() == 0
    assert pack.events("start")[0]["share"] == "0.1000"
    assert len(pack.events("term")) == 1
    assert not replica.message_path.exists()


def test_a_gpu_of_its_own_needs_no_holder(pack: Pack) -> None:
    pack.holder.release()
    replica = pack.start(TIGHTSHIP_SHARING="Exclusive", TIGHTSHIP_GPU_UUID="")
    eventually(serving(pack))
    replica.process.terminate()
    assert replica.ends() == 0


def test_engines_start_one_at_a_time(pack: Pack) -> None:
    for _ in range(3):
        pack.start("--healthy-after", "1")
    eventually(serving(pack, engines=3), timeout=40)

    starts = pack.events("start")
    for earlier, later in itertools.pairwise(starts):
        healthy = [event["at"] for event in pack.events("healthy") if event["pid"] == earlier["pid"]]
        assert min(healthy) <= later["at"]


def test_a_killed_starter_leaves_the_slot_to_the_next_and_takes_its_engine_along(pack: Pack) -> None:
    first = pack.start("--healthy-after", "300")
    eventually(lambda: pack.events("start"))
    second = pack.start()
    first.process.kill()

    eventually(serving(pack))
    eventually(lambda: not alive(pack.events("start")[0]["pid"]))
    assert second.process.poll() is None


def test_an_engine_that_never_gets_healthy_is_killed_and_the_slot_let_go(pack: Pack) -> None:
    slow = pack.start("--healthy-after", "300", "--child", TIGHTSHIP_START_TIMEOUT="1")
    assert slow.ends() == EXIT_STATUS[Reason.START_TIMEOUT]
    assert slow.message.startswith("StartTimeout: the engine did not answer /health within 1 s")
    eventually(lambda: not alive(pack.events("child")[0]["child"]))
    assert not is_held(pack.folder / "start.lock")


def test_waiting_for_the_slot_can_be_called_off(pack: Pack) -> None:
    slot = FileLock(pack.folder / "start.lock")
    assert slot.try_acquire('{"pod": "other"}')
    replica = pack.start()
    eventually(lambda: replica_waits(replica))
    replica.process.terminate()
    assert replica.ends() == 0
    assert not pack.events("start")
    slot.release()


def replica_waits(replica: Replica) -> bool:
    """Whether the supervisor has its SIGTERM handler installed."""
    status = Path(f"/proc/{replica.process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_without_a_holder_nothing_starts(pack: Pack) -> None:
    pack.holder.release()
    replica = pack.start()
    assert replica.ends() == EXIT_STATUS[Reason.HOLDER_LOST]
    assert replica.message.startswith("HolderLost: nobody holds")
    assert not pack.events("start")


def test_losing_the_holder_stops_a_serving_engine(pack: Pack) -> None:
    replica = pack.start()
    eventually(serving(pack))
    pack.holder.release()
    assert replica.ends() == EXIT_STATUS[Reason.HOLDER_LOST]
    assert len(pack.events("term")) == 1
    assert not alive(pack.events("start")[0]["pid"])


def test_a_daemon_that_was_replaced_between_two_looks_ends_the_engine_of_the_one_before(pack: Pack) -> None:
    """The lock is held again before anybody missed it; an engine whose MPS server has gone would fail with the next request."""
    replica = pack.start()
    eventually(serving(pack))
    pack.holder.release()
    pack.hold(session="second")
    assert replica.ends() == EXIT_STATUS[Reason.HOLDER_LOST]
    assert "another one has taken its place" in replica.message


def test_a_lock_without_a_session_is_waited_for_so_that_the_end_of_its_daemon_is_noticed(pack: Pack) -> None:
    """A holder writes a moment after it has taken the lock."""
    pack.holder.release()
    assert pack.holder.try_acquire("")
    replica = pack.start()
    eventually(lambda: is_held(pack.folder / "start.lock"))
    with pytest.raises(AssertionError):
        eventually(lambda: pack.events("start"), timeout=1.5)
    pack.holder.path.write_text(json.dumps({"pack": "p", "gpu": UUID, "session": "first"}))
    eventually(serving(pack))
    pack.holder.release()
    pack.hold(session="second")
    assert replica.ends() == EXIT_STATUS[Reason.HOLDER_LOST]


def test_who_waited_for_the_start_lock_of_a_holder_that_has_left_does_not_start(pack: Pack) -> None:
    """The lock becomes free when the holder goes, between two looks at who holds the GPU."""
    slot = FileLock(pack.folder / "start.lock")
    assert slot.try_acquire("{}")
    replica = pack.start()
    eventually(lambda: replica_waits(replica))
    pack.holder.release()
    slot.release()
    assert replica.ends() == EXIT_STATUS[Reason.HOLDER_LOST]
    assert not pack.events("start")


def test_a_holder_of_another_gpu_is_no_holder(pack: Pack) -> None:
    pack.holder.release()
    pack.hold(gpu="GPU-other")
    replica = pack.start()
    assert replica.ends() == EXIT_STATUS[Reason.GPU_MISMATCH]
    assert "the pack's holder has GPU-other, this replica is made for GPU-0000" in replica.message
    assert not pack.events("start")


def test_an_engine_that_hangs_while_health_answers_is_killed_with_numbers(pack: Pack, tmp_path: Path) -> None:
    """The look comes every five seconds, so a limit of one is found at the second."""
    in_flight = tmp_path / "in-flight"
    in_flight.write_text("3")
    replica = pack.start("--hung", "--in-flight", str(in_flight), TIGHTSHIP_HANG_TIMEOUT="1")
    assert replica.ends() == EXIT_STATUS[Reason.ENGINE_HUNG]
    assert replica.message.startswith("EngineHung: 3 requests run, and for ")
    assert "(limit 1 s) no step ended: 1200 tokens since the engine started" in replica.message
    assert not alive(pack.events("start")[0]["pid"])


def test_what_the_preflight_saw_lies_in_the_packs_directory_while_the_replica_lives(pack: Pack) -> None:
    pack.see(uuid=UUID, free=41 * GIB)
    replica = pack.start(TIGHTSHIP_MEMORY_BYTES=str(8 * GIB))
    eventually(lambda: pack.events("start"))
    (path,) = pack.folder.glob("preflight.*")
    seen = json.loads(path.read_text())
    assert path.name == "preflight.uid-0.json"
    assert (seen["pod"], seen["uuid"], seen["total"], seen["free"]) == ("replica-0", UUID, 80 * GIB, 41 * GIB)
    replica.process.terminate()
    replica.ends()
    assert not path.exists()


def test_an_engine_that_must_be_killed_is_taken_out_of_mps_first(pack: Pack) -> None:
    """Here the test is the holder: it sees the request while the engine lives, and ends its clients."""
    replica = pack.start("--deaf", TIGHTSHIP_DRAIN_TIMEOUT="0")
    eventually(serving(pack))
    replica.process.terminate()
    request = pack.folder / "terminate.uid-0"
    eventually(request.exists)
    engine = pack.events("start")[0]["pid"]
    assert alive(engine)
    assert "replica-0: did not stop within 8 s" in request.read_text()
    request.unlink()
    assert replica.ends() == 0
    assert not alive(engine)


def test_a_server_in_fault_is_waited_for(pack: Pack) -> None:
    state = pack.folder / "mps-state"
    state.write_text("cuInit returned CUDA error 807")
    figures = json.dumps({"uuid": UUID, "name": "H100", "total": 80 * GIB, "free": 79 * GIB})
    probe = f"""sh -c 'if [ -e {state} ]; then cat {state} >&2; exit 1; fi; echo "$FIGURES"'"""
    replica = pack.start(TIGHTSHIP_CUDA_PROBE=probe, FIGURES=figures)
    with pytest.raises(subprocess.TimeoutExpired):
        replica.ends(timeout=1.5)
    assert not pack.events("start")
    state.unlink()
    eventually(serving(pack))


def test_requests_in_flight_get_their_time(pack: Pack, tmp_path: Path) -> None:
    in_flight = tmp_path / "in-flight"
    in_flight.write_text("3")
    replica = pack.start("--in-flight", str(in_flight))
    eventually(serving(pack))
    replica.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        replica.ends(timeout=4)
    assert not pack.events("term")

    in_flight.write_text("0.0")
    assert replica.ends() == 0
    assert len(pack.events("term")) == 1


@pytest.mark.parametrize("hurry", ["timeout", "second signal"])
def test_draining_ends_at_its_timeout_or_when_asked_again(pack: Pack, tmp_path: Path, hurry: str) -> None:
    in_flight = tmp_path / "in-flight"
    in_flight.write_text("3")
    timeout = "1" if hurry == "timeout" else "600"
    replica = pack.start("--in-flight", str(in_flight), TIGHTSHIP_DRAIN_TIMEOUT=timeout)
    eventually(serving(pack))
    replica.process.terminate()
    if hurry == "second signal":
        with pytest.raises(subprocess.TimeoutExpired):
            replica.ends(timeout=1)
        replica.process.terminate()
    assert replica.ends() == 0


def test_an_engine_deaf_to_sigterm_is_killed_with_all_it_started(pack: Pack) -> None:
    replica = pack.start("--deaf", "--child", device="cpu", TIGHTSHIP_DRAIN_TIMEOUT="0")
    eventually(serving(pack))
    replica.process.terminate()
    assert replica.ends() == 0
    assert not alive(pack.events("start")[0]["pid"])
    eventually(lambda: not alive(pack.events("child")[0]["child"]))


def test_other_signals_reach_the_engine(pack: Pack) -> None:
    replica = pack.start()
    eventually(serving(pack))
    replica.process.send_signal(signal.SIGUSR1)
    eventually(lambda: pack.events("usr1"))


@pytest.mark.parametrize(
    ("fail", "status", "words"), [("7", 7, "status 7"), ("0", 1, "status 0"), ("kill", 137, "SIGKILL")]
)
def test_an_engine_that_ends_by_itself_leaves_its_last_words(pack: Pack, fail: str, status: int, words: str) -> None:
    replica = pack.start("--fail", fail)
    assert replica.ends() == status
    assert replica.message.startswith(f"EngineFailed: the engine ended with {'signal' if fail == 'kill' else 'status'}")
    assert words in replica.message
    assert replica.message.splitlines()[1].startswith("ValueError: Free memory on device (3/80 GiB)")
    assert "Traceback of something else" in replica.message


def test_an_engine_that_crashes_while_serving_ends_the_replica(pack: Pack) -> None:
    replica = pack.start()
    eventually(serving(pack))
    os.kill(pack.events("start")[0]["pid"], signal.SIGSEGV)
    assert replica.ends() == 128 + signal.SIGSEGV
    assert "SIGSEGV while serving" in replica.message


@pytest.mark.parametrize(
    ("gpu", "reason", "words"),
    [
        (
            {"uuid": None},
            Reason.GPU_NOT_VISIBLE,
            "the operator's --gpu-naming (the chart's operator.gpuNaming) is legacy",
        ),
        ({"uuid": "GPU-other"}, Reason.GPU_MISMATCH, "sees GPU-other (H100), the pack holds GPU-0000"),
        ({"uuid": UUID, "mps": False}, Reason.MPS_NOT_ATTACHED, "through MPS although a daemon's pipe"),
        ({"uuid": UUID, "total": 4 * GIB}, Reason.INSUFFICIENT_MEMORY, "needs 8.00Gi of GPU-0000"),
    ],
)
def test_a_wrong_gpu_is_refused_before_the_engine_starts(
    pack: Pack, gpu: dict[str, Any], reason: Reason, words: str
) -> None:
    pack.see(**gpu)
    replica = pack.start(TIGHTSHIP_MEMORY_BYTES=str(8 * GIB))
    assert replica.ends() == EXIT_STATUS[reason]
    assert replica.message.startswith(f"{reason.value}: ")
    assert words in replica.message
    assert not pack.events("start")


def test_memory_that_is_freed_late_is_waited_for(pack: Pack) -> None:
    pack.see(uuid=UUID, free=2 * GIB)
    replica = pack.start(TIGHTSHIP_MEMORY_BYTES=str(8 * GIB))
    with pytest.raises(subprocess.TimeoutExpired):
        replica.ends(timeout=1)
    assert not pack.events("start")
    pack.see(uuid=UUID, free=8 * GIB)
    eventually(serving(pack))


def test_a_pipe_directory_without_a_daemon_is_refused(pack: Pack) -> None:
    (pack.folder / "mps" / "control").unlink()
    replica = pack.start()
    assert replica.ends() == EXIT_STATUS[Reason.MPS_NOT_ATTACHED]
    assert "no MPS daemon at" in replica.message


@pytest.mark.parametrize(
    ("probe", "status", "words"),
    [
        ("echo no figures", EXIT_STATUS[Reason.GPU_NOT_VISIBLE], "no figures"),
        ("sh -c 'echo driver too old >&2; exit 1'", EXIT_STATUS[Reason.GPU_NOT_VISIBLE], "driver too old"),
        ("/no/such/probe", EXIT_STATUS[Reason.INVALID_SETTINGS], "does not run"),
    ],
)
def test_a_probe_that_fails_is_named(pack: Pack, probe: str, status: int, words: str) -> None:
    replica = pack.start(TIGHTSHIP_CUDA_PROBE=probe)
    assert replica.ends() == status
    assert words in replica.message


def test_the_built_in_probe_finds_no_gpu_where_none_is_visible(pack: Pack) -> None:
    replica = pack.start(TIGHTSHIP_CUDA_PROBE="", CUDA_VISIBLE_DEVICES="")
    assert replica.ends() == EXIT_STATUS[Reason.GPU_NOT_VISIBLE]


def test_on_a_cpu_there_is_no_holder_and_the_engine_is_bound_to_its_cores(pack: Pack) -> None:
    pack.holder.release()
    replica = pack.start(device="cpu")
    eventually(serving(pack))
    cores = sorted(os.sched_getaffinity(0))
    assert pack.events("start")[0]["bind"] == ",".join(map(str, cores[1:] or cores)), (
        "the lowest is left for its API server"
    )
    assert pack.events("start")[0]["share"] is None
    replica.process.terminate()
    assert replica.ends() == 0


def test_the_ledgers_kv_cache_is_not_overridden_by_the_environment(pack: Pack) -> None:
    """VLLM_CPU_KVCACHE_SPACE would win over the command line (vLLM's platforms/cpu.py)."""
    pack.start("--kv-cache-memory-bytes", "1000", device="cpu", VLLM_CPU_KVCACHE_SPACE="4")
    eventually(lambda: pack.events("start"))
    assert pack.events("start")[0]["space"] is None


def test_a_binding_given_by_the_user_stays(pack: Pack) -> None:
    pack.start(device="cpu", VLLM_CPU_OMP_THREADS_BIND="0")
    eventually(lambda: pack.events("start"))
    assert pack.events("start")[0]["bind"] == "0"


@pytest.mark.parametrize("wrong", [{"TIGHTSHIP_DEVICE": "tpu"}, {"TIGHTSHIP_DRAIN_TIMEOUT": "soon"}])
def test_settings_that_make_no_sense_are_named(pack: Pack, wrong: dict[str, str]) -> None:
    replica = pack.start(**wrong)
    assert replica.ends() == EXIT_STATUS[Reason.INVALID_SETTINGS]
    assert next(iter(wrong)) in replica.message


def test_a_program_that_does_not_exist(pack: Pack) -> None:
    message = pack.folder / "message"
    env = {
        "TIGHTSHIP_DEVICE": "cpu",
        "TIGHTSHIP_PACK_DIR": str(pack.folder),
        "TIGHTSHIP_TERMINATION_MESSAGE": str(message),
    }
    for command, words in [(["--", "/no/such/engine"], "/no/such/engine does not start"), ([], "usage")]:
        done = subprocess.run(
            [sys.executable, "-m", "tightship.replica", *command], env={**os.environ, **env}, check=False, timeout=30
        )
        assert done.returncode != 0
        assert words in message.read_text()
