"""`tightship advise`: decide from a BatchProfile manifest, without a cluster.

A profile is decided by what it was measured for (its `spec.measurement`: objectives, floor, reserve, gain, replicas), unless options say
otherwise. A bound on a latency is of its mean, or of the statistic it names: `--itl 30ms --ttft p95:2s`.

Exit status: 0 with a recommendation; 3 when the profile has none under these objectives (the best achievable latency is
printed); 2 when the question or the file is wrong, in words and never a traceback.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from tightship.api.units import format_duration, format_quantity
from tightship.commands import options
from tightship.commands.manifest import InputError, read_profile
from tightship.commands.output import columns, say, show
from tightship.core.advisor import Basis, Candidate, Recommendation
from tightship.decide import ProfileError

EXIT_USAGE = 2
EXIT_INFEASIBLE = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `advise`; its namespace carries `run`."""
    parser = subparsers.add_parser(
        "advise",
        help="decide batch and replicas per GPU from a BatchProfile manifest, without a cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("-f", "--filename", required=True, metavar="FILE", help="BatchProfile manifest; - reads stdin")
    options.add_decision_options(parser, "the profile's own")
    parser.add_argument("--explain", action="store_true", help="show every pair looked at, and why it won or fell")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, decide, print; returns the exit status."""
    try:
        profile = read_profile(args.filename)
        settings = options.settings(profile, args)
        answer = settings.decide(profile)
    except InputError as error:
        say(f"tightship advise: {error}")
        return EXIT_USAGE
    except ProfileError as error:
        say(f"tightship advise: {args.filename}: {error}")
        return EXIT_USAGE
    for remark in options.remark(settings, args):
        say(remark)
    if args.output == "json":
        show([json.dumps(to_json(answer, explain=args.explain), indent=2)])
    else:
        show(to_table(answer, explain=args.explain))
    return 0 if answer.feasible else EXIT_INFEASIBLE


def to_json(answer: Recommendation, *, explain: bool = False) -> dict[str, Any]:
    """The answer in the API's words; keys without an answer are null."""
    chosen = answer.chosen
    result: dict[str, Any] = {
        "feasible": answer.feasible,
        "reason": answer.failure.value if answer.failure else answer.basis.value,
        "batch": answer.batch,
        "bindingLimit": answer.binding_limit.value,
        "kvCache": _size(answer.kv_cache),
        "kvCacheTokens": answer.kv_tokens,
        "memoryPerReplica": _size(answer.memory_per_replica),
        "replicasPerGPU": answer.replicas,
        "expectedGain": None if answer.expected_gain is None else f"{answer.expected_gain:.3f}",
        "basis": answer.basis.value,
        "tokensPerSecond": None if chosen is None else f"{chosen.throughput:.1f}",
        "latencies": [] if chosen is None else _latencies(answer, chosen.latencies),
        "applied": _applied(answer),
        "defaultEngine": _default_engine(answer),
        "efficiencyFloorEvaluated": answer.floor_evaluated,
        "message": answer.message,
        "notes": list(answer.notes),
    }
    if answer.best_latency is not None:
        best = answer.best_latency
        result["bestAchievable"] = {"batch": best.batch, "latencies": _latencies(answer, best.latencies)}
    if explain:
        result["candidates"] = [_candidate(answer, candidate) for candidate in answer.candidates]
    return result


def _applied(answer: Recommendation) -> dict[str, Any] | None:
    """What may run where that is not the choice itself."""
    if answer.applied is None or answer.applied == answer.chosen:
        return None
    return {
        "batch": answer.applied_batch,
        "replicasPerGPU": answer.applied_replicas,
        "kvCache": _size(answer.applied_kv_cache),
        "memoryPerReplica": _size(answer.applied_memory),
        "expectedGain": None if answer.applied_gain is None else f"{answer.applied_gain:.3f}",
        "tokensPerSecond": f"{answer.applied.throughput:.1f}",
    }


def _default_engine(answer: Recommendation) -> dict[str, Any] | None:
    baseline = answer.baseline
    if baseline is None:
        return None
    return {
        "batch": baseline.point.batch,
        "totalTokensPerSecond": f"{baseline.point.throughput:.1f}",
        "latencies": _latencies(answer, baseline.latencies),
        "meetsObjectives": baseline.meets_objectives,
    }


def _candidate(answer: Recommendation, candidate: Candidate) -> dict[str, Any]:
    return {
        "batch": candidate.batch,
        "replicas": candidate.replicas,
        "tokensPerSecond": f"{candidate.throughput:.1f}",
        "latencies": _latencies(answer, candidate.latencies),
        "efficiency": None if candidate.efficiency is None else f"{candidate.efficiency:.4f}",
        "memoryPerReplica": _size(candidate.memory),
        "basis": candidate.basis.value,
        "outcome": _outcome(answer, candidate),
        "reasons": _reasons(answer, candidate),
    }


def _latencies(answer: Recommendation, values: tuple[float | None, ...]) -> list[dict[str, Any]]:
    return [
        {
            "metric": objective.metric.value,
            "statistic": objective.statistic.value,
            "value": None if value is None else format_duration(value),
            "max": format_duration(objective.maximum),
        }
        for objective, value in zip(answer.objectives, values, strict=True)
    ]


def _outcome(answer: Recommendation, candidate: Candidate) -> str:
    if candidate == answer.chosen:
        return "chosen"
    if candidate == answer.applied:
        return "applied"
    return "less throughput" if candidate.eligible else "rejected"


def _reasons(answer: Recommendation, candidate: Candidate) -> list[str]:
    """Why a candidate won or fell."""
    if candidate.rejections or answer.chosen is None:
        return [rejection.text for rejection in candidate.rejections]
    if candidate == answer.chosen:
        untried = "" if answer.applied == answer.chosen else ", but untried: not applied until it has been"
        return [f"the most tokens/s of all that pass{untried}"]
    if candidate == answer.applied:
        return ["the most tokens/s of all that pass and were measured: runs meanwhile"]
    if candidate.throughput == answer.chosen.throughput:
        return ["no more tokens/s than the choice, which is smaller"]
    return [f"{candidate.throughput:.0f} tokens/s < {answer.chosen.throughput:.0f}"]


def to_table(answer: Recommendation, *, explain: bool = False) -> Iterator[str]:
    """The answer as lines for a terminal."""
    if answer.feasible:
        rows = [
            ("BATCH", str(answer.batch)),
            ("LIMIT", answer.binding_limit.value),
            ("KV-CACHE", _size(answer.kv_cache) or "unknown"),
            ("MEMORY", _size(answer.memory_per_replica) or "unknown"),
            ("PER-GPU", str(answer.replicas)),
            ("GAIN", "" if answer.expected_gain is None else f"{answer.expected_gain:.2f}"),
            ("BASIS", answer.basis.value),
        ]
        yield from columns([[head for head, _ in rows], [cell for _, cell in rows]])
        yield ""
    yield answer.message
    for note in answer.notes:
        yield f"note: {note}"
    if explain:
        yield ""
        pairs = [_explain_row(answer, candidate) for candidate in answer.candidates]
        yield from columns([_explain_head(answer), *pairs, *_baseline_rows(answer)])


def _explain_head(answer: Recommendation) -> list[str]:
    objectives = [f"{objective}".upper() for objective in answer.objectives]
    return ["BATCH", "REPLICAS", "TOKENS/S", *objectives, "EFFICIENCY", "MEMORY", "BASIS", "OUTCOME"]


def _explain_row(answer: Recommendation, candidate: Candidate) -> list[str]:
    return [
        str(candidate.batch),
        str(candidate.replicas),
        f"{candidate.throughput:.0f}",
        *(_short(latency) for latency in candidate.latencies),
        "" if candidate.efficiency is None else f"{candidate.efficiency:.3f}",
        "" if candidate.memory is None else f"{candidate.memory / (1 << 30):.1f}Gi",
        candidate.basis.value,
        f"{_outcome(answer, candidate)}: {'; '.join(_reasons(answer, candidate))}",
    ]


def _baseline_rows(answer: Recommendation) -> Iterator[list[str]]:
    """The engine's default beside the candidates; it is none itself."""
    baseline = answer.baseline
    if baseline is not None:
        verdict = {True: ", meets the SLO", False: ", misses the SLO", None: ""}[baseline.meets_objectives]
        figures = [f"{baseline.point.throughput:.0f}", *(_short(latency) for latency in baseline.latencies)]
        outcome = f"the engine's default{verdict if answer.objectives else ''}"
        yield [str(baseline.point.batch), "1", *figures, "", "", Basis.MEASURED.value, outcome]


def _short(latency: float | None) -> str:
    return "" if latency is None else format_duration(float(f"{latency:.4g}"))


def _size(amount: int | None) -> str | None:
    return None if amount is None else format_quantity(amount)
