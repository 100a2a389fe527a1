"""What the adaptive sweep costs, and whether it finds what the published procedure finds: both in one simulation, at full size.

The published procedure (arXiv:2503.08311) restarts the engine for every batch of its grid and runs 2,000 prompts each time; ours is
the profiler as it is. Both run in virtual time on the simulated OPT-1.3B and Llama-2-7B on an H100 with 64 GB, so their figures
don't depend on this machine, and a full comparison takes a minute or two. Engine seconds are virtual; "with starts" adds 45 s for
every engine that was started. Confirmation, baseline and trials are apart.

Objectives are the published ones: mean inter-token latency of at most 2 (strict) and 4 (relaxed) times the reference's at batch 32,
efficiency above 0.1. Deviations of throughput are from the steady state (the saturated part of a run of 30 prompts for each in flight).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import RESULTS, table, write_json
from tightship.profiler.windows import PRECISION
from tightship.sandbox.virtual import reference
from tightship.sandbox.virtual.agreement import Agreement, Level, bound, compare
from tightship.sandbox.virtual.disturbance import Noise
from tightship.sandbox.virtual.launcher import START_SECONDS
from tightship.sandbox.virtual.profile import profile
from tightship.sandbox.virtual.settings import PUBLISHED, RELAXED, STRICT, Setting

OBJECTIVES = {"strict": STRICT, "relaxed": RELAXED}
GOAL, GOAL_WITH_STARTS = 50.0, 40.0
HEAD = (
    *("model", "objective", "batches", "engine s", "batches", "engine s", "ratio", "ratio with starts"),
    *("B_opt published", "B_opt", "steps apart", "max dev. of T", "wall s"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; exit status 1 when a goal is missed."""
    options = _parser().parse_args(arguments)
    rows = [row for setting in _settings(options) for row in _rows(setting, options)]
    print(_table([HEAD, *map(_cells, rows)]))
    if options.levels:
        for row in rows:
            print(f"\n{row['model']}, {row['objective']}: {1000 * row['slo']:.1f} ms\n{_levels(row['levels'])}")
    settings = {"seed": options.seed, "noise": options.noise, "quick": options.quick, "startSeconds": START_SECONDS}
    write_json(options.output, "cost-simulated", list(map(_plain, rows)), settings=settings)
    missed = [said for row in rows for said in _missed(row)]
    print("\n".join(f"missed: {said}" for said in missed) or "all goals met", file=sys.stderr)
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [setting.name for setting in PUBLISHED]
    parser.add_argument(
        "--model", choices=names, action="append", help="only this model; may be repeated (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the workload's lengths and of the GPU (default: 0)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="deviation of the engine's speed in each second, e.g. 0.05",
    )
    parser.add_argument("--quick", action="store_true", help="shorten the published runs below batch 32 and scale them")
    parser.add_argument("--levels", action="store_true", help="also print the sweeps level by level")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=RESULTS / "cost_simulated.json",
        help="where everything goes as JSON (default: %(default)s)",
    )
    return parser


def _settings(options: argparse.Namespace) -> list[Setting]:
    return [replace(one, seed=options.seed) for one in PUBLISHED if not options.model or one.name in options.model]


def _rows(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each objective; the published procedure is run once for all."""
    began = time.monotonic()
    _say(f"{setting.name}: the published procedure, {len(setting.grid)} batches")
    published = reference.sweep(setting, shortened=options.quick)
    reference_wall = time.monotonic() - began
    noise = Noise(options.noise, options.seed) if options.noise else None
    rows = []
    for name, multiple in OBJECTIVES.items():
        slo = bound(published, multiple)
        _say(f"{setting.name}: the profiler, {name} objective of {1000 * slo:.1f} ms")
        began = time.monotonic()
        ours = profile(setting, objectives=[slo], noise=noise)
        wall = time.monotonic() - began
        _say(f"{setting.name}: the steady state at {len(ours.status.points)} batches")
        agreement = compare(setting, published, ours, slo)
        rows.append(_row(setting, name, agreement, wall) | {"reference_wall_seconds": round(reference_wall, 2)})
    return rows


def _row(setting: Setting, objective: str, agreement: Agreement, wall: float) -> dict[str, Any]:
    return {
        "model": setting.name,
        "objective": objective,
        "wall_seconds": round(wall, 2),
        "ratio": agreement.ratio,
        "ratio_with_starts": agreement.ratio_with_starts,
        "largest_deviation": agreement.largest_deviation,
        **asdict(agreement),
        "levels": agreement.levels,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    steps = row["steps"]
    return (
        row["model"],
        row["objective"],
        str(row["published_starts"]),
        f"{row['published_seconds']:.0f}",
        str(len(row["levels"])),
        f"{row['seconds']:.1f}",
        f"1/{row['ratio']:.0f}",
        f"1/{row['ratio_with_starts']:.0f}",
        str(row["published_batch"]),
        str(row["batch"]),
        "-" if steps is None else f"{steps:.2f}",
        f"{100 * row['largest_deviation']:.1f} %",
        f"{row['wall_seconds']:.1f}",
    )


def _missed(row: dict[str, Any]) -> list[str]:
    """What of the goals a row misses, in words."""
    who = f"{row['model']}, {row['objective']}"
    found = []
    if row["ratio"] < GOAL:
        found.append(f"{who}: 1/{row['ratio']:.0f} of the engine time, the goal is 1/{GOAL:.0f}")
    if row["ratio_with_starts"] < GOAL_WITH_STARTS:
        found.append(f"{who}: 1/{row['ratio_with_starts']:.0f} with starts, the goal is 1/{GOAL_WITH_STARTS:.0f}")
    if row["steps"] is None or row["steps"] > 1:
        found.append(f"{who}: batch {row['batch']} is more than one step from {row['published_batch']}")
    found += [
        f"{who}: T at batch {level.batch} deviates by {100 * level.deviation:+.1f} %"
        for level in row["levels"]
        if level.deviation is not None and abs(level.deviation) > PRECISION
    ]
    return found


def _levels(levels: Sequence[Level]) -> str:
    head = ("batch", "seconds", "window", "T", "half-width", "steady T", "deviation", "ITL", "preemptions")
    body = [
        (
            str(level.batch),
            f"{level.seconds:.1f}",
            level.window,
            f"{level.throughput:.0f}",
            f"{100 * level.half_width:.1f} %",
            "-" if level.steady is None else f"{level.steady:.0f}",
            "-" if level.deviation is None else f"{100 * level.deviation:+.1f} %",
            f"{1000 * level.itl:.2f} ms",
            str(level.preemptions),
        )
        for level in levels
    ]
    return _table([head, *body])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the headings, which may repeat."""
    columns = {str(number): f"{heading}:" for number, heading in enumerate(rows[0])}
    return table(columns, [{str(number): cell for number, cell in enumerate(row)} for row in rows[1:]])


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"levels": [asdict(level) | {"deviation": level.deviation} for level in row["levels"]]}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
