"""The simulated vLLM as a process: start, serve, stop, die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..client import NODE_VARIABLE, SOCKET_VARIABLE, DeviceUnavailableError, list_visible
from ..costs import Model
from ..engine import Engine, Step
from . import http, models
from .api import DEAD, Api, Settings
from .arguments import Options, parse
from .channel import Channel, RefusedError, attach_mps, open_device
from .metrics import Metrics
from .pacer import Pacer
from .startup import GIB, Started, StartError, activation_bytes, max_model_len, start

VERSION = "0.33.0+simulated"
START_VARIABLE = "TIGHTSHIP_SIM_START_SECONDS"
DEFAULT_START_SECONDS = 1.5
DEATH_VARIABLE = "TIGHTSHIP_SIM_DEATH_SECONDS"
# How long a dead engine's server still answers 503 before its process ends: the period of vLLM's watchdog.
DEFAULT_DEATH_SECONDS = 5.0
_NO_DEVICE = (
    "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG` to turn on "
    "verbose logging to help debug the issue."
)


@dataclass
class Server:
    """A started engine behind HTTP."""

    options: Options
    model: Model
    channel: Channel
    mps: Channel | None
    started: Started
    time_scale: float
    died: asyncio.Future[str]

    async def serve(self) -> int:
        """Serve until SIGTERM or death; return the exit status."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        api, pacer = self._engine()
        connections: set[http.Connection] = set()
        listener = await loop.create_server(
            lambda: http.Connection(api.handle, connections), self.options.host, self.options.port, reuse_address=True
        )
        _log(f"Starting vLLM API server 0 on http://{self.options.host or '0.0.0.0'}:{self.options.port}")
        _log("Application startup complete.")
        pacing = asyncio.create_task(pacer.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((pacing, stopping, self.died), return_when=asyncio.FIRST_COMPLETED)
        dead = not stop.is_set()
        if dead:
            await self._die(api, pacing, stop)
        listener.close()
        if not dead and self.options.shutdown_timeout:
            await _drained(api, self.options.shutdown_timeout)
        pacing.cancel()
        for connection in list(connections):
            connection.close()
        self.channel.close()
        _log("Application shutdown complete.")
        return 1 if dead else 0

    def _engine(self) -> tuple[Api, Pacer]:
        engine = Engine(self.started.scheduling, self.model.costs)
        metrics = Metrics(self.options.served_names[0], self.started.scheduling.max_model_len, self._cache_config())
        api = Api(self._settings(), engine, metrics)
        pacer = Pacer(
            engine,
            self.channel,
            self.time_scale,
            before_step=lambda step: self._grow(step, api),
            on_outcome=api.deliver,
            log=_log,
        )
        api.enqueue = pacer.add
        return api, pacer

    async def _die(self, api: Api, pacing: asyncio.Task[None], stop: asyncio.Event) -> None:
        """Do what vLLM does when its engine dies: fail what is in flight, answer 503 until its watchdog ends the process.

        Until then the process remains a client of MPS and of its GPU, as one whose context is broken does.
        """
        cause = self.died.result() if self.died.done() else str(pacing.exception())
        named = "Error" in cause.split(":")[0]
        _complain("EngineCore encountered a fatal error.", cause if named else f"torch.AcceleratorError: {cause}")
        api.die(cause)
        _error(f"AsyncLLM output_handler failed: vllm.v1.engine.exceptions.EngineDeadError: {DEAD}")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), float(os.environ.get(DEATH_VARIABLE, DEFAULT_DEATH_SECONDS)))

    async def _grow(self, step: Step, api: Api) -> None:
        """Take the memory a step needs beyond what any step before it needed."""
        tokens = sum(count for _, count in step.prefills) + len(step.decodes)
        rows = len(step.prefills) + len(step.decodes)
        need = activation_bytes(self.model, tokens, rows, sorted_rows=api.sorting_rows)
        held = self.started.holdings.parts["activations"]
        if need > held:
            await self.started.holdings.take("activations", need - held)

    def _settings(self) -> Settings:
        development = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
        scheduling = self.started.scheduling
        info = {
            "model_config": {"model": self.options.model, "max_model_len": scheduling.max_model_len},
            "scheduler_config": {
                "max_num_seqs": scheduling.max_num_seqs,
                "max_num_batched_tokens": scheduling.max_num_batched_tokens,
            },
            "compilation_config": {"cudagraph_capture_sizes": list(self.started.graph_sizes)},
        }
        keys = self.options.api_key or tuple(filter(None, [os.environ.get("VLLM_API_KEY")]))
        return Settings(
            model=self.options.model,
            served_names=self.options.served_names,
            max_model_len=scheduling.max_model_len,
            version=VERSION,
            api_keys=keys,
            server_info=info if development else None,
        )

    def _cache_config(self) -> Mapping[str, object]:
        scheduling = self.started.scheduling
        return {
            "block_size": scheduling.block_size,
            "cache_dtype": "auto",
            "enable_prefix_caching": self.options.prefix_caching,
            "gpu_memory_utilization": self.options.gpu_memory_utilization,
            "kv_cache_memory_bytes": self.options.kv_cache_memory_bytes,
            "kv_cache_size_tokens": scheduling.num_blocks * scheduling.block_size,
            "num_cpu_blocks": None,
            "num_gpu_blocks": scheduling.num_blocks,
            "num_gpu_blocks_override": None,
            "sliding_window": None,
        }


def main(arguments: Sequence[str]) -> int:
    """Run vLLM's API server with its command line; return the exit status."""
    options = parse(arguments)
    _log(f"vLLM API server version {VERSION}")
    try:
        model = models.find(options.model)
        return asyncio.run(_run(options, model, os.environ))
    except models.ModelError as error:
        _complain(None, error.text)
    except StartError as error:
        _complain("EngineCore failed to start.", str(error))
        _error(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
        )
    except DeviceUnavailableError as error:
        _complain("EngineCore failed to start.", f"RuntimeError: Unexpected error from cudaGetDeviceCount(): {error}")
    except OSError as error:
        _complain(None, f"OSError: {error}")
    return 1


async def _run(options: Options, model: Model, environ: Mapping[str, str]) -> int:
    died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def fatal(message: str) -> None:
        if not died.done():
            died.set_result(message)

    mps, served = await _attached(environ, fatal) or (None, None)
    gpus = list_visible(environ, served)
    if not gpus:
        raise StartError(_NO_DEVICE)
    max_model_len(options, model)
    _log(f"Resolved architecture: {model.architecture}")
    channel = await open_device(environ[SOCKET_VARIABLE], fatal)
    scale = float((await channel.request({"op": "gpus", "node": environ.get(NODE_VARIABLE)}))["time_scale"])
    seconds = float(environ.get(START_VARIABLE, DEFAULT_START_SECONDS))
    starting = asyncio.ensure_future(start(options, model, channel, gpus[0]["uuid"], seconds=seconds, log=_log))
    await asyncio.wait((starting, died), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        raise StartError(f"torch.AcceleratorError: {died.result()}")
    started = starting.result()
    _log_configuration(options, started)
    return await Server(options, model, channel, mps, started, scale, died).serve()


async def _attached(environ: Mapping[str, str], fatal: Callable[[str], None]) -> tuple[Channel, str] | None:
    try:
        return await attach_mps(environ, fatal)
    except RefusedError as error:
        raise StartError(f"torch.AcceleratorError: CUDA error: {error}") from error


async def _drained(api: Api, seconds: float) -> None:
    """Wait until nothing is in flight, at most that long."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(api.idle(), seconds)


def _log_configuration(options: Options, started: Started) -> None:
    scheduling = started.scheduling
    concurrency = scheduling.num_blocks * scheduling.block_size / scheduling.max_model_len
    _log(f"Maximum concurrency for {scheduling.max_model_len:,} tokens per request: {concurrency:.2f}x")
    _log(
        f"Initializing a V1 LLM engine (v{VERSION}) with config: model='{options.model}', "
        f"dtype={options.dtype}, max_seq_len={scheduling.max_model_len}, seed={options.seed}, "
        f"max_num_batched_tokens={scheduling.max_num_batched_tokens}, "
        f"compilation_config={{'cudagraph_capture_sizes': {list(started.graph_sizes)}}}"
    )
    _log(f"kv_cache_memory_bytes={started.kv_bytes} ({started.kv_bytes / GIB:.2f} GiB)")


def _log(message: str) -> None:
    _line("INFO", message)


def _error(message: str) -> None:
    _line("ERROR", message)


def _line(level: str, message: str) -> None:
    print(
        f"(APIServer pid={os.getpid()}) {level} {time.strftime('%m-%d %H:%M:%S')} [api_server.py:1] {message}",
        flush=True,
    )


def _complain(what: str | None, cause: str) -> None:
    """Print an error's cause as the last lines of a traceback."""
    prefix = f"(EngineCore pid={os.getpid()})" if what else f"(APIServer pid={os.getpid()})"
    stamp = time.strftime("%m-%d %H:%M:%S")
    if what:
        print(f"{prefix} ERROR {stamp} [core.py:1] {what}", file=sys.stderr)
    print(f"{prefix} Traceback (most recent call last):", file=sys.stderr)
    for line in cause.split("\n"):
        print(f"{prefix} {line}", file=sys.stderr)
    sys.stderr.flush()
