"""Simulated devices and engines as processes, for tests: started with what the image table gives their containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tightship.sandbox.images import ImageSettings, resolve
from tightship.sandbox.simulation.client import Device

ENGINE = "vllm/vllm-openai:v0.33.0"
OPERATOR = "tightship/operator:dev"
PATIENCE = 30.0


def wait_for(what: str, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Return the condition's value once it is true."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience} s: {what}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Process:
    """A process, its output in a file."""

    popen: subprocess.Popen[str]
    log: Path
    port: int = 0

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
            return str(response.read().decode())

    def post(self, path: str, body: object) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def healthy(self) -> bool:
        if self.popen.poll() is not None:
            raise AssertionError(f"ended with {self.popen.returncode}:\n{self.output}")
        try:
            self.get("/health")
        except OSError:
            return False
        return True


@dataclass
class Machine:
    """A device server with one GPU, or several, and processes in containers that see the first."""

    directory: Path
    uuid: str = "GPU-11111111-2222-3333-4444-555555555555"
    others: tuple[str, ...] = ()
    """UUIDs of further GPUs, which NVML and CUDA count from 1."""
    memory: str = "80Gi"
    time_scale: float = 1.0
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.directory / "device.sock"

    def start(self) -> None:
        command = [sys.executable, "-m", "tightship.sandbox.simulation.device", "--socket", str(self.socket)]
        for uuid in (self.uuid, *self.others):
            gpu = f"node=sandbox-0,uuid={uuid},product=NVIDIA-H100-80GB-HBM3,memory={self.memory}"
            command += ["--gpu", gpu]
        self._popen([*command, "--time-scale", str(self.time_scale)], dict(os.environ), "device")
        wait_for("the device server listens", self.socket.exists)

    def device(self) -> Device:
        return Device(str(self.socket))

    def gpu(self, number: int = 0) -> dict[str, Any]:
        with self.device() as device:
            found: dict[str, Any] = device.request("gpus")["gpus"][number]
            return found

    def control(self, verb: str, **arguments: object) -> dict[str, Any]:
        with self.device() as device:
            return device.request("control", verb=verb, uuid=self.uuid, **arguments)

    def environment(self, image: str, **pod: str) -> dict[str, str]:
        settings = ImageSettings(state=self.directory / "state", device_socket=self.socket, node="sandbox-0")
        resolved = resolve(image, settings)
        assert resolved is not None
        pod = {"NVIDIA_VISIBLE_DEVICES": self.uuid, "CUDA_MPS_PIPE_DIRECTORY": str(self.directory / "pipe"), **pod}
        return resolved.merged(pod)

    def spawn(self, image: str, *command: str, **pod: str) -> Process:
        log = self.directory / f"{len(self.processes)}.log"
        popen = self._popen(list(command), self.environment(image, **pod), log.stem)
        return Process(popen, log)

    def call(self, image: str, *command: str, stdin: str = "", **pod: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment(image, **pod),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def engine(self, *arguments: str, start_seconds: float = 0.1, **pod: str) -> Process:
        """Start an engine; it isn't up yet on return."""
        port = free_port()
        process = self.spawn(
            ENGINE,
            *("python3", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
            *("--model", "facebook/opt-1.3b", *arguments),
            TIGHTSHIP_SIM_START_SECONDS=str(start_seconds),
            TIGHTSHIP_SIM_DEATH_SECONDS="2",
            **pod,
        )
        process.port = port
        return process

    def mps(self) -> Process:
        process = self.spawn(OPERATOR, "nvidia-cuda-mps-control", "-f")
        wait_for("the MPS daemon listens", (self.directory / "pipe" / "control").exists)
        return process

    def mps_command(self, command: str) -> str:
        return self.call(OPERATOR, "nvidia-cuda-mps-control", stdin=command + "\n").stdout

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()

    def _popen(self, command: list[str], environment: dict[str, str], name: str) -> subprocess.Popen[str]:
        with (self.directory / f"{name}.log").open("w") as log:
            popen = _start(command, environment, log)
        self.processes.append(popen)
        return popen


def _start(command: list[str], environment: dict[str, str], log: IO[str]) -> subprocess.Popen[str]:
    # A launcher is a script: the search uses this process's PATH, not the container's, unless told.
    program = next(
        (
            str(Path(part) / command[0])
            for part in environment.get("PATH", "").split(os.pathsep)
            if (Path(part) / command[0]).exists()
        ),
        command[0],
    )
    return subprocess.Popen(
        [program, *command[1:]],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def machine(directory: Path, **settings: Any) -> Iterator[Machine]:
    """A started machine, gone with all its processes at the end."""
    one = Machine(directory, **settings)
    try:
        one.start()
        yield one
    finally:
        one.close()


class Stream(asyncio.Protocol):
    """A lean closed loop over one connection: requests of exact lengths, one after the other, their gaps summed up."""

    def __init__(self, queue: list[tuple[int, int]], model: str) -> None:
        self.queue = queue
        self.model = model
        self.waited = 0.0
        self.gaps = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(AssertionError("the engine closed the connection"))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        count = data.count(b'"text":')
        if count:
            self.first = self.first or now
            self.last = now
            self.seen += count
        if b"[DONE]" in data:
            assert self.seen == self.wanted
            self.waited += self.last - self.first
            self.gaps += self.seen - 1
            self._next()

    def _next(self) -> None:
        if not self.queue:
            self.done.set_result(None)
            self.transport.close()
            return
        prompt, self.wanted = self.queue.pop()
        self.first = self.last = 0.0
        self.seen = 0
        body = {
            "model": self.model,
            "prompt": [7] * prompt,
            "max_tokens": self.wanted,
            "ignore_eos": True,
            "stream": True,
        }
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: engine\r\nContent-Length: {len(data)}\r\n\r\n"
        self.transport.write(head.encode() + data)


async def mean_itl(loads: list[tuple[int, int, list[tuple[int, int]]]]) -> float:
    """Load engines, given as (port, requests in flight, lengths), all at once; return their mean ITL in seconds."""
    loop = asyncio.get_running_loop()
    streams: list[Stream] = []
    for port, in_flight, lengths in loads:
        queue = list(lengths)
        for _ in range(in_flight):
            _, stream = await loop.create_connection(
                lambda queue=queue: Stream(queue, "facebook/opt-1.3b"), "127.0.0.1", port
            )
            streams.append(stream)
    await asyncio.gather(*(stream.done for stream in streams))
    return sum(stream.waited for stream in streams) / sum(stream.gaps for stream in streams)
