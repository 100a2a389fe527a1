"""`tightship predict`: what several replicas on one GPU would do, from a BatchProfile manifest, without a cluster.

The prediction rests on the curve of one replica alone: the GPU is a server that the replicas queue for, and a replica leaves it
idle for the share of time that gpuUtilization tells (exact mean value analysis; nothing is fitted). Beside it stand what earlier
trials in the profile make of it, and the trial of this very pair where there is one. With a memory ledger in the profile it is
said whether the replicas fit; where they don't, their KV caches get what is left and may limit the batch.

Exit status: 0 with a prediction; 3 when so many replicas can't run at all for want of memory; 2 when the question or the file is
wrong, or the profile doesn't tell enough, in words and never a traceback.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightship.api.units import format_duration, format_quantity
from tightship.commands import options
from tightship.commands.manifest import InputError, read_profile
from tightship.commands.output import columns, say, show
from tightship.core.calibration import calibrate
from tightship.core.colocation import Prediction, predict
from tightship.core.curve import Metric, Objective, Statistic, Trial
from tightship.core.memory import Ledger, Reserve
from tightship.decide import (
    DEFAULT_MEMORY_RESERVE,
    counts_prompt_tokens,
    curve_from_profile,
    has_dedicated_cores,
    ledger_from_profile,
    parse_reserve,
    trials_from_profile,
)

EXIT_USAGE = 2
EXIT_INSUFFICIENT_MEMORY = 3

# What a correction by trials is asked for; its bound plays no part.
_MEAN_ITL = Objective(Metric.INTER_TOKEN_LATENCY, Statistic.MEAN, 1.0)

EPILOG = """\
-o json is one object; what isn't known is null:
  interTokenLatency         mean with all replicas loaded, as the API writes durations: "32.138ms"
  interTokenLatencySeconds  the same as a number: 0.032138
  totalTokensPerSecond      of all replicas together, a number; prompt and generated tokens, as in the profile's points
  slowdown                  how many times as long a step takes as alone
  gpuUtilization            the share of time, 0 to 1, that one replica alone keeps the GPU busy
  interpolated              whether batch or utilization lies between measured points
  batchEffective            requests that really run in each replica: below batch where its KV cache is too small
  alone, corrected, trial   the same three figures of one replica alone, with what trials show, and as measured
  memory                    fits, perReplica, available, kvCacheTokens
  notes                     what must be known of it, in words

example:
  tightship predict -f profile.yaml --batch 96 --replicas 4 -o json
"""


@dataclass(frozen=True)
class Room:
    """Whether replicas fit into memory: bytes each needs, bytes they may share, tokens of KV cache each needs and can have."""

    memory: int
    available: int
    fits: bool
    kv_needed: int
    kv_tokens: int


@dataclass(frozen=True)
class Answer:
    """What is known of one pair; `prediction` is `None` where memory doesn't allow it to run at all."""

    batch: int
    replicas: int
    prediction: Prediction | None
    room: Room | None
    corrected: tuple[float, float | None] | None
    trial: Trial | None
    notes: tuple[str, ...]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `predict`; its namespace carries `run`."""
    parser = subparsers.add_parser(
        "predict",
        help="predict how replicas that share a GPU slow each other down, without a cluster",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("-f", "--filename", required=True, metavar="FILE", help="BatchProfile manifest; - reads stdin")
    parser.add_argument(
        "--batch", required=True, type=_whole, metavar="B", help="requests always in flight in each replica"
    )
    parser.add_argument("--replicas", required=True, type=_whole, metavar="R", help="replicas on the GPU")
    parser.add_argument(
        "--memory-reserve",
        type=options.reserve,
        default=DEFAULT_MEMORY_RESERVE,
        metavar="RESERVE",
        help="device memory left free, a percentage or a quantity (default: 5%%)",
    )
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, predict, print; returns the exit status."""
    try:
        answer = answer_from_profile(
            read_profile(args.filename), args.batch, args.replicas, parse_reserve(args.memory_reserve)
        )
    except InputError as error:
        say(f"tightship predict: {error}")
        return EXIT_USAGE
    except ValueError as error:
        say(f"tightship predict: {args.filename}: {error}")
        return EXIT_USAGE
    show([json.dumps(to_json(answer), indent=2)] if args.output == "json" else to_table(answer))
    return 0 if answer.prediction is not None else EXIT_INSUFFICIENT_MEMORY


def answer_from_profile(profile: Mapping[str, Any], batch: int, replicas: int, reserve: Reserve) -> Answer:
    """What a BatchProfile object tells of `replicas` replicas with `batch` requests always in flight in each.

    Raises:
        ProfileError: the profile holds no points, or something in it can't be read.
        ValueError: it doesn't tell enough for this pair (`colocation.predict`).
    """
    curve, ledger = curve_from_profile(profile), ledger_from_profile(profile)
    trials = trials_from_profile(profile)
    trial = next((each for each in trials if each.pair == (batch, replicas)), None)
    peak = point.kv_tokens_peak if (point := curve.at(batch)) else None
    room = None if ledger is None else make_room(ledger, batch, replicas, reserve, peak)
    notes = list(_room_notes(room, batch, replicas))
    if room is not None and not room.kv_tokens:
        return Answer(batch, replicas, None, room, None, trial, tuple(notes))
    utilization = 0.0 if has_dedicated_cores(profile) else None
    limited = room is not None and not room.fits and ledger is not None
    prediction = predict(
        curve,
        batch,
        replicas,
        kv_tokens_per_replica=room.kv_tokens if limited and room is not None else None,
        mean_context=ledger.context.mean if limited and ledger is not None else None,
        utilization=utilization,
    )
    others = [each for each in trials if each.replicas > 1]
    corrected = None
    if others and replicas > 1:
        total, (latency,) = calibrate(curve, (_MEAN_ITL,), others, utilization=utilization).figures(prediction)
        corrected = total, latency
    notes += prediction.notes
    if utilization is not None and replicas > 1:
        notes.append("replicas have cores of their own: taken not to slow each other down")
    if not counts_prompt_tokens(profile):
        notes.append("rates are of generated tokens alone: the curve holds no others")
    return Answer(batch, replicas, prediction, room, corrected, trial, tuple(notes))


def make_room(ledger: Ledger, batch: int, replicas: int, reserve: Reserve, peak: int | None = None) -> Room:
    """What each of `replicas` replicas gets of the device: KV(B) where that fits, else what an equal share leaves.

    `peak` is the largest number of tokens that the sweep saw in the KV cache at that batch.
    """
    memory, available = ledger.replica_bytes(batch, peak), ledger.available(reserve)
    needed = ledger.kv_tokens(batch, peak)
    if replicas * memory <= available:
        return Room(memory, available, True, needed, needed)
    left = max(available // replicas - ledger.non_kv, 0) // ledger.kv_bytes_per_token
    # An engine refuses to start with less KV cache than its longest request needs.
    kv_tokens = left // ledger.block_size * ledger.block_size
    return Room(memory, available, False, needed, kv_tokens if kv_tokens >= ledger.max_model_len else 0)


def _room_notes(room: Room | None, batch: int, replicas: int) -> Iterator[str]:
    if room is None:
        yield "memory per replica unknown: whether the replicas fit is not known"
    elif not room.kv_tokens:
        yield (
            f"{replicas} replicas can't run: of {_gib(room.available)} each gets too little beside its weights for a KV cache "
            "that holds one request of the greatest length; take fewer replicas"
        )
    elif not room.fits:
        yield (
            f"{replicas} x {_gib(room.memory)} > {_gib(room.available)}: with an equal share each has a KV cache of "
            f"{room.kv_tokens} tokens, less than the {room.kv_needed} that batch {batch} is given, so requests may be preempted"
        )


def to_json(answer: Answer) -> dict[str, Any]:
    """The answer; rates are numbers in tokens per second, latencies both durations and numbers of seconds."""
    made, room, trial = answer.prediction, answer.room, answer.trial
    itl, total = (None, None) if made is None else (made.inter_token_latency, made.total_tokens_per_second)
    return {
        "batch": answer.batch,
        "replicas": answer.replicas,
        **_figures(itl, total),
        "slowdown": None if made is None else made.slowdown,
        "gpuUtilization": None if made is None else made.utilization,
        "interpolated": None if made is None else made.interpolated,
        "batchEffective": None if made is None else made.batch_effective,
        "alone": None if made is None else _figures(made.alone.inter_token_latency.mean, made.alone.throughput),
        "corrected": None if answer.corrected is None else _figures(answer.corrected[1], answer.corrected[0]),
        "trial": None if trial is None else _figures(trial.inter_token_latency.mean, trial.throughput),
        "memory": None
        if room is None
        else {
            "fits": room.fits,
            "perReplica": format_quantity(room.memory),
            "available": format_quantity(room.available),
            "kvCacheTokens": room.kv_tokens,
        },
        "notes": list(answer.notes),
    }


def _figures(latency: float | None, throughput: float | None) -> dict[str, Any]:
    return {
        "interTokenLatency": None if latency is None else format_duration(latency),
        "interTokenLatencySeconds": latency,
        "totalTokensPerSecond": throughput,
    }


def to_table(answer: Answer) -> Iterator[str]:
    """The answer as lines for a terminal."""
    made, trial = answer.prediction, answer.trial
    rows: list[list[str]] = []
    if made is not None:
        kind = "interpolated" if made.interpolated else "alone"
        rows.append(_row(kind, made.batch_effective, 1, made.alone.inter_token_latency.mean, made.alone.throughput))
        rows.append(
            _row("predicted", answer.batch, answer.replicas, made.inter_token_latency, made.total_tokens_per_second)
        )
    if answer.corrected is not None:
        rows.append(
            _row("corrected by trials", answer.batch, answer.replicas, answer.corrected[1], answer.corrected[0])
        )
    if trial is not None:
        rows.append(_row("measured", answer.batch, answer.replicas, trial.inter_token_latency.mean, trial.throughput))
    if rows:
        yield from columns([["BATCH", "REPLICAS", "MEAN ITL", "TOKENS/S", "BASIS"], *rows])
        yield ""
    if made is not None:
        yield (
            f"a step takes {made.slowdown:.2f} x as long as alone, where the GPU is busy {made.utilization:.0%} of the time; "
            f"together {made.total_tokens_per_second / made.alone.throughput:.2f} x the throughput of one replica"
        )
    if answer.room is not None and answer.room.fits:
        room = answer.room
        yield f"memory: {answer.replicas} x {_gib(room.memory)} of {_gib(room.available)}: fits"
    for note in answer.notes:
        yield f"note: {note}"


def _row(basis: str, batch: float, replicas: int, latency: float | None, throughput: float) -> list[str]:
    return [
        f"{batch:.1f}".removesuffix(".0"),
        str(replicas),
        "" if latency is None else format_duration(float(f"{latency:.4g}")),
        f"{throughput:.0f}",
        basis,
    ]


def _gib(amount: int) -> str:
    return f"{amount / (1 << 30):.1f}Gi"


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to 1000000")
    return int(text)
