"""Engines as a port, and vLLM as a process behind it.

`Launcher.launch` starts one engine and returns it healthy, or raises with its last words. What must hold: every engine that was launched
is stopped with all its processes, also when the launch fails or is cancelled; waiting is always bounded; an engine listens on
127.0.0.1 only.

What the engine decided for itself is read, not assumed: from `/metrics` (`vllm:cache_config_info`), from `/server_info` (vLLM's
development mode, on for the profiler's engines alone) and from its start-up log, whichever has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx

from tightship.profiler.clock import Clock
from tightship.profiler.errors import EngineError, OutOfMemory, kind_of
from tightship.profiler.lastwords import last_words
from tightship.profiler.metrics import EngineSample, parse_cache_info, parse_sample
from tightship.profiler.wire import Channel, HttpChannel

MODULE: Final = "vllm.entrypoints.openai.api_server"
HOST: Final = "127.0.0.1"
GIB: Final = 1024**3
TAIL_LINES: Final = 400
STOP_SECONDS: Final = 20.0
ANSWER_SECONDS: Final = 10.0
"""What it gets for an answer about itself: one that takes longer does not answer."""
END_SECONDS: Final = 1.0
"""How long after it didn't answer an engine may be found to have died of it."""
DRAIN_SECONDS: Final = 2.0
"""What a dead engine's output gets to be read to its end, while a child of it holds it open."""
POLL_SECONDS: Final = 0.25

# Flags that settle the capture sizes in their own way: then ours would clash with the user's.
_GRAPH_FLAGS: Final = ("--compilation-config", "--cudagraph", "--max-cudagraph", "--enforce-eager", "-cc", "-O")


@dataclass(frozen=True)
class EngineSettings:
    """How one engine is started."""

    model: str
    """What to pass as --model: a directory or a name on the hub."""
    max_num_seqs: int
    revision: str | None = None
    args: tuple[str, ...] = ()
    """The user's arguments; ours come after them, and win."""
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    """Fixed size of the KV cache; None lets the engine take what is left of its share."""
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int | None = None
    capture_sizes: tuple[int, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Changes to the inherited environment; None removes a variable."""
    shares_cores: bool = False
    """Whether other engines may compute on its cores."""

    def arguments(self, port: int) -> list[str]:
        """vLLM's command line after `-m vllm.entrypoints.openai.api_server`."""
        options: list[tuple[str, object]] = [
            ("--revision", self.revision),
            ("--host", HOST),
            ("--port", port),
            ("--max-model-len", self.max_model_len),
            ("--max-num-seqs", self.max_num_seqs),
            ("--kv-cache-memory-bytes", self.kv_cache_bytes),
            ("--gpu-memory-utilization", self.gpu_memory_utilization),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
        ]
        ours = [text for name, value in options if value is not None for text in (name, str(value))]
        if self.capture_sizes and not any(arg.replace("_", "-").startswith(_GRAPH_FLAGS) for arg in self.args):
            ours += ["--cudagraph-capture-sizes", *map(str, self.capture_sizes)]
        return ["--model", self.model, *self.args, *ours, "--no-enable-prefix-caching"]

    def environ(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The engine's environment."""
        environ = {**inherited, "VLLM_SERVER_DEV_MODE": "1"}
        for name, value in self.environment.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value
        return environ


@dataclass(frozen=True)
class EngineInfo:
    """What a healthy engine said of itself; None for what it did not say."""

    version: str | None = None
    block_size: int | None = None
    blocks: int | None = None
    kv_tokens: int | None = None
    """Tokens its KV cache holds."""
    kv_bytes: int | None = None
    """Bytes of its KV cache."""
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    capture_sizes: tuple[int, ...] = ()

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Bytes of KV cache one token takes, rounded up."""
        return -(-self.kv_bytes // self.kv_tokens) if self.kv_bytes and self.kv_tokens else None


class Engine(Protocol):
    """A running engine."""

    @property
    def info(self) -> EngineInfo:
        """What it said of itself."""

    def channel(self) -> Channel:
        """A new way to send requests to it."""

    async def check(self) -> None:
        """Raise EngineError when it has died, with all that it said."""

    def owns(self, pid: int) -> bool:
        """Whether a process is one of its own."""

    def last_words(self) -> str:
        """The cause of its trouble, or the last that it printed; "" where it printed nothing."""

    async def sample(self) -> EngineSample:
        """Its counters and gauges now. Raises EngineError when it doesn't answer."""

    async def stop(self) -> None:
        """Stop it and all its processes."""


class Launcher(Protocol):
    """Starts engines."""

    async def launch(self, settings: EngineSettings, *, timeout: float) -> Engine:
        """Start an engine and wait until it is healthy, at most `timeout` seconds. Raises EngineError with its last words."""


class ProcessLauncher:
    """Starts vLLM with this interpreter."""

    def __init__(
        self,
        clock: Clock,
        environ: Mapping[str, str],
        echo: Callable[[str], None] = lambda line: None,
        command: Sequence[str] = (sys.executable, "-m", MODULE),
    ) -> None:
        """`echo` gets every line the engine prints, for the pod's log."""
        self._clock = clock
        self._environ = environ
        self._echo = echo
        self._command = tuple(command)

    async def launch(self, settings: EngineSettings, *, timeout: float) -> Engine:
        """Start an engine and wait until it is healthy."""
        port = _free_port()
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *settings.arguments(port),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=settings.environ(self._environ),
            start_new_session=not settings.shares_cores,
            preexec_fn=_own_group if settings.shares_cores else die_with_parent,
        )
        engine = ProcessEngine(process, port, settings, self._clock, self._echo)
        try:
            await engine.wait_healthy(timeout)
        except BaseException:
            await engine.stop()
            raise
        return engine


class ProcessEngine:
    """One vLLM process and its children."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        port: int,
        settings: EngineSettings,
        clock: Clock,
        echo: Callable[[str], None],
    ) -> None:
        self._process = process
        self._port = port
        self._settings = settings
        self._clock = clock
        self._echo = echo
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._facts: dict[str, str] = {}
        self._reader = asyncio.get_running_loop().create_task(self._read_output())
        self._http = httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=ANSWER_SECONDS, trust_env=False)
        self._info = EngineInfo()

    @property
    def info(self) -> EngineInfo:
        """What it said of itself."""
        return self._info

    def channel(self) -> Channel:
        """A new set of connections to it."""
        return HttpChannel(HOST, self._port, self._settings.model)

    async def check(self) -> None:
        """Raise EngineError, or OutOfMemory, with its last words when it has died."""
        if self._process.returncode is not None:
            raise await self._obituary("the engine died")

    def owns(self, pid: int) -> bool:
        """Whether a process is of its group, in which it was started and its children stay."""
        try:
            return os.getpgid(pid) == self._process.pid
        except ProcessLookupError:
            return False

    def last_words(self) -> str:
        """The cause in its last lines (see `tightship.profiler.lastwords`)."""
        return last_words(self._tail)

    async def sample(self) -> EngineSample:
        """Its counters and gauges; stamped halfway between question and answer."""
        before = self._clock.now()
        text = await self._get("/metrics")
        return parse_sample(text, at=(before + self._clock.now()) / 2)

    async def wait_healthy(self, timeout: float) -> None:
        """Return once `/health` answers 200 and the engine's settings are read; raise EngineError after `timeout` seconds."""
        deadline = self._clock.now() + timeout
        while True:
            if self._process.returncode is not None:
                raise await self._obituary("the engine did not start")
            with contextlib.suppress(httpx.HTTPError):
                if (await self._http.get("/health", timeout=2.0)).status_code == 200:
                    break
            if self._clock.now() >= deadline:
                raise EngineError(
                    f"the engine was not healthy after {timeout:.0f} s; its last words: {self.last_words() or 'none'}"
                )
            await self._clock.sleep(POLL_SECONDS)
        self._info = await self._read_info()

    async def stop(self) -> None:
        """SIGTERM to its process group, SIGKILL after 20 s and to whatever is left of the group."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        self._signal(signal.SIGKILL)
        await self._process.wait()
        await self._drain_output()
        await self._http.aclose()
        if self._reader.done() and not self._reader.cancelled():
            self._reader.result()  # what kept its output from being passed on, such as a full disk

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _get(self, path: str) -> str:
        try:
            try:
                response = await self._http.get(path)
            except httpx.RemoteProtocolError:
                # A server that was held up closes a connection for having been idle (vLLM's: 5 s) before it reads the question that has come
                # on it meanwhile. That is no answer; on a new connection there is one, or the engine is in trouble.
                response = await self._http.get(path)
            response.raise_for_status()
        except httpx.HTTPError as error:
            # The connections of an engine that dies are closed before it is known to have ended.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), END_SECONDS)
            await self.check()
            raise EngineError(
                f"the engine does not answer {path}: {str(error) or type(error).__name__}; its last words: {self.last_words() or 'none'}"
            ) from error
        return response.text

    async def _read_info(self) -> EngineInfo:
        cache = parse_cache_info(await self._get("/metrics"))
        blocks, block_size = _number(cache.get("num_gpu_blocks")), _number(cache.get("block_size"))
        tokens = _number(cache.get("kv_cache_size_tokens")) or (blocks or 0) * (block_size or 0)
        version = await self._optional("/version")
        server = (await self._optional("/server_info?config_format=json")).get("vllm_config")
        config = server if isinstance(server, dict) else {}
        return EngineInfo(
            version=version.get("version"),
            block_size=block_size,
            blocks=blocks,
            kv_tokens=tokens or None,
            kv_bytes=_number(cache.get("kv_cache_memory_bytes")) or self._logged_bytes(),
            max_model_len=_inside(config, "model_config", "max_model_len") or _number(self._facts.get("model_len")),
            max_num_batched_tokens=_inside(config, "scheduler_config", "max_num_batched_tokens")
            or _number(self._facts.get("budget")),
            capture_sizes=_sizes(config, self._facts.get("sizes", "")),
        )

    async def _optional(self, path: str) -> dict[str, Any]:
        """A JSON object the engine may or may not offer."""
        try:
            response = await self._http.get(path, timeout=30.0)
            content = response.json() if response.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _logged_bytes(self) -> int | None:
        """The cache's bytes from the log, which rounds to 0.01 GiB: the upper end, so that a replica's cache is not short of a block."""
        text = self._facts.get("kv_gib")
        return int((float(text) + 0.005) * GIB) if text else None

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        rest = ""
        while data := await self._process.stdout.read(65536):
            lines = (rest + data.decode(errors="replace")).replace("\r", "\n").split("\n")
            rest = lines.pop()
            for line in lines:
                self._hear(line)
        if rest:
            self._hear(rest)

    def _hear(self, line: str) -> None:
        if not line.strip() or _ACCESS.search(line):
            return
        self._tail.append(line[:4000])
        self._echo(line)
        for name, pattern in _FACTS.items():
            match = pattern.search(line)
            if match is not None:
                self._facts[name] = match[1]

    async def _drain_output(self) -> None:
        """Read what the engine still had to say; a grandchild that holds the pipe open does not keep us."""
        await asyncio.wait({self._reader}, timeout=DRAIN_SECONDS)
        self._reader.cancel()

    async def _obituary(self, what: str) -> EngineError:
        await self._drain_output()
        code = self._process.returncode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        hint = " (often the container's memory limit)" if code == -signal.SIGKILL else ""
        words = self.last_words() or "none"
        kind = OutOfMemory if hint else kind_of(words)
        return kind(f"{what}: {how}{hint}; its last words: {words}")


_ACCESS: Final = re.compile(r'"(?:GET|POST) /\S* HTTP/1\.1" 200')
"""Access logs of requests that went well: they would push the lines that matter out of the tail."""

_FACTS: Final[dict[str, re.Pattern[str]]] = {
    "budget": re.compile(r"max_num_batched_tokens=(\d+)"),
    "sizes": re.compile(r"'cudagraph_capture_sizes': \[([\d, ]*)\]"),
    "model_len": re.compile(r"max_seq_len=(\d+)"),
    "kv_gib": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _own_group() -> None:
    """In the child: a process group of its own, to be stopped as a whole, in this session.

    A session of its own would be a scheduling group of its own (Linux's autogroup) wherever no container is around. Engines that share a
    core have to compete as threads do in one container: between groups, Linux 6.18 let the one wait for a minute that had just been polling.
    """
    os.setpgid(0, 0)
    die_with_parent()


def die_with_parent() -> None:
    """In the child: SIGTERM when the profiler goes without stopping it (Linux's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _inside(config: Mapping[str, Any], *path: str) -> int | None:
    value: Any = config
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _sizes(config: Mapping[str, Any], logged: str) -> tuple[int, ...]:
    compilation = config.get("compilation_config")
    found = compilation.get("cudagraph_capture_sizes") if isinstance(compilation, dict) else None
    if isinstance(found, list):
        return tuple(sorted(size for size in found if isinstance(size, int)))
    return tuple(sorted(int(size) for size in logged.split(",") if size.strip()))
