"""The holder pod: identity, daemon and lock, what is published, with real processes, locks and signals."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_nvidia import Fakes

from tightship.node import control, daemon, gpu, pods, prepare, watch
from tightship.node.lock import HolderLock
from tightship.node.patience import Patience

UID = "0a1b2c3d-1111-2222-3333-444455556666"
HASH = "0123456789abcdef0123456789abcdef"


def eventually(holds: Callable[[], object], timeout: float = 15) -> None:
    give_up = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.02)


def is_held(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# Identity


def test_identity_is_what_nvidia_smi_says_in_the_node_labels_words(fakes: Fakes) -> None:
    assert gpu.identify({}) == gpu.GPU("GPU-1", "NVIDIA-H100-80GB-HBM3", 81559 << 20, "550.54.15")


def test_of_several_visible_gpus_the_one_that_was_given_counts(fakes: Fakes) -> None:
    fakes.show(smi="GPU-1, A, 1, 2\nGPU-2, B, 3, 4\n")
    assert gpu.identify({"NVIDIA_VISIBLE_DEVICES": "GPU-2"}).product == "B"
    with pytest.raises(gpu.GPUError, match="0 GPUs are this container's"):
        gpu.identify({})


@pytest.mark.parametrize(
    ("smi", "words"), [(None, "No devices were found"), ("garbage", "printed 'garbage'"), ("", "0 GPUs")]
)
def test_no_gpu_is_named(fakes: Fakes, smi: str | None, words: str) -> None:
    fakes.show(smi=smi)
    with pytest.raises(gpu.GPUError, match=words):
        gpu.identify({})


def test_a_missing_nvidia_smi_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gpu.GPUError, match="container toolkit"):
        gpu.identify({})


# What the daemon says


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"down": True}, control.Health("DOWN")),
        ({}, control.Health("IDLE")),
        ({"servers": [44]}, control.Health("ACTIVE", 44)),
        ({"servers": [44], "clients": [9, 7, 9]}, control.Health("ACTIVE", 44, (7, 9))),
        ({"servers": [44, 45], "faulty": [45], "clients": [7]}, control.Health("FAULT", 45, (7,))),
    ],
)
def test_health(fakes: Fakes, state: dict[str, Any], expected: control.Health) -> None:
    fakes.show(**state)
    assert control.health() == expected


def test_without_the_program_mps_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert control.health().state == "DOWN"


# From a PID to a pod


@pytest.mark.parametrize(
    ("cgroup", "uid"),
    [
        (f"0::/kubepods/burstable/pod{UID}/abc\n", UID),
        (f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-ff.scope\n", UID),
        (f"12:cpu:/kubepods/pod{UID}/abc\n11:memory:/kubepods/pod{UID}/abc\n", UID),
        (f"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{HASH}.slice/cri-o-ff.scope\n", HASH),
        (f"0::/../../kubepods-burstable-pod{UID.replace('-', '_')}.slice/docker-ff.scope\n", UID),
        ("0::/system.slice/ssh.service\n", None),
        ("0::/kubepods/podman/abc\n", None),
        (f"0::/kubepods/pod{HASH}ab/abc\n", None),
        ("", None),
    ],
)
def test_the_pod_is_read_from_the_cgroup(tmp_path: Path, cgroup: str, uid: str | None) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(cgroup)
    assert watch.pod_uid(7, tmp_path) == uid


def test_a_process_that_has_ended_is_in_no_pod(tmp_path: Path) -> None:
    assert watch.pod_uid(7, tmp_path) is None


# What is published


def test_observation(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(f"0::/kubepods/pod{UID}/x")
    fakes.show(servers=[44], clients=[7, 8])
    seen = watch.observe(tmp_path, tmp_path)
    assert seen[watch.ANNOTATION_GPU] is None, "none is known yet"
    assert json.loads(seen[watch.ANNOTATION_MPS]) == {
        "state": "ACTIVE",
        "server": 44,
        "clients": [{"pid": 7, "podUID": UID}, {"pid": 8, "podUID": None}],
    }

    gpu.write(tmp_path / "gpu.json", gpu.GPU("GPU-1", "H100", 5, "550"))
    assert json.loads(watch.observe(tmp_path, tmp_path)[watch.ANNOTATION_GPU])["uuid"] == "GPU-1"
    assert stat.S_IMODE((tmp_path / "gpu.json").stat().st_mode) == 0o644


def test_a_daemon_that_is_starting_is_not_down_yet(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    look = watch.Look(tmp_path, tmp_path, start_seconds=20, clock=lambda: now)
    with monkeypatch.context() as hidden:
        hidden.setenv("PATH", str(tmp_path))  # no control program answers
        assert look() == {}
        now = 21.0
        assert json.loads(look()[watch.ANNOTATION_MPS])["state"] == "DOWN", "a daemon that never answers is told"
    fresh = watch.Look(tmp_path, tmp_path, start_seconds=20, clock=lambda: now)
    fakes.show(servers=[44], clients=[])
    assert json.loads(fresh()[watch.ANNOTATION_MPS])["state"] == "ACTIVE"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.loads(fresh()[watch.ANNOTATION_MPS])["state"] == "DOWN", "once it has answered, silence is told at once"


def test_an_identity_that_is_gone_is_taken_back(fakes: Fakes, tmp_path: Path) -> None:
    written: list[Mapping[str, str | None]] = []
    look = watch.Look(tmp_path, tmp_path)
    watcher = watch.Watcher(look=look, write=written.append, interval=0.001)
    rounds = iter(range(3))

    def change() -> Mapping[str, str | None]:
        number = next(rounds, None)
        if number == 0:
            gpu.write(tmp_path / "gpu.json", gpu.GPU("GPU-1", "H100", 5, "550"))
        elif number == 1:
            (tmp_path / "gpu.json").unlink()
        else:
            watcher.stopped.set()
        return look()

    watcher.look = change
    watcher.run()
    assert "GPU-1" in (written[0][watch.ANNOTATION_GPU] or "")
    assert written[1] == {watch.ANNOTATION_GPU: None}
    assert len(written) == 2


def test_only_changes_are_written_and_a_failed_write_is_tried_again() -> None:
    looks = iter([{"a": "1"}, {"a": "1"}, {"a": "1", "b": "1"}, {"a": "2", "b": "1"}, {"a": "2", "b": "1"}])
    written: list[Mapping[str, str | None]] = []
    watcher = watch.Watcher(look=lambda: {}, write=lambda changed: None, interval=0.001, slowest=0.002)

    def look() -> Mapping[str, str | None]:
        seen = next(looks, None)
        if seen is None:
            watcher.stopped.set()
            return {}
        return seen

    def write(changed: Mapping[str, str | None]) -> None:
        written.append(changed)
        if len(written) == 1:
            raise httpx.ConnectError("not yet")

    watcher.look, watcher.write = look, write
    watcher.run()
    assert written == [{"a": "1"}, {"a": "1"}, {"b": "1"}, {"a": "2"}]


def make_pod(
    tmp_path: Path, answer: Callable[[httpx.Request], httpx.Response], host: str = "10.96.0.1"
) -> watch.OwnPod:
    (tmp_path / "token").write_text("secret\n")
    env = {
        "KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": "6443", "TIGHTSHIP_TOKEN_FILE": str(tmp_path / "token"),
        "TIGHTSHIP_POD_NAMESPACE": "tightship-system", "TIGHTSHIP_POD_NAME": "holder-x",
    }  # fmt: skip
    return watch.OwnPod(env, httpx.MockTransport(answer))


@pytest.mark.parametrize(("host", "authority"), [("10.96.0.1", "10.96.0.1:6443"), ("fd00::1", "[fd00::1]:6443")])
def test_annotations_go_to_the_own_pod_by_merge_patch(tmp_path: Path, host: str, authority: str) -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200)

    make_pod(tmp_path, answer, host).annotate({"a": "1"})

    (request,) = requests
    assert str(request.url) == f"https://{authority}/api/v1/namespaces/tightship-system/pods/holder-x"
    assert request.method == "PATCH"
    assert request.headers["content-type"] == "application/merge-patch+json"
    assert request.headers["authorization"] == "Bearer secret"
    assert json.loads(request.content) == {"metadata": {"annotations": {"a": "1"}}}


def test_a_refused_patch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        make_pod(tmp_path, lambda request: httpx.Response(403)).annotate({"a": "1"})


def test_the_watch_command_ends_on_sigterm(fakes: Fakes, tmp_path: Path) -> None:
    env = {
        **os.environ, "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1", "TIGHTSHIP_POD_NAME": "p",
        "TIGHTSHIP_POD_NAMESPACE": "n", "TIGHTSHIP_TOKEN_FILE": str(tmp_path / "none"),
    }  # fmt: skip
    process = start("watch", tmp_path, env, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert "publishing failed" in process.stderr.readline()
    process.terminate()
    assert process.wait(10) == 0


# Preparation


def test_preparation_gives_everything_to_the_user_and_forgets_an_old_gpu(tmp_path: Path) -> None:
    directory = tmp_path / "pack"
    for _ in range(2):
        prepare.prepare(directory, os.getuid())
        (directory / "gpu.json").touch()
        (directory / "holder.lock").touch()
    prepare.prepare(directory, os.getuid())

    assert {path.name for path in directory.iterdir()} == {"mps", "shm", "holder.lock"}
    assert {path.name for path in (directory / "mps").iterdir()} == {"pipe", "log"}
    assert stat.S_IMODE((directory / "shm").stat().st_mode) == 0o1777
    assert all(path.stat().st_uid == os.getuid() for path in directory.rglob("*"))


def test_preparation_without_the_right_to_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = start("prepare", tmp_path / "file" / "pack", dict(os.environ), "--uid", "1", stderr=subprocess.PIPE)
    assert done.wait(10) == 1
    assert done.stderr is not None
    assert "can't be prepared for user 1" in done.stderr.read()


# The daemon and the lock


def start(
    command: str, directory: Path, env: dict[str, str], *more: str, stderr: int | None = None
) -> subprocess.Popen[str]:
    code = "import sys; from tightship.__main__ import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "node", command, "--dir", str(directory), *more], env=env, stderr=stderr, text=True
    )


class Running:
    """A `tightship node mps` process on a pack's directory."""

    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes
        self.pack = fakes.folder / "pack"
        prepare.prepare(self.pack, os.getuid())
        self.lock = self.pack / "holder.lock"
        self.message = fakes.folder / "message"
        self.env = {
            **os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(self.pack / "mps/pipe"), "TIGHTSHIP_PACK_UID": "pack-uid",
            "TIGHTSHIP_TERMINATION_MESSAGE": str(self.message),
        }  # fmt: skip
        self.process = start("mps", self.pack, self.env)

    def holds(self) -> bool:
        return self.lock.exists() and is_held(self.lock) and bool(self.fakes.events("daemon"))


@pytest.fixture
def running(fakes: Fakes) -> Iterator[Running]:
    made = Running(fakes)
    yield made
    fakes.show(deaf=False, crash=True)
    made.process.kill()
    made.process.wait()
    for event in fakes.events("daemon"):
        eventually(lambda pid=event["pid"]: not Path(f"/proc/{pid}").exists() or is_zombie(pid))


def is_zombie(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_it_holds_the_lock_while_the_daemon_lives_and_stops_it_when_asked(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    told = json.loads(running.lock.read_text())
    assert (told["pack"], told["gpu"]) == ("pack-uid", "GPU-1")
    assert len(told["session"]) == 32
    assert json.loads((running.pack / "gpu.json").read_text())["product"] == "NVIDIA-H100-80GB-HBM3"
    assert fakes.events("daemon")[0]["visible"] == "GPU-1"

    running.process.terminate()
    assert running.process.wait(20) == 0
    assert fakes.events("quit")
    assert not fakes.events("term")
    assert not running.lock.exists()


def test_it_waits_for_the_clients_before_the_daemon_goes(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    fakes.show(servers=[44], clients=[7])
    running.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(2.5)
    assert running.holds()
    assert not fakes.events("quit")

    (running.pack / "shm" / "psm_123").write_text("what an engine shared")
    (running.pack / "preflight.uid.json").write_text("{}")
    fakes.show(clients=[])
    assert running.process.wait(20) == 0
    left = {path.relative_to(running.pack).as_posix() for path in running.pack.rglob("*")}
    assert left == {"mps", "mps/pipe", "mps/log", "shm"}, "it leaves nothing behind but the directories"


def test_a_replica_that_starts_is_waited_for_like_a_client(running: Running, fakes: Fakes) -> None:
    """Until its first CUDA context MPS doesn't list it, and by then the GPU must not be another pack's."""
    eventually(running.holds)
    starter = HolderLock(running.pack / "start.lock")
    assert starter.try_acquire("{}")
    running.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(2.5)
    assert running.holds()
    assert not fakes.events("quit")
    fakes.show(servers=[44], clients=[7])  # its engine is there
    starter.release()
    eventually(lambda: is_held(running.pack / "start.lock"))
    assert not starter.try_acquire("{}"), "nobody starts any more under a holder that leaves"
    fakes.show(clients=[])
    assert running.process.wait(20) == 0
    assert not running.lock.exists()
    assert not (running.pack / "start.lock").exists()


def test_a_replica_that_goes_on_starting_is_waited_for_no_longer_than_clients_are(fakes: Fakes) -> None:
    """The same bounds as for clients: then the lock goes, which stops it, and what it may use is left as it is."""
    directory = fakes.folder / "pack"
    starter, freed = HolderLock(directory / "start.lock"), threading.Event()
    (fakes.folder / "message").touch()

    def act() -> None:
        eventually(lambda: fakes.events("daemon"))
        assert starter.try_acquire("{}")
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: not is_held(directory / "holder.lock"))
        if not fakes.events("quit"):
            freed.set()

    assert hold(fakes, Patience(), act, clients=0.02, leave=0.3, fenced=0.3, quit=0.5) == (0, "")
    assert freed.is_set(), "the lock goes before the daemon"
    assert fakes.events("quit")
    assert (directory / "start.lock").exists()
    assert is_held(directory / "start.lock")
    starter.release()


def test_each_daemon_is_a_session_of_its_own(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    first = json.loads(running.lock.read_text())["session"]
    running.process.kill()
    running.process.wait()
    eventually(lambda: fakes.events("term"))
    running.process = start("mps", running.pack, running.env)
    eventually(lambda: len(fakes.events("daemon")) == 2)
    assert json.loads(running.lock.read_text())["session"] != first


def test_the_clients_of_a_pod_that_asks_are_ended_and_no_others(fakes: Fakes, tmp_path: Path) -> None:
    """The pod's processes are found by their cgroups; the daemon is told one by one; the request goes when that is done."""
    for pid, uid in ((7, UID), (8, HASH), (9, UID)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"0::/kubepods/pod{uid}/x")
    (tmp_path / f"terminate.{UID}").write_text("replica-0: did not stop within 8 s")
    fakes.show(down=True)
    with pytest.raises(control.ControlError):
        pods.terminate_asked(tmp_path, tmp_path)
    assert (tmp_path / f"terminate.{UID}").exists()
    fakes.show(down=False, servers=[44], clients=[7, 8, 9, 10])
    (line,) = pods.terminate_asked(tmp_path, tmp_path)
    assert f"ended 2 MPS clients of pod {UID}" in line
    assert fakes.events("terminate_client 44 7")
    assert fakes.events("terminate_client 44 9")
    assert not fakes.events("terminate_client 44 8")
    assert not (tmp_path / f"terminate.{UID}").exists()
    assert pods.terminate_asked(tmp_path, tmp_path) == []


def test_a_holder_serves_such_requests(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    fakes.show(servers=[44], clients=[os.getpid()])
    request = running.pack / f"terminate.{UID}"
    request.touch()
    eventually(lambda: not request.exists())
    fakes.show(clients=[])


def test_what_replicas_saw_is_read_and_rubbish_is_not(tmp_path: Path) -> None:
    seen = {"pod": "a", "uuid": "GPU-1", "total": 80, "free": 41, "at": 1}
    (tmp_path / f"preflight.{UID}.json").write_text(json.dumps(seen))
    (tmp_path / "preflight.torn.json").write_text('{"uuid": ')
    (tmp_path / "preflight.other.json").write_text('["GPU-1"]')
    assert pods.preflights(tmp_path) == {UID: {"uuid": "GPU-1", "total": 80, "free": 41}}


# Faults that no process ends of

FAULT = control.Health("FAULT", 44, (7, 8))
DOWN = control.Health("DOWN")
ACTIVE = control.Health("ACTIVE", 44, (7,))


@pytest.mark.parametrize(
    ("looks", "words"),
    [
        ([(0, ACTIVE), (500, ACTIVE)], None),
        ([(0, FAULT), (89, FAULT)], None),
        ([(0, FAULT), (60, ACTIVE), (100, FAULT), (150, FAULT)], None),
        ([(0, ACTIVE), (10, FAULT), (100, FAULT)], "server 44 has been in FAULT for 90 s (limit 90 s) with 2 clients"),
        ([(0, DOWN), (59, DOWN)], None),
        ([(0, DOWN), (30, FAULT), (70, DOWN)], None),
        ([(0, DOWN), (60, DOWN)], "has not answered for 60 s (limit 60 s)"),
    ],
)
def test_patience_with_a_daemon(looks: list[tuple[float, control.Health]], words: str | None) -> None:
    patience = Patience()
    findings = [patience.daemon(health, now) for now, health in looks]
    assert not any(findings[:-1])
    assert (findings[-1] or "") == "" if words is None else words in (findings[-1] or "")


def test_a_gpu_is_lost_when_two_looks_in_a_row_miss_it() -> None:
    patience = Patience()
    assert patience.gpu("busy") is None
    assert patience.gpu(None) is None
    assert patience.gpu("No devices were found") is None
    assert patience.gpu("No devices were found") == (
        "GPUNotVisible: the GPU is lost, by 2 looks in a row: No devices were found"
    )


def hold(fakes: Fakes, patience: Patience, act: Callable[[], None], **pace: float) -> tuple[int, str]:
    """Hold a GPU in this process with short patience while `act` runs beside it; exit status and last words."""
    directory, message = fakes.folder / "pack", fakes.folder / "message"
    prepare.prepare(directory, os.getuid())
    env = {**os.environ, "TIGHTSHIP_TERMINATION_MESSAGE": str(message)}
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=act)
    thread.start()
    try:
        status = daemon.Holder(directory, env, daemon.Pace(tick=0.02, look=0.05, **pace), patience).run()
    finally:
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not is_held(directory / "holder.lock")
    return status, message.read_text()


def test_a_server_that_stays_in_fault_ends_the_container_after_its_clients(fakes: Fakes) -> None:
    def act() -> None:
        eventually(lambda: fakes.events("daemon"))
        fakes.show(servers=[44], faulty=[44], clients=[7])

    status, words = hold(fakes, Patience(fault=0.3), act)
    assert status == 1
    assert words.startswith("MPSFault: the MPS server 44 has been in FAULT")
    assert fakes.events("terminate_client 44 7")


def test_a_gpu_that_nvidia_smi_misses_ends_the_container(fakes: Fakes) -> None:
    def act() -> None:
        eventually(lambda: fakes.events("daemon"))
        fakes.show(smi=None)

    status, words = hold(fakes, Patience(), act, gpu=0.05)
    assert status == 1
    assert words.startswith("GPUNotVisible: the GPU is lost, by 2 looks in a row")
    assert "No devices were found" in words


def test_a_daemon_that_dies_ends_the_container_and_the_lock(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    os.kill(fakes.events("daemon")[0]["pid"], signal.SIGKILL)
    assert running.process.wait(20) == 1
    assert "ended by itself with signal 9" in running.message.read_text()
    assert not is_held(running.lock)


def test_a_killed_holder_takes_the_daemon_along(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    running.process.kill()
    eventually(lambda: fakes.events("term"))
    # The daemon hears of it from the first of the holder's threads to end, and the kernel lets the lock go with the last.
    eventually(lambda: not is_held(running.lock))


def test_a_second_holder_waits_for_the_first(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    second = start("mps", running.pack, running.env)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1.5)
    assert len(fakes.events("daemon")) == 1
    second.terminate()
    assert second.wait(10) == 0
    assert running.holds()


def test_a_holder_that_waited_for_the_one_before_finds_everything_in_place(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    second = start("mps", running.pack, running.env, stderr=subprocess.PIPE)
    assert second.stderr is not None
    assert "still has the lock" in second.stderr.readline()
    running.process.terminate()
    assert running.process.wait(20) == 0
    (fakes.folder / "quit").unlink()
    eventually(lambda: len(fakes.events("daemon")) == 2)
    assert (running.pack / "gpu.json").exists()
    assert is_held(running.lock)
    second.terminate()
    assert second.wait(20) == 0


def test_no_gpu_ends_the_container_in_words(fakes: Fakes) -> None:
    fakes.show(smi=None)
    running = Running(fakes)
    assert running.process.wait(20) == 1
    assert running.message.read_text().startswith("GPUNotVisible: nvidia-smi ended with 6: No devices were found")
    assert not running.lock.exists()
    assert not (running.pack / "gpu.json").exists(), "an earlier one's identity is not kept"


@pytest.mark.parametrize("deaf", [False, True])
def test_clients_that_stay_lose_the_lock_and_then_the_daemon(fakes: Fakes, deaf: bool) -> None:
    """In this process, with short patience: what takes two minutes in a pod."""
    directory = fakes.folder / "pack"
    prepare.prepare(directory, os.getuid())
    fakes.show(servers=[44], clients=[7], deaf=deaf)
    pace = daemon.Pace(tick=0.02, clients=0.02, leave=0.3, fenced=0.3, quit=0.5)
    holder = daemon.Holder(directory, dict(os.environ), pace)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    lock_seen_free_under_a_live_daemon = threading.Event()

    def act() -> None:
        eventually(lambda: fakes.events("daemon"))
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: not is_held(directory / "holder.lock"))
        if not fakes.events("quit") and not fakes.events("term"):
            lock_seen_free_under_a_live_daemon.set()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        assert holder.run() == 0
    finally:
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert lock_seen_free_under_a_live_daemon.is_set()
    assert fakes.events("term" if deaf else "quit")


def test_what_a_killed_daemon_left_is_removed_before_a_new_one(running: Running, fakes: Fakes) -> None:
    eventually(running.holds)
    (running.pack / "mps/pipe/control").touch()
    running.process.kill()
    running.process.wait()
    eventually(lambda: fakes.events("term"))
    second = start("mps", running.pack, running.env)
    eventually(lambda: not (running.pack / "mps/pipe/control").exists())
    second.terminate()
    assert second.wait(20) == 0


def test_the_lock_is_exclusive(tmp_path: Path) -> None:
    first, second = HolderLock(tmp_path / "lock"), HolderLock(tmp_path / "lock")
    assert first.try_acquire("a")
    assert not second.try_acquire("b")
    assert (tmp_path / "lock").read_text() == "a"
    first.release()
    assert second.try_acquire("b")
    second.release()
