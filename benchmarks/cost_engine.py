"""Cost and agreement on a real engine: one adaptive sweep against a restart of the engine for every batch.

Two references, both of which start the engine anew for every batch and send a fixed number of prompts at once:

- `paper`: the published procedure (arXiv:2503.08311), driven by the profiler's own client;
- `vllm-sweep`: `vllm bench sweep serve` with `max_num_seqs` and `max_concurrency` linked.

A finite run drains: with 200 prompts and batch 64 a quarter of its time has fewer than 64 requests in flight. So throughputs are compared
over the time in which the engine was saturated, which this script reads from the engine's counters while the reference runs; the raw
figure of the run stands beside it. Requests that begin together also end together, so that time holds three waves of tokens and
only two of prompts at batch 64: its rate is brought to the workload's share of prompts as the profiler's own is.

Ours is `tightship profile`, the command, with packing trials left out (one replica). It runs before the reference, in its middle and after
it (`--sweeps`): a shared machine's own speed drifts by 10 % and more within minutes, which a single sweep of two minutes takes for the engine's.
T of ours is their mean, and how far they lie apart stands beside it.

Prints a table, writes JSON, and says on which machine. The goals: a tenth of the reference's time, engine starts left out on both sides, and T
within 10 % of it where the reference's engine was saturated; the exit status is 1 when one is missed. With longer outputs the reference
takes longer in proportion, and the sweep, whose levels are precise after half a life of a request, does not quite.

Engines are bound to one core, load and API server to the others: without that the figures mean nothing. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common import RESULTS, table, write_json
from tightship.api.units import parse_duration
from tightship.api.v1alpha1.spec import Objective
from tightship.decide import decision_from_profile, objectives_from_api
from tightship.profiler.estimate import Window, estimate
from tightship.profiler.lengths import Prompts
from tightship.profiler.metrics import EngineSample, parse_sample
from tightship.profiler.model import read_model
from tightship.profiler.wire import Completion, HttpChannel

VLLM_BENCH = Path(__file__).with_name("vllm_bench.py")
COLUMNS = {
    "batch": "batch:",
    "raw": "T raw:",
    "saturated": "T saturated:",
    "ours": "T ours:",
    "deviation": "deviation:",
    "apart": "ours apart:",
    "itl": "ITL ms:",
    "ourItl": "ITL ours:",
    "seconds": "seconds:",
}
GOAL = 10.0
"""Times less engine time than the reference takes."""
DEVIATION_GOAL = 0.10
SATURATED = 0.98
SAMPLE_SECONDS = 0.25
WINDOW_SECONDS = 2.0
READY_SECONDS = 300.0


@dataclass
class Level:
    """What one batch gave. Rates in total tokens (in and out) a second, times in seconds."""

    batch: int
    start: float
    duration: float
    raw: float
    saturated: float | None
    itl: float


@dataclass
class Watch:
    """Reads an engine's counters while somebody else loads it."""

    url: str
    samples: list[EngineSample] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Watch]:
        """Sample until the block ends."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            before = time.monotonic()
            with contextlib.suppress(OSError, urllib.error.URLError):
                text = urllib.request.urlopen(f"{self.url}/metrics", timeout=5).read().decode()
                self.samples.append(parse_sample(text, at=(before + time.monotonic()) / 2))

    def saturated_rate(self, batch: int, prompts_per_token: float) -> float | None:
        """Generated tokens a second, at the workload's share of prompts, while the engine had `batch` requests to run."""
        full = [number for number, sample in enumerate(self.samples) if sample.running >= SATURATED * batch]
        if not full:
            return None
        # From the first such moment to the last: between two waves fewer run, while the next one's prompts are computed.
        begin, *samples = self.samples[full[0] : full[-1] + 1]
        windows = []
        for sample in samples:
            if sample.at - begin.at >= WINDOW_SECONDS:
                generated = sample.generation_tokens - begin.generation_tokens
                windows.append(Window(sample.at - begin.at, generated, sample.prompt_tokens - begin.prompt_tokens))
                begin = sample
        return estimate(windows, prompts_per_token).rate if windows else None

    def sessions(self) -> list[list[EngineSample]]:
        """The samples by engine: a counter that falls is another engine's."""
        found: list[list[EngineSample]] = []
        for sample in self.samples:
            if not found or sample.generation_tokens < found[-1][-1].generation_tokens:
                found.append([])
            found[-1].append(sample)
        return found


def server_command(options: argparse.Namespace, port: int, batch: int | None) -> list[str]:
    """The engine's command line."""
    bound = ["taskset", "-c", options.server_cores] if options.server_cores else []
    command = [*bound, options.python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(options.max_model_len)]
    command += [*options.engine_arg, "--no-enable-prefix-caching"]
    return command + (["--max-num-seqs", str(batch)] if batch else [])


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The engine's environment: bound to its cores, offline."""
    return {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": options.engine_cores,
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib),
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


@contextlib.contextmanager
def served(options: argparse.Namespace, batch: int) -> Iterator[tuple[int, float]]:
    """A healthy engine; yields its port and the seconds its start took."""
    port = free_port()
    began = time.monotonic()
    with (options.work / f"engine-{batch}.log").open("w") as log:
        process = subprocess.Popen(
            server_command(options, port, batch),
            env=environment(options),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not healthy(port):
            if process.poll() is not None or time.monotonic() - began > READY_SECONDS:
                raise SystemExit(f"the engine did not start: see {log.name}")
            time.sleep(0.25)
        yield port, time.monotonic() - began
    finally:
        stop(process)


def healthy(port: int) -> bool:
    """Whether the engine answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End an engine with all its processes."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Timed:
    """One request of the finite run."""

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done
        self.first: float | None = None
        self.last = 0.0
        self.count = 0

    def tokens(self, count: int) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.count += count

    def finished(self) -> None:
        self.done.set_result(None)

    def failed(self, reason: str, final: bool) -> None:
        self.done.set_exception(RuntimeError(reason))


async def finite_run(options: argparse.Namespace, port: int) -> tuple[float, float]:
    """Send all prompts at once; the duration of the whole, and the mean time between tokens, in seconds."""
    loop = asyncio.get_running_loop()
    channel = HttpChannel("127.0.0.1", port, options.model)
    prompts = Prompts(read_model(options.model, None, os.environ).vocabulary, seed=0)
    began = time.monotonic()
    answers = [_Timed(loop.create_future()) for _ in range(options.prompts)]
    for answer in answers:
        channel.submit(Completion(prompts.draw(options.input_tokens), options.output_tokens), answer)
    await asyncio.gather(*(answer.done for answer in answers))
    took = time.monotonic() - began
    await channel.close()
    waited = sum(answer.last - (answer.first or answer.last) for answer in answers)
    return took, waited / sum(answer.count - 1 for answer in answers)


def factor(options: argparse.Namespace) -> float:
    """Total tokens over generated tokens."""
    return 1 + float(options.input_tokens / options.output_tokens)


def paper(options: argparse.Namespace, batches: Sequence[int]) -> list[Level]:
    """The published procedure: an engine for each batch, all prompts at once."""
    levels = []
    for batch in batches:
        with served(options, batch) as (port, start), Watch(f"http://127.0.0.1:{port}").running() as watch:
            took, itl = asyncio.run(finite_run(options, port))
        raw = options.prompts * (options.input_tokens + options.output_tokens) / took
        rate = watch.saturated_rate(min(batch, options.prompts), factor(options) - 1)
        levels.append(Level(batch, start, took, raw, rate and rate * factor(options), itl))
        tell(f"paper: batch {batch}: {took:.0f} s, {raw:.0f} tokens/s raw")
    return levels


def vllm_sweep(options: argparse.Namespace, batches: Sequence[int]) -> list[Level]:
    """`vllm bench sweep serve`, an engine for each batch."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="sweep-", dir=options.work))
    for name, key in (("serve", "max_num_seqs"), ("bench", "max_concurrency")):
        (folder / f"{name}.json").write_text(json.dumps([{key: batch} for batch in batches]))
    bench = [options.python, str(VLLM_BENCH), "serve", "--backend", "openai"]
    bench += ["--model", options.model, "--endpoint", "/v1/completions", "--host", "127.0.0.1", "--port", str(port)]
    bench += ["--dataset-name", "random", "--random-input-len", str(options.input_tokens)]
    bench += ["--random-output-len", str(options.output_tokens), "--num-prompts", str(options.prompts), "--ignore-eos"]
    command = [options.python, str(VLLM_BENCH), "sweep"]
    command += ["--serve-cmd", shlex.join(server_command(options, port, None)), "--bench-cmd", shlex.join(bench)]
    command += ["--serve-params", str(folder / "serve.json"), "--bench-params", str(folder / "bench.json")]
    command += ["--link-vars", "max_num_seqs=max_concurrency", "--num-runs", "1", "--after-bench-cmd", "true"]
    command += ["--output-dir", str(folder), "--experiment-name", "run"]
    began = time.monotonic()
    log = folder.with_suffix(".log")
    with Watch(f"http://127.0.0.1:{port}").running() as watch, log.open("w") as output:
        done = subprocess.run(command, env=environment(options), stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"vllm bench sweep serve failed: {log.read_text()[-2000:]}")
    whole = time.monotonic() - began
    results = [json.loads(path.read_text()) for path in sorted((folder / "run").glob("*/run=0.json"))]
    results.sort(key=lambda each: each["max_concurrency"])
    rates: dict[int, float] = {}
    for session, batch in zip(watch.sessions(), batches, strict=False):
        rate = Watch("", session).saturated_rate(batch, factor(options) - 1)
        if rate:
            rates[batch] = rate * factor(options)
    busy = sum(each["duration"] for each in results)
    start = (whole - busy) / max(1, len(results))
    tell(f"vllm bench sweep serve: batches {', '.join(map(str, batches))}: {busy:.0f} s, {whole:.0f} s with starts")
    return [
        Level(
            each["max_concurrency"],
            start,
            each["duration"],
            each["total_token_throughput"],
            rates.get(each["max_concurrency"]),
            each["mean_itl_ms"] / 1000,
        )
        for each in results
    ]


REFERENCES = {"paper": paper, "vllm-sweep": vllm_sweep}


def compared(options: argparse.Namespace) -> tuple[dict[str, list[Level]], list[dict[str, Any]], list[float]]:
    """The references' levels with sweeps of ours before, between and after their parts; the sweeps' profiles, and the seconds each took."""
    levels: dict[str, list[Level]] = {name: [] for name in options.references}
    profiles: list[dict[str, Any]] = []
    seconds: list[float] = []

    def sweep() -> None:
        tell(f"ours: tightship profile, {len(profiles) + 1} of {options.sweeps}")
        profile, took = ours(options, len(profiles) + 1)
        profiles.append(profile)
        seconds.append(took)

    sweep()
    known = {batch: float(point["totalTokensPerSecond"]) for batch, point in points_of(profiles[0]).items()}
    for part in parts(options.batches, known, max(1, options.sweeps - 1)):
        for name in levels:
            tell(f"reference: {name}, batches {', '.join(map(str, part))}, {options.prompts} prompts each")
            levels[name] += REFERENCES[name](options, part)
        if len(profiles) < options.sweeps:
            sweep()
    while len(profiles) < options.sweeps:  # more sweeps than batches to put them between
        sweep()
    return levels, profiles, seconds


def parts(batches: Sequence[int], throughput: Mapping[int, float], count: int) -> list[list[int]]:
    """Batches in so many parts at the most that take about as long, in their order.

    Args:
        batches: what is measured with a number of prompts each.
        throughput: tokens a second by batch, as far as it is known: a batch without takes as long as the last one with.
        count: parts wanted, at least 1.
    """
    times, last = [], 1.0
    for batch in batches:
        last = 1 / throughput[batch] if throughput.get(batch) else last
        times.append(last)
    found: list[list[int]] = [[] for _ in range(count)]
    begun = 0.0
    for batch, took in zip(batches, times, strict=True):
        found[min(count - 1, int(count * (begun + took / 2) / sum(times)))].append(batch)
        begun += took
    return [part for part in found if part]


def points_of(profile: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A profile's points by batch."""
    return {point["batch"]: point for point in profile["spec"]["results"]["points"]}


def ours(options: argparse.Namespace, number: int) -> tuple[dict[str, Any], float]:
    """`tightship profile`, for the `number`th time; the profile and the seconds it took in all."""
    output = options.work / f"profile-{number}.yaml"
    command = [*(["taskset", "-c", options.server_cores] if options.server_cores else [])]
    command += [sys.executable, "-m", "tightship", "profile", "--model", options.model, "--python", options.python]
    command += ["--device", "cpu", "--cores", str(options.cores), "--cores-per-replica", str(options.cores)]
    command += ["--memory", options.memory, "--max-model-len", str(options.max_model_len)]
    command += [f"--engine-arg={arg}" for arg in options.engine_arg]
    command += ["--input-tokens", str(options.input_tokens), "--output-tokens", str(options.output_tokens)]
    command += ["--itl", options.itl, "--seed", str(number)]
    command += ["--max-replicas-per-gpu", "1", "--budget", "20m", "-o", str(output)]
    began = time.monotonic()
    subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
    profile: dict[str, Any] = yaml.safe_load(output.read_text())
    return profile, time.monotonic() - began


def advised(profile: dict[str, Any], objective: str) -> int | None:
    """The batch that the advisor takes from a profile."""
    wanted = objectives_from_api([Objective(metric="InterTokenLatency", max=objective)])
    return decision_from_profile(profile, wanted, max_replicas=1).batch


def as_profile(levels: Sequence[Level]) -> dict[str, Any]:
    """The reference's saturated levels as a profile, for the same advisor."""
    points = [
        {
            "batch": level.batch,
            "totalTokensPerSecond": f"{level.saturated or level.raw:.3f}",
            "interTokenLatency": {"mean": f"{level.itl * 1000:.4f}ms"},
        }
        for level in levels
    ]
    return {"status": {"points": points}}


def report(
    options: argparse.Namespace,
    reference: str,
    levels: list[Level],
    profiles: list[dict[str, Any]],
    wholes: list[float],
) -> dict[str, Any]:
    """Print the tables of one reference; return what goes into the JSON."""
    curves = [points_of(profile) for profile in profiles]
    rows, deviations = [], []
    for level in levels:
        points = [curve[level.batch] for curve in curves if level.batch in curve]
        rates = [float(point["totalTokensPerSecond"]) for point in points]
        own = statistics.mean(rates) if rates else None
        base = level.saturated or level.raw
        deviation = own / base - 1 if own else None
        deviations += [] if deviation is None or level.saturated is None else [abs(deviation)]
        rows.append(
            {
                "batch": level.batch,
                "raw": level.raw,
                "saturated": level.saturated,
                "ours": own,
                "deviation": None if deviation is None else f"{deviation:+.1%}",
                "apart": f"{(max(rates) - min(rates)) / own:.1%}" if own and len(rates) > 1 else None,
                "itl": 1000 * level.itl,
                "ourItl": 1000 * statistics.mean(parse_duration(point["interTokenLatency"]["mean"]) for point in points)
                if points
                else None,
                "seconds": level.duration,
            }
        )
    print(table(COLUMNS, rows), end="\n\n")
    results = [profile["spec"]["results"] for profile in profiles]
    costs = [each.get("cost") or {} for each in results]
    sweeps = [float(cost.get("sweep", each["gpuSeconds"])) for cost, each in zip(costs, results, strict=True)]
    sweep = statistics.mean(sweeps)
    busy = sum(level.duration for level in levels)
    starts = sum(level.start for level in levels)
    # one for the sweep, one for the confirmation
    own_start = statistics.mean(float(cost.get("starts", 0)) / 2 for cost in costs)
    own_start = own_start or statistics.mean(level.start for level in levels)
    summary = {
        "reference": reference,
        "reference seconds without starts": round(busy, 1),
        "reference seconds with starts": round(busy + starts, 1),
        "our sweeps, seconds without starts": ", ".join(f"{each:.1f}" for each in sweeps),
        "our seconds in all, confirmation included": ", ".join(f"{each:.1f}" for each in wholes),
        "ratio without starts": round(busy / sweep, 1),
        "ratio with starts": round((busy + starts) / (sweep + own_start), 1),
        "largest deviation of T, saturated": f"{max(deviations):.1%}" if deviations else "nothing to compare",
        "batch advised from the reference": advised(as_profile(levels), options.itl),
        "batches advised from ours": ", ".join(str(advised(profile, options.itl)) for profile in profiles),
        "objective": f"mean ITL {options.itl}",
        "batches we measured": sorted(set().union(*curves)),
    }
    print(
        table({"name": "whole", "value": ""}, [{"name": name, "value": str(value)} for name, value in summary.items()])
    )
    print()
    found = missed(busy / sweep, deviations)
    return {"summary": summary, "missed": found, "levels": [vars(level) for level in levels], "results": results}


def missed(ratio: float, deviations: Sequence[float]) -> list[str]:
    """What of the goals was not reached, in words.

    Args:
        ratio: the reference's engine time over the sweep's.
        deviations: of T at each batch that can be compared, relative and without sign.
    """
    found = []
    if ratio < GOAL:
        found.append(f"1/{ratio:.1f} of the reference's time, the goal is 1/{GOAL:.0f}")
    if not deviations:
        found.append("at no batch was the reference saturated and measured by the sweep too: T can't be compared")
    elif max(deviations) > DEVIATION_GOAL:
        found.append(f"T deviates by {max(deviations):.1%}, the goal is {DEVIATION_GOAL:.0%}")
    return found


def tell(text: str) -> None:
    """Progress, beside the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--model", required=True, help="model directory (scripts/make_small_llama.py writes one)")
    parser.add_argument(
        "--reference",
        dest="references",
        choices=REFERENCES,
        action="append",
        help="may be repeated: then both are compared with the same sweeps (default: paper)",
    )
    parser.add_argument("--batches", default="1,2,4,8,16,32,64", help="the reference's batches (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="prompts a batch (default: %(default)s)")
    parser.add_argument("--input-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--output-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--max-model-len", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--engine-arg", action="append", default=["--dtype=bfloat16", "--enforce-eager"])
    parser.add_argument("--engine-cores", default="1", help="cores of the engine's threads (default: %(default)s)")
    parser.add_argument("--server-cores", default="", help="cores of all the rest, for taskset (default: not bound)")
    parser.add_argument("--cores", type=int, default=2, help="cores of the device (default: %(default)s)")
    parser.add_argument("--memory", default="8Gi", help="memory of the device (default: %(default)s)")
    parser.add_argument(
        "--kv-gib", type=int, default=2, help="KV cache of the reference's engines (default: %(default)s)"
    )
    parser.add_argument(
        "--itl", default="60ms", help="the objective that batches are advised for (default: %(default)s)"
    )
    parser.add_argument(
        "--sweeps", type=int, default=3, help="how often ours is run, at least once (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON file (default: under build/benchmarks)")
    options = parser.parse_args(argv)
    options.references = list(dict.fromkeys(options.references or ["paper"]))
    options.output = options.output or RESULTS / f"cost-engine-{'-'.join(options.references)}.json"
    options.batches = [int(batch) for batch in options.batches.split(",")]
    return options


def main() -> int:
    """Run ours and the references in turns, and compare; exit status 1 when a goal is missed."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="tightship-bench-") as work:
        options.work = Path(work)
        levels, profiles, wholes = compared(options)
        found = [report(options, name, levels[name], profiles, wholes) for name in levels]
    tell(f"written to {write_json(options.output, 'cost_engine', found)}")
    said = [f"missed: {each['summary']['reference']}: {what}" for each in found for what in each["missed"]]
    print("\n".join(said) or "all goals met", file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
