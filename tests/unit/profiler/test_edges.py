"""The edges: NVML and /proc, the API server, engine processes."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.__main__ import FINISHED, kept, profile
from tightship.profiler.clock import SystemClock
from tightship.profiler.confirm import MemoryWatch
from tightship.profiler.descriptors import WANTED
from tightship.profiler.engine import EngineSettings, ProcessLauncher
from tightship.profiler.errors import EngineError, OutOfMemory, ReportError
from tightship.profiler.gpu import GIB, CpuDevice, DeviceError, NvmlDevice, memory_limit
from tightship.profiler.model import read_model
from tightship.profiler.report import ApiSink, FileSink, Report, continued
from unit.profiler.fakes import FakeDevice, FakeLauncher, MemorySink, in_virtual_time, make_profile

# --- NVML ---


class NvmlFailure(Exception):
    """What a fake NVML raises."""


def make_nvml(count: int = 2, utilization: bool = True) -> SimpleNamespace:
    def rates(handle: str) -> SimpleNamespace:
        if not utilization:
            raise NvmlFailure("Not Supported")
        return SimpleNamespace(gpu=57, memory=50)

    return SimpleNamespace(
        NVMLError=NvmlFailure,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: f"index {index}",
        nvmlDeviceGetHandleByUUID=lambda uuid: f"uuid {uuid}",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * GIB, used=3 * GIB, free=77 * GIB),
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100",
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetUtilizationRates=rates,
    )


@pytest.mark.parametrize(
    ("visible", "handle"),
    [
        ("", "index 0"),
        ("all", "index 0"),
        ("GPU-7", "uuid GPU-7"),
        ("k8s.device-plugin.nvidia.com/gpu=GPU-7", "uuid GPU-7"),
    ],
)
def test_the_gpu_is_the_one_the_container_was_given(visible: str, handle: str) -> None:
    device = NvmlDevice(make_nvml(), visible)
    assert device.identity.uuid == handle
    assert (device.identity.product, device.identity.memory, device.identity.driver) == (
        "NVIDIA H100",
        80 * GIB,
        "580.1",
    )
    assert device.used() == 3 * GIB
    assert (device.utilization().compute, device.utilization().memory) == (0.57, 0.50)


def test_no_gpu_is_said() -> None:
    with pytest.raises(DeviceError, match="no GPU in this container"):
        NvmlDevice(make_nvml(count=0))


def test_utilization_may_be_unsupported() -> None:
    assert NvmlDevice(make_nvml(utilization=False)).utilization().compute is None


# --- the CPU as a device ---


@dataclass
class Hand:
    """A clock set by hand."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


def write_process(proc: Path, pid: int, parent: int, ticks: int, pss: int) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    fields = ["S", str(parent), *["0"] * 9, str(ticks), "0", *["0"] * 30]
    (proc / str(pid) / "stat").write_text(f"{pid} (VLLM) Worker)) {' '.join(fields)}")
    (proc / str(pid) / "smaps_rollup").write_text(f"0-f [rollup]\nRss: {2 * pss} kB\nPss:   {pss} kB\n")


def test_a_cpu_device_is_its_descendants_memory_and_time(tmp_path: Path) -> None:
    clock, tick = Hand(), os.sysconf("SC_CLK_TCK")
    write_process(tmp_path, 10, 1, ticks=0, pss=999)  # the profiler itself
    write_process(tmp_path, 11, 10, ticks=0, pss=100)
    write_process(tmp_path, 12, 11, ticks=0, pss=200)
    write_process(tmp_path, 13, 1, ticks=0, pss=400)  # somebody else
    device = CpuDevice(4 * GIB, cores=2, clock=clock, proc=tmp_path, root=10)
    assert device.used() == 300 * 1024
    device.utilization()
    clock.time = 10
    write_process(tmp_path, 12, 11, ticks=5 * tick, pss=200)
    assert device.utilization().compute == pytest.approx(5 / 10 / 2)


@pytest.mark.parametrize(
    ("environ", "limit", "expected"),
    [
        ({"TIGHTSHIP_DEVICE_MEMORY": "123"}, "456", 123),
        ({}, "456", 456),
        ({}, "max", 8 * GIB),
        ({}, None, 8 * GIB),
    ],
)
def test_memory_of_a_cpu_device(tmp_path: Path, environ: dict[str, str], limit: str | None, expected: int) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
    assert memory_limit(environ, cgroup=tmp_path, proc=tmp_path) == expected


async def test_the_highest_memory_counts() -> None:
    device = FakeDevice(engine=5 * GIB)
    async with MemoryWatch(device, SystemClock()) as watch:
        await asyncio.sleep(0.02)
        device.engine = 0
    assert watch.peak == device.idle + 5 * GIB


# --- the model's files ---


def test_vocabulary_and_commit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 2048}')
    assert read_model(str(tmp_path), None, {}).vocabulary == 2048
    cached = tmp_path / "hub" / "models--facebook--opt-1.3b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots" / "abc123").mkdir(parents=True)
    (cached / "snapshots" / "abc123" / "config.json").write_text('{"text_config": {"vocab_size": 50272}}')
    found = read_model("facebook/opt-1.3b", None, {"HF_HOME": str(tmp_path)})
    assert (found.vocabulary, found.commit) == (50272, "abc123")
    assert read_model("facebook/other", None, {"HF_HOME": str(tmp_path)}).commit is None


# --- the API server ---

Handler = Callable[[str, str, Mapping[str, str], Any], tuple[int, Any]]


@asynccontextmanager
async def api_server(handler: Handler) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                status, answer = handler(method, path, headers, json.loads(body) if body else None)
                text = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_a_status_is_applied_with_our_manager_and_the_token_of_the_moment(tmp_path: Path) -> None:
    token, seen = tmp_path / "token", []
    token.write_text("first\n")
    answers = iter([(503, {}), (401, {}), (200, {})])

    def handler(method: str, path: str, headers: Mapping[str, str], body: Any) -> tuple[int, Any]:
        if method == "GET":
            return 200, make_profile().to_dict()
        seen.append((path, headers["authorization"], headers["content-type"], body))
        status, answer = next(answers)
        if status == 401:
            token.write_text("second\n")
        return status, answer

    async with api_server(handler) as base:
        sink = ApiSink(base, "default", "opt", token, None)
        report = Report(sink, (await sink.read()).status)
        report.points[1] = api.Point(batch=1, total_tokens_per_second="10")
        report.save()
        assert await report.flush(20)
        await report.close()
    path, authorization, content_type, body = seen[-1]
    assert len(seen) == 3
    assert path.startswith("/apis/tightship.dev/v1alpha1/namespaces/default/batchprofiles/opt/status?")
    assert "fieldManager=tightship-profiler" in path
    assert "force=true" in path
    assert (authorization, content_type) == ("Bearer second", "application/apply-patch+yaml")
    assert body["status"]["points"][0]["batch"] == 1
    assert set(body["status"]) == {"points", "gpuSeconds"}


async def test_a_report_that_is_refused_ends_the_profile(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    async with api_server(lambda *_: (422, {"message": "status.points: invalid"})) as base:
        sink = ApiSink(base, "default", "opt", tmp_path / "token", None)
        report = Report(sink, api.BatchProfileStatus())
        report.save()
        with pytest.raises(ReportError, match=r"422 .*status\.points: invalid"):
            await report.flush(5)
        await report.close()


def test_what_nobody_foresaw_costs_no_point_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink(make_profile())
    sink.errors = [TypeError("not serializable"), json.JSONDecodeError("Expecting value", "<html>", 0)]

    async def story() -> bool:
        report = Report(sink, api.BatchProfileStatus())
        report.points[1] = api.Point(batch=1, total_tokens_per_second="10")
        report.save()
        try:
            return await report.flush(60)
        finally:
            await report.close()

    assert in_virtual_time(story)
    assert [point["batch"] for point in sink.written[-1]["points"]] == [1]
    assert "in an unforeseen way (TypeError: not serializable); trying again" in caplog.text


def test_what_never_ends_failing_keeps_the_end_waiting_no_longer_than_a_few_tries() -> None:
    sink = MemorySink(make_profile())
    sink.errors = [TypeError("not serializable")] * 50

    async def story() -> float:
        report = Report(sink, api.BatchProfileStatus())
        began = asyncio.get_running_loop().time()
        try:
            for _ in range(2):  # the end is given tries of its own
                report.save()
                assert not await report.flush(600)
            return asyncio.get_running_loop().time() - began
        finally:
            await report.close()

    assert 15 < in_virtual_time(story) < 90
    assert 50 - len(sink.errors) == 10


@pytest.mark.parametrize(
    ("earlier", "said", "expected"),
    [
        (None, "new", "new"),
        ("old", "new", "old; new"),
        ("o" * 9000, "new", "o" * 7992 + "...; new"),
        ("old", "n" * 9000, "n" * 8000),
        ("o" * 5000, "n" * 5000, "o" * 2995 + "...; " + "n" * 5000),
    ],
    ids=["first", "short", "long before", "long", "both long"],
)
def test_what_is_said_last_is_there_whole(earlier: str | None, said: str, expected: str) -> None:
    message = continued(earlier, said)
    assert message == expected
    assert len(message) <= 8000


def test_a_job_without_its_environment_says_which_variable() -> None:
    with pytest.raises(ReportError, match="TIGHTSHIP_PROFILE_NAMESPACE"):
        ApiSink.from_environment({})


async def test_a_file_can_take_the_api_servers_place(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "profile.json", make_profile())
    report = Report(sink, (await sink.read()).status)
    report.points[4] = api.Point(batch=4, total_tokens_per_second="10")
    report.save()
    assert await report.flush(5)
    await report.close()
    assert [point.batch for point in (await sink.read()).status.points] == [4]


async def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    report = Report(FileSink(tmp_path / "no" / "such" / "folder.json", make_profile()), api.BatchProfileStatus())
    report.save()
    with pytest.raises(ReportError, match="can't be written"):
        await report.flush(5)
    await report.close()


@pytest.mark.parametrize(
    ("told", "rerun", "left"),
    [
        ({}, None, 1),
        ({"progress": {"stage": "Sweeping"}}, None, 1),
        ({"progress": {"stage": "Sweeping", "rerun": "1"}}, "1", 1),
        ({"progress": {"stage": "Sweeping", "rerun": "1"}}, "2", 0),
        ({"progress": {"stage": "Sweeping"}}, "1", 0),
        ({"progress": {"stage": "Trying"}, "outcome": {"state": "Completed"}}, None, None),
        ({"outcome": {"state": "Completed"}}, None, None),
        ({"outcome": {"state": "Failed", "rerun": "1"}}, "1", None),
        ({"outcome": {"state": "Failed", "rerun": "1"}}, "2", 0),
        ({"outcome": {"state": "Completed"}}, "1", 0),
        # Where nothing is asked any outcome is an answer.
        ({"outcome": {"state": "Completed", "rerun": "1"}}, "", None),
        ({"progress": {"stage": "Sweeping", "rerun": "1"}}, "", 1),
    ],
)
def test_what_a_new_attempt_keeps(told: dict[str, Any], rerun: str | None, left: int | None) -> None:
    """Also of a measurement that still runs, or was stopped, when `rerun` gets its new text."""
    status: dict[str, Any] = {"points": [{"batch": 1}], **told}
    found = kept(make_profile(status=status, **({"rerun": rerun} if rerun is not None else {})))
    assert (None if found is None else len(found.points)) == left


async def test_a_finished_profile_is_left_alone() -> None:
    sink = MemorySink(make_profile(status={"outcome": {"state": "Completed"}}))
    assert await profile(sink, {}, SystemClock()) == FINISHED
    assert sink.written == []


async def test_a_job_without_a_gpu_fails_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(count=0))
    sink = MemorySink(make_profile())
    assert await profile(sink, {"TIGHTSHIP_DEVICE": "cuda"}, SystemClock()) == FINISHED
    outcome = sink.written[-1]["outcome"]
    assert (outcome["state"], outcome["reason"]) == ("Failed", "EngineFailed")
    assert "no GPU in this container" in outcome["message"]


async def test_lengths_that_changed_end_the_profile_before_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml())
    (tmp_path / "lengths").write_text("1,2\n")
    sink = MemorySink(make_profile(workload={"lengthsDigest": "0" * 64}))
    environ = {"TIGHTSHIP_DEVICE": "cuda", "TIGHTSHIP_LENGTHS_FILE": str(tmp_path / "lengths")}
    assert await profile(sink, environ, SystemClock()) == FINISHED
    outcome = sink.written[-1]["outcome"]
    assert outcome["state"] == "Failed"
    assert "0" * 64 in outcome["message"]
    assert "the ConfigMap was changed" in outcome["message"]


async def test_an_extension_that_cannot_begin_leaves_the_outcome_standing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(count=0))
    done = {"outcome": {"state": "Completed", "message": "all is well"}, "points": [{"batch": 1}]}
    sink = MemorySink(make_profile(status=done, extend={"request": "more", "pairs": [{"batch": 1, "replicas": 2}]}))
    assert await profile(sink, {"TIGHTSHIP_DEVICE": "cuda"}, SystemClock()) == FINISHED
    outcome = sink.written[-1]["outcome"]
    assert (outcome["state"], outcome["extend"]) == ("Completed", "more")
    assert outcome["message"].startswith("all is well; the trials asked for failed: NVML reports no GPU")
    assert [point["batch"] for point in sink.written[-1]["points"]] == [1]


# --- engine processes ---

HEALTHY = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = {
            "/metrics": b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\\nvllm:num_requests_running 3.0\\n',
            "/version": b'{"version": "1.2.3"}',
        }.get(self.path, b"{}")
        self.send_response(200); self.send_header("content-length", str(len(text))); self.end_headers(); self.wfile.write(text)
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
print("Chunked prefill is enabled with max_num_batched_tokens=2048.")
print("config: max_seq_len=512, compilation_config={'cudagraph_capture_sizes': [1, 2, 4]}", flush=True)
print("INFO 01-01 00:00:00 [x.py:1] Available KV cache memory: 1.00 GiB", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def launcher(script: str, heard: list[str] | None = None) -> ProcessLauncher:
    echo = heard.append if heard is not None else lambda line: None
    return ProcessLauncher(SystemClock(), os.environ, echo=echo, command=(sys.executable, "-c", script))


SETTINGS = EngineSettings(model="m", max_num_seqs=8)


async def test_a_healthy_engine_tells_about_itself_and_stops() -> None:
    heard: list[str] = []
    engine = await launcher(HEALTHY, heard).launch(SETTINGS, timeout=20)
    try:
        info = engine.info
        assert (info.version, info.block_size, info.kv_tokens, info.max_model_len) == ("1.2.3", 16, 1600, 512)
        assert (info.max_num_batched_tokens, info.capture_sizes) == (2048, (1, 2, 4))
        assert info.kv_bytes == pytest.approx(GIB, rel=0.006)
        assert (await engine.sample()).running == 3
        await engine.check()
        assert any("Chunked prefill" in line for line in heard)
    finally:
        await engine.stop()
    with pytest.raises(EngineError, match="the engine died: killed by signal 15"):
        await engine.check()


async def test_a_connection_that_the_engine_closes_for_having_been_idle_is_no_trouble_of_the_engines() -> None:
    kept_alive = HEALTHY.replace(
        "def do_GET(self):",
        """protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked > 1:  # closed while the question was on its way
            self.close_connection = True
            return""",
    )
    engine = await launcher(kept_alive).launch(SETTINGS, timeout=20)
    try:
        assert [(await engine.sample()).running for _ in range(3)] == [3, 3, 3]
    finally:
        await engine.stop()


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("raise ValueError('no such model')", EngineError, "exit status 1; its last words: ValueError: no such model"),
        ("import sys; sys.exit('torch.OutOfMemoryError: CUDA out of memory.')", OutOfMemory, "CUDA out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", OutOfMemory, "the container's memory limit"),
    ],
    ids=["exception", "device memory", "killed"],
)
async def test_an_engine_that_does_not_start(script: str, kind: type[EngineError], words: str) -> None:
    with pytest.raises(kind, match="did not start") as failure:
        await launcher(script).launch(SETTINGS, timeout=20)
    assert words in str(failure.value)
    assert type(failure.value) is kind


async def test_an_engine_that_dies_later_is_quoted_to_its_last_line() -> None:
    dies = HEALTHY.replace(
        "def do_GET(self):",
        """def do_GET(self):
        type(self).asked = getattr(self, "asked", 0) + (self.path == "/metrics")
        if self.asked > 1:
            print(*("a frame" for _ in range(5000)), "ValueError: the cause", sep=chr(10), flush=True)
            import os; os._exit(3)""",
    )
    engine = await launcher(dies).launch(SETTINGS, timeout=20)
    try:
        with pytest.raises(EngineError, match="the engine died: exit status 3; its last words: ValueError: the cause"):
            await engine.sample()
    finally:
        await engine.stop()


async def test_an_engine_whose_child_holds_its_output_open_is_told_of_all_the_same() -> None:
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); raise ValueError('no')"
    began = time.monotonic()
    with pytest.raises(EngineError, match="did not start: exit status 1; its last words: ValueError: no"):
        await launcher(orphan).launch(SETTINGS, timeout=20)
    assert time.monotonic() - began < 15


async def test_an_engine_that_is_frozen_does_not_answer_and_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightship.profiler.engine.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("tightship.profiler.engine.STOP_SECONDS", 0.5)
    heard: list[str] = []
    engine = await launcher(f"import os; print('pid', os.getpid(), flush=True){HEALTHY}", heard).launch(
        SETTINGS, timeout=20
    )
    pid = int(heard[0].split()[1])
    try:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(
            EngineError, match=r"does not answer /metrics: ReadTimeout; its last words: .*Available KV cache"
        ):
            await engine.sample()
    finally:
        await engine.stop()
    assert _gone(pid)


async def test_an_engine_that_never_gets_healthy_is_killed_with_its_children() -> None:
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
    heard: list[str] = []
    with pytest.raises(EngineError, match=r"not healthy after 3 s; its last words: child \d+"):
        await launcher(script, heard).launch(SETTINGS, timeout=3)
    pid = int(heard[0].split()[1])
    for _ in range(100):
        if _gone(pid):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"the engine's child {pid} is still there")


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_status_holds_no_more_trials_than_the_api_takes_and_those_with_figures_stay() -> None:
    made = [{"batch": 512, "replicas": count, "totalTokensPerSecond": "9"} for count in range(30, 48)]
    failed = [{"batch": batch, "replicas": count, "message": "no"} for batch in range(1, 11) for count in range(2, 48)]

    async def story() -> dict[str, Any]:
        subject = make_profile(status={})
        report = Report(MemorySink(subject), subject.status)
        for one in [*made, *failed]:
            report.trials[one["batch"], one["replicas"]] = api.Trial.model_validate(one)
        try:
            return report.status()
        finally:
            await report.close()

    status = asyncio.run(story())
    api.BatchProfileStatus.model_validate(status)
    assert len(status["trials"]) == 256
    assert [one["replicas"] for one in status["trials"] if "totalTokensPerSecond" in one] == list(range(30, 48))
    assert any((one["batch"], one["replicas"]) == (1, 2) for one in status["trials"])


# --- open files ---


LIMITED = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
from tightship.profiler.descriptors import raise_limit
requests = raise_limit()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
sockets = [socket.socket() for _ in range(min(requests, 500))]
print(soft, hard, requests)
"""


@pytest.mark.parametrize(("hard", "soft", "requests"), [(1000, 1000, 496), (100, 100, 1)])
def test_open_files_are_raised_to_what_the_machine_allows(hard: int, soft: int, requests: int) -> None:
    script = LIMITED.format(hard=hard)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(soft), str(hard), str(requests)]


async def test_the_profiler_raises_the_limit_of_open_files_before_it_measures() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(before[1], WANTED)
    assert most > 512
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    seen: list[int] = []

    class Looking(FakeLauncher):
        async def launch(self, settings: EngineSettings, *, timeout: float) -> Any:
            seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            raise EngineError("this is all that was to be seen")

    try:
        sink = MemorySink(make_profile())
        environ = {"TIGHTSHIP_DEVICE": "cpu", "TIGHTSHIP_DEVICE_MEMORY": str(4 * GIB)}
        await profile(sink, environ, SystemClock(), Looking(FakeDevice()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert set(seen) == {most}
