"""Does the load generator keep up with an engine? Tokens per second and core of ours, of httpx, and of `vllm bench serve`.

    python benchmarks/load_generator.py [--engine-python .venv-vllm/bin/python] [--rates 20000,25000] [-o FILE]

All clients read the same streams from `canned_server.py`, one after the other, each for the same time at the same rates, and each on one core
with the server on another (where there are two). A client's CPU time is read from the kernel, over a window in which all streams run, so
its start and its summary don't count. CPU time a token is the figure to compare: unlike wall time, it hardly depends on what else the
machine does. "lag" is what a client measures as the time between tokens beyond what the server's pace says, the 95th percentile of ours.

The benchmark fails when ours doesn't drive the first rate: every token, no refusal by its own measure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "operator")]

import common  # noqa: E402
from tightship.profiler.clock import SystemClock  # noqa: E402
from tightship.profiler.lengths import Lengths, Prompts  # noqa: E402
from tightship.profiler.load import ClosedLoop  # noqa: E402
from tightship.profiler.wire import HttpChannel  # noqa: E402

PROMPT = 64
OUTPUT = 256
MODEL = "canned"
RAMP_SECONDS = 120.0
TICKS = os.sysconf("SC_CLK_TCK")

COLUMNS = {
    "client": "client",
    "offered": "offered tokens/s:",
    "delivered": "delivered tokens/s:",
    "cpu": "CPU share:",
    "perToken": "CPU us/token:",
    "perCore": "tokens/s per core:",
    "itl": "mean ITL ms:",
    "p95": "p95 ITL ms:",
    "late": "late p95 ms:",
    "verdict": "verdict",
}


# --- the clients; each is a process of its own ---


async def drive_ours(port: int, streams: int, seconds: float) -> dict[str, Any]:
    """The profiler's own closed loop: what it saw in its window."""
    channel = HttpChannel("127.0.0.1", port, MODEL)
    load = ClosedLoop(channel, Lengths.constant(PROMPT, OUTPUT), Prompts(2000, 1), SystemClock(), seed=1)
    load.resize(streams)
    while not load.settled:
        await asyncio.sleep(0.05)
        load.check()
    await asyncio.sleep(0.5)
    recording = load.begin()
    began = time.monotonic()
    print("window", flush=True)
    await asyncio.sleep(seconds)
    load.check()
    took = time.monotonic() - began
    load.begin()
    print("window", flush=True)
    itl = recording.itl.mean or 0.0
    answer = {
        "delivered": recording.tokens / took,
        "itl": itl * 1000,
        "p95": (recording.itl.quantile(0.95) or 0.0) * 1000,
        "late": (recording.lateness.quantile(0.95) or 0.0) * 1000,
        "failures": recording.failures,
        "refused": recording.overloaded(itl),
        "blurred": recording.blurred(itl),
    }
    await load.close()
    return answer


async def drive_httpx(port: int, streams: int, seconds: float) -> dict[str, Any]:
    """The usual way: one task a stream, lines of an httpx response, JSON of each."""
    import httpx  # noqa: PLC0415 (not what the other clients should carry)

    seen = 0
    gaps: list[float] = []
    counting = False
    body = {
        "model": MODEL,
        "prompt": list(range(5, 5 + PROMPT)),
        "max_tokens": OUTPUT,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    started = 0

    async def stream(client: httpx.AsyncClient) -> None:
        nonlocal seen, started
        first = True
        while True:
            last, count = 0.0, 0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    message = json.loads(line[6:])
                    now = time.monotonic()
                    tokens = message["usage"]["completion_tokens"]
                    if first:
                        first = False
                        started += 1
                    if counting and tokens > count:
                        seen += tokens - count
                        if last:
                            gaps.append(now - last)
                    last, count = now, tokens

    # A client a stream: one connection pool of all streams takes time in proportion to their square, and then delivers nothing.
    base = f"http://127.0.0.1:{port}"
    async with contextlib.AsyncExitStack() as stack:
        opened = [httpx.AsyncClient(base_url=base, timeout=300, verify=False, trust_env=False) for _ in range(streams)]
        tasks = [asyncio.create_task(stream(await stack.enter_async_context(client))) for client in opened]
        while started < streams:  # noqa: ASYNC110 (what is waited for is the server's doing)
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        counting = True
        began = time.monotonic()
        print("window", flush=True)
        await asyncio.sleep(seconds)
        counting = False
        took = time.monotonic() - began
        print("window", flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    gaps.sort()
    return {
        "delivered": seen / took,
        "itl": statistics.fmean(gaps) * 1000 if gaps else None,
        "p95": gaps[int(0.95 * len(gaps))] * 1000 if gaps else None,
    }


def run_client(options: argparse.Namespace) -> int:
    """A client process: says "window" at both ends of its window, then what it saw, as JSON."""
    drive = {"ours": drive_ours, "ours-uvloop": drive_ours, "httpx": drive_httpx}[options.client]
    runner = asyncio.run
    if options.client == "ours-uvloop":
        import uvloop  # noqa: PLC0415 (vLLM's environment has it, ours hasn't)

        runner = uvloop.run
    print(json.dumps(runner(drive(options.port, options.streams, options.seconds))), flush=True)
    return 0


# --- the bench ---


@dataclass(frozen=True)
class Cores:
    """Where the two sides run."""

    server: frozenset[int]
    client: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """The last core for the server, the first for the client."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(frozenset(allowed[-1:]), frozenset(allowed[:1]))


def pinned(cores: frozenset[int], command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
    """Start a process on some cores only."""
    setup = f"import os,sys;os.sched_setaffinity(0,{sorted(cores)});os.execv(sys.argv[1],sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", setup, *command], text=True, **more)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, from the kernel (a hundredth of a second fine)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.contextmanager
def served(rate: float, streams: int, cores: Cores) -> Iterator[int]:
    """A canned server; yields its port."""
    command = [sys.executable, str(HERE / "canned_server.py"), "--rate", str(rate), "--streams", str(streams)]
    process = pinned(cores.server, command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def stats(port: int) -> dict[str, float]:
    """What the server says of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=30) as answer:
        return dict(json.load(answer))


def row(client: str, rate: float, cpu: float, seconds: float, seen: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    tokens = seen["delivered"] * seconds
    return {
        "client": client,
        "offered": rate,
        "cpu": cpu / seconds,
        "perToken": cpu / tokens * 1e6 if tokens else math.inf,
        "perCore": tokens / cpu,
        **seen,
        "verdict": verdict(rate, cpu / seconds, seen),
    }


def verdict(rate: float, share: float, seen: dict[str, Any]) -> str:
    """Whether a client drove the rate."""
    if seen.get("refused"):
        return f"refused: {seen['refused']}"
    if seen.get("failures"):
        return f"{seen['failures']} requests failed"
    if rate and seen["delivered"] < 0.97 * rate:
        return "too slow" if share > 0.9 else "not at the rate"
    if share > 0.95:
        return "overloaded"
    return "drove it, percentiles blurred" if seen.get("blurred") else "drove it"


def bench_process(client: str, rate: float, options: argparse.Namespace, cores: Cores) -> dict[str, Any]:
    """One of our own client processes."""
    with served(rate, options.streams, cores) as port:
        python = str(options.engine_python) if client == "ours-uvloop" and options.engine_python else sys.executable
        command = [python, __file__, "--client", client, "--port", str(port)]
        command += ["--streams", str(options.streams), "--seconds", str(options.seconds)]
        process = pinned(cores.client, command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        marks, before, line = [], {}, ""
        while line := process.stdout.readline():
            if line != "window\n":
                break
            marks.append((time.monotonic(), cpu_seconds(process.pid), stats(port)))
        process.wait()
        if len(marks) != 2 or process.returncode:
            raise RuntimeError(f"the client {client} ended with status {process.returncode} after {len(marks)} marks")
        (start, cpu, before), (stop, cpu_end, after) = marks
        answer = row(client, rate, cpu_end - cpu, stop - start, json.loads(line))
        answer["server"] = server_share(before, after)
        return answer


def server_share(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the server did meanwhile: its own rate, CPU share, and the share of its steps that were late by a tenth."""
    seconds, steps = after["now"] - before["now"], max(1.0, after["steps"] - before["steps"])
    return {
        "tokensPerSecond": (after["tokens"] - before["tokens"]) / seconds,
        "cpu": (after["cpu"] - before["cpu"]) / seconds,
        "lateSteps": (after["lateSteps"] - before["lateSteps"]) / steps,
    }


def bench_vllm(rate: float, options: argparse.Namespace, cores: Cores, tokenizer: Path) -> dict[str, Any]:
    """`vllm bench serve`; its CPU time counts while at least 90 % of the streams run."""
    rounds = max(2, round(options.seconds * rate / options.streams / OUTPUT) + 2)
    with served(rate, options.streams, cores) as port, tempfile.TemporaryDirectory() as folder:
        arguments = ["--backend", "openai", "--endpoint", "/v1/completions", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--model", MODEL, "--tokenizer", str(tokenizer), "--dataset-name", "random", "--seed", "1"]
        arguments += ["--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT), "--ignore-eos"]
        arguments += ["--num-prompts", str(rounds * options.streams), "--max-concurrency", str(options.streams)]
        arguments += [
            "--metric-percentiles",
            "95",
            "--disable-tqdm",
            "--save-result",
            "--result-dir",
            folder,
            "--result-filename",
            "result.json",
        ]
        environment = dict(
            os.environ, HF_HUB_OFFLINE="1", PYTHONPATH="", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1"
        )
        command = [str(options.engine_python), str(VLLM_BENCH), "serve", *arguments]
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = pinned(cores.client, command, stdout=output, stderr=output, env=environment)
            window = watch(process, port, options)
            status = process.wait()
        result = Path(folder) / "result.json"
        if status or not result.exists() or window is None:
            raise RuntimeError(f"vllm bench serve ended with status {status}: {log.read_text()[-1500:]}")
        said = json.loads(result.read_text())
    seconds, cpu, tokens, share = window
    seen = {
        "delivered": tokens / seconds,
        "itl": said["mean_itl_ms"],
        "p95": said.get("p95_itl_ms"),
    }
    answer = row("vllm bench serve", rate, cpu, seconds, seen)
    answer["server"] = share
    answer["said"] = {key: said.get(key) for key in ("output_throughput", "duration", "completed", "mean_itl_ms")}
    return answer


VLLM_BENCH = Path(__file__).with_name("vllm_bench.py")


def watch(
    process: subprocess.Popen[str], port: int, options: argparse.Namespace
) -> tuple[float, float, float, dict[str, float]] | None:
    """Seconds, CPU seconds, tokens sent and the server's share of the window in which nearly all streams run."""
    marks: list[tuple[float, dict[str, float]]] = []
    deadline = time.monotonic() + RAMP_SECONDS + 10 * options.seconds
    while process.poll() is None:
        now = stats(port)
        if now["active"] >= 0.9 * options.streams:
            marks.append((cpu_seconds(process.pid), now))
        elif marks and now["active"] == 0:
            break
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGKILL)
            return None
        time.sleep(0.2)
    if len(marks) < 3:
        return None
    (cpu, before), (cpu_end, after) = marks[0], marks[-1]
    seconds, tokens = after["now"] - before["now"], after["tokens"] - before["tokens"]
    return seconds, cpu_end - cpu, tokens, server_share(before, after)


def make_tokenizer(python: Path, folder: Path) -> Path:
    """A small model's folder, for the tokenizer that `vllm bench serve` wants."""
    script = HERE.parent / "scripts" / "make_small_llama.py"
    subprocess.run(
        [str(python), str(script), str(folder)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return folder


def median_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle by CPU time a token, with how far the runs lay apart."""
    ordered = sorted(rows, key=lambda one: one["perToken"])
    chosen = dict(ordered[len(ordered) // 2])
    chosen["perTokenRuns"] = [one["perToken"] for one in ordered]
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run it all; status 1 when our client did not drive the first rate."""
    options = parse(argv)
    if options.client:
        return run_client(options)
    cores = Cores.split()
    rates = [float(rate) for rate in options.rates.split(",")]
    rows = []
    for rate in rates:
        for client in options.clients.split(","):
            runs = [bench_process(client, rate, options, cores) for _ in range(options.repeat)]
            rows.append(median_of(runs))
            print(common.table(COLUMNS, rows[-1:]).splitlines()[-1], file=sys.stderr)
    if options.engine_python and options.engine_python.exists():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = options.tokenizer or make_tokenizer(options.engine_python, Path(folder) / "model")
            rows += [bench_vllm(rate, options, cores, tokenizer) for rate in rates]
    print(f"{options.streams} streams, {options.seconds:g} s, {PROMPT} tokens in and {OUTPUT} out, one core a client\n")
    print(common.table(COLUMNS, rows))
    path = common.write_json(
        options.output, "load-generator", rows, streams=options.streams, seconds=options.seconds, output=OUTPUT
    )
    print(f"\nwritten to {path}")
    ours = [one for one in rows if one["client"].startswith("ours") and one["offered"] == rates[0]]
    return 0 if ours and all(one["verdict"].startswith("drove it") for one in ours) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--rates", default="20000,25000", help="offered tokens/s, by comma; the first must be driven")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a window")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each of our clients; the middle one is shown")
    parser.add_argument("--clients", default="ours,httpx", help="of ours, ours-uvloop and httpx, by comma")
    parser.add_argument("--engine-python", type=Path, help="interpreter that carries vLLM, for `vllm bench serve`")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer; made with the small Llama when not given"
    )
    parser.add_argument("-o", "--output", type=Path, default=common.RESULTS / "load-generator.json")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
