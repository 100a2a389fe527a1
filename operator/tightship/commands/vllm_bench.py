"""`tightship import vllm-bench`: a profile from what vLLM's own benchmarks wrote.

Read are the JSON files of `vllm bench serve --save-result` and of `vllm bench sweep serve` (`run=N.json`; its summaries, warm-ups
and failures are left out). The batch of a run is the requests that were in flight: `max_concurrency`, or the server's
`max_num_seqs` where a sweep varied that, or the smaller one where both are known. Runs of one batch are pooled: rates by total
tokens and requests over total time, latencies weighed by completed requests (a mean of means; of percentiles, their mean).

What must hold: nothing is guessed and nothing mixed. Runs of different models, of different arrival rates or with speculative
decoding make no curve. These are runs of finitely many requests, which end with fewer and fewer in flight, so their T is low by
about 1 / (1 + B / N); that is said, not corrected. Time to first token includes queueing where more requests were sent than ran;
then it is left out. Memory isn't known from them: one replica is advised, until `tightship profile` measures it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tightship.api.units import format_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels
from tightship.commands import advise, manifest, subject
from tightship.commands.manifest import InputError
from tightship.decide import ProfileError
from tightship.profiler.points import decimal

EXIT_USAGE: Final = 2
STATISTICS: Final = {"mean": "mean", "p50": "median", "p90": "p90", "p95": "p95", "p99": "p99"}
"""The API's statistics, and what vLLM calls them."""
DRAINED: Final = 30
"""A run of fewer than so many requests per request in flight spends a good part of its time draining."""
LARGEST: Final = 1e12
"""Above what any count of tokens, duration or latency in such a file can be."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command `import`, with `vllm-bench` below it."""
    group = subparsers.add_parser("import", help="a profile from what another tool measured")
    kinds = group.add_subparsers(dest="tool", metavar="TOOL", required=True)
    parser = kinds.add_parser(
        "vllm-bench",
        help="from the results of `vllm bench serve` and `vllm bench sweep serve`",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="directory of the results, looked through to the bottom"
    )
    subject.add_arguments(parser)
    parser.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="the profile's file (default: standard output)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite -o")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, pool, write, advise; returns the exit status."""
    try:
        if args.output != "-" and manifest.exists(args.output) and not args.force:
            raise InputError(f"{args.output} exists: overwrite it with --force, or name another file (-o)")
        runs = read_runs(args.directory)
        made = subject.from_arguments(args, _defaults(args, runs))
        if args.lengths is not None:
            subject.check_lengths(args.lengths)
        obj, notes = to_manifest(runs, made.profile(args.name))
        manifest.write(
            args.output, manifest.to_yaml(obj, "\n".join([f"Imported from {len(runs)} runs of vllm bench.", *notes]))
        )
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if args.output != "-":
            how = api.Measurement.model_validate(obj["spec"].get("measurement") or {})
            print("\n".join(advise.to_table(subject.decision(obj, how))), flush=True)
    except (InputError, ProfileError) as error:
        print(f"tightship import vllm-bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


# --- reading ---


@dataclass(frozen=True)
class Run:
    """One benchmark run; rates are worked out from totals, latencies are in seconds."""

    path: Path
    batch: int
    waiting: bool
    """Whether more requests were in flight than the engine ran at once: then a first token's time includes queueing."""
    model: str
    requests: int
    prompts: int
    duration: float
    input_tokens: int
    output_tokens: int
    latencies: Mapping[str, Mapping[str, float]]
    """By vLLM's name of the metric (`itl`, `ttft`), then by the API's statistic."""


def read_runs(directory: Path) -> list[Run]:
    """The runs below a directory (or in one file), in the order of their names.

    Raises:
        InputError: there are none, one can't be used, or they don't belong together.
    """
    if not manifest.exists(str(directory)):
        raise InputError(f"{directory}: no such directory")
    files = [directory] if directory.is_file() else sorted(path for path in directory.rglob("*.json") if _is_run(path))
    found = [_run(path, record) for path in files for record in _records(path)]
    runs = [one for one in found if one is not None]
    if not runs:
        raise InputError(
            f"{directory}: none of {len(files)} JSON files is a result of `vllm bench serve --save-result` or `vllm bench sweep serve`"
        )
    models = {one.model: one.path for one in runs}
    if len(models) > 1:
        shown = "; ".join(f"{model} in {path}" for model, path in sorted(models.items()))
        raise InputError(f"runs of {len(models)} models are no one curve: {shown}")
    return runs


def _is_run(path: Path) -> bool:
    """Whether a file may hold a run of its own: a sweep also writes summaries (of the same runs), warm-ups and failures."""
    return path.name not in ("summary.json", "warmup.json") and not path.name.endswith(
        (".failure.json", ".pytorch.json")
    )


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of a file: one, a list, or (`--append-result`) one per line. What is no object is none of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON (cut short?): {error}") from error
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict))


def _run(path: Path, record: Mapping[str, Any]) -> Run | None:
    """A run as its file says; None for JSON that is something else."""
    if "request_throughput" not in record or "total_output_tokens" not in record:
        return None
    _refuse(path, record)
    completed, duration = _number(path, record, "completed"), _number(path, record, "duration")
    if completed < 1 or duration <= 0:
        raise InputError(f"{path}: no request was completed")
    concurrency, rows = _batch(path, record, "max_concurrency"), _batch(path, record, "max_num_seqs")
    batch = min((one for one in (concurrency, rows) if one is not None), default=None)
    if batch is None:
        raise InputError(
            f"{path}: says neither max_concurrency nor max_num_seqs, so the batch is unknown: run with --max-concurrency, or vary "
            "max_num_seqs in the sweep's --serve-params"
        )
    return Run(
        path=path,
        batch=batch,
        waiting=rows is not None and (concurrency is None or concurrency > rows),
        model=str(record.get("model_id") or ""),
        requests=int(completed),
        prompts=int(completed if record.get("num_prompts") is None else _number(path, record, "num_prompts")),
        duration=duration,
        input_tokens=int(_number(path, record, "total_input_tokens")),
        output_tokens=int(_number(path, record, "total_output_tokens")),
        latencies={
            metric: {
                statistic: _number(path, record, name) / 1000
                for statistic, word in STATISTICS.items()
                if record.get(name := f"{word}_{metric}_ms")
            }
            for metric in ("itl", "ttft")
        },
    )


def _refuse(path: Path, record: Mapping[str, Any]) -> None:
    """Runs whose figures mean something else than a curve's."""
    rate = record.get("request_rate", "inf")
    if str(rate) != "inf":
        raise InputError(
            f"{path}: requests arrived at a rate of {rate}/s, so the batch was not kept in flight: run with --request-rate inf "
            "and --max-concurrency"
        )
    if "spec_decode_acceptance_rate" in record:
        raise InputError(
            f"{path}: ran with speculative decoding, whose gaps hold several tokens: no curve can be read from it"
        )


def _batch(path: Path, record: Mapping[str, Any], name: str) -> int | None:
    """A parameter in either spelling; a sweep adds its own to every run's file."""
    value = record.get(name, record.get(name.replace("_", "-")))
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or len(text) > 7 or not 1 <= int(text) <= 1_000_000:
        raise InputError(f"{path}: {name} is {f'{value!r}'[:40]}, not a whole number from 1 to 1000000")
    return int(text)


def _number(path: Path, record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    # NaN compares false with everything.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
        raise InputError(f"{path}: {name} is {f'{value!r}'[:40]}, not a number from 0 to {LARGEST:.0e}")
    return float(value)


# --- pooling ---


def to_manifest(runs: Sequence[Run], profile: api.BatchProfile) -> tuple[dict[str, Any], list[str]]:
    """The BatchProfile of the runs, and what a reader of its figures must know."""
    by_batch: dict[int, list[Run]] = defaultdict(list)
    for one in runs:
        by_batch[one.batch].append(one)
    points = [_point(batch, by_batch[batch]).to_dict() for batch in sorted(by_batch)]
    notes = list(_notes(by_batch))
    obj = profile.to_dict()
    return manifest.manifest(obj, {"points": points}, {labels.ANNOTATION_NOTES: "\n".join(notes)}), notes


def _point(batch: int, runs: Sequence[Run]) -> api.Point:
    """Runs of one batch as one: rates are totals over total time."""
    seconds = sum(one.duration for one in runs)
    requests = sum(one.requests for one in runs)
    outputs, inputs = sum(one.output_tokens for one in runs), sum(one.input_tokens for one in runs)
    return api.Point(
        batch=batch,
        requests_per_second=decimal(requests / seconds),
        output_tokens_per_second=decimal(outputs / seconds),
        total_tokens_per_second=decimal((inputs + outputs) / seconds),
        inter_token_latency=_latency(runs, "itl"),
        time_to_first_token=None if any(one.waiting for one in runs) else _latency(runs, "ttft"),
        requests=requests,
        window=format_duration(seconds),
    )


def _latency(runs: Sequence[Run], metric: str) -> api.Latency | None:
    """Statistics that every run has, weighed by its requests."""
    shared = [name for name in STATISTICS if all(name in one.latencies[metric] for one in runs)]
    total = sum(one.requests for one in runs)
    values = {name: sum(one.latencies[metric][name] * one.requests for one in runs) / total for name in shared}
    return (
        api.Latency(**{name: format_duration(float(f"{value:.4g}")) for name, value in values.items()})
        if values
        else None
    )


def _notes(by_batch: Mapping[int, Sequence[Run]]) -> Iterator[str]:
    least = {batch: min(one.requests for one in runs) for batch, runs in by_batch.items()}
    worst = max(least, key=lambda batch: batch / least[batch])
    share = 1 - 1 / (1 + worst / least[worst])
    yield (
        f"finite runs: T is low by about 1/(1 + B/N) since a run ends with fewer and fewer in flight; most at batch {worst} with "
        f"{least[worst]} requests: {100 * share:.0f} %"
    )
    short = [batch for batch in sorted(least) if least[batch] < DRAINED * batch]
    if short:
        yield f"batch {_list(short)}: fewer than {DRAINED} requests for each in flight; --num-prompts {DRAINED * max(short)} would do"
    small = [batch for batch in sorted(least) if least[batch] < 2 * batch]
    if small:
        yield f"batch {_list(small)}: with so few requests that many were hardly ever in flight: leave these runs out"
    failed = [
        f"{one.path} {one.prompts - one.requests} of {one.prompts}"
        for runs in by_batch.values()
        for one in runs
        if one.requests < one.prompts
    ]
    if failed:
        yield f"requests that failed: {'; '.join(failed)}"
    waited = [batch for batch, runs in sorted(by_batch.items()) if any(one.waiting for one in runs)]
    if waited:
        yield f"batch {_list(waited)}: more requests were sent than ran, so time to first token holds queueing and is left out"
    several = {batch: len(runs) for batch, runs in by_batch.items() if len(runs) > 1}
    if several:
        yield f"batch {_list(sorted(several))}: {_list(sorted(set(several.values())))} runs pooled; percentiles are means of theirs"
    if 1 not in by_batch:
        yield "batch 1 is missing: without T(1) the efficiency floor isn't evaluated"
    yield "memory and preemptions are unknown: one replica is advised until `tightship profile` has measured it"


def _list(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def _defaults(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs themselves say of what was measured."""
    if args.filename is not None:
        return {}
    requests = sum(one.requests for one in runs)
    found: dict[str, Any] = {
        "input_tokens": max(1, round(sum(one.input_tokens for one in runs) / requests)),
        "output_tokens": max(2, round(sum(one.output_tokens for one in runs) / requests)),
    }
    return found | ({"model": runs[0].model} if runs[0].model else {})
