"""`tightship plot`: a profile and what follows from it, drawn.

Throughput of the whole GPU over the batch of each replica, the latency that the objectives are on below it, the memory of the
choice below that. What was measured is a marker, filled where nothing speaks against it; what the advisor estimates, the trials
considered, is a dashed line; a thin line leads from each trial to what the curve alone had predicted of it.

`picture` collects what is drawn, from the same decision that `tightship advise` prints; `draw` draws it. Needs matplotlib for that.

Exit status: 0 drawn (also where nothing meets the objectives: the picture shows why); 2 the question or the file is wrong, or
matplotlib is missing.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tightship.api.units import format_duration
from tightship.commands import advise, manifest, options
from tightship.commands.manifest import InputError
from tightship.commands.output import say, show
from tightship.core.advisor import Candidate, Recommendation, allowed_preemptions
from tightship.core.calibration import calibrate
from tightship.core.colocation import Prediction, predict
from tightship.core.curve import Confirmation, Curve, Metric, Objective, Point, Statistic, Trial
from tightship.core.memory import Ledger
from tightship.decide import (
    ProfileError,
    baseline_from_profile,
    confirmation_from_profile,
    curve_from_profile,
    has_dedicated_cores,
    ledger_from_profile,
    measurement,
    parse_reserve,
    trials_from_profile,
)

EXIT_USAGE: Final = 2
FORMATS: Final = ("png", "svg", "html")
GIB: Final = 1 << 30
INSTALL: Final = "plot needs matplotlib, which isn't installed: pip install 'tightship[plot]'"

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ too.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS: Final = ("o", "s", "^", "D", "v", "P")
INK: Final = "#222222"
PALE: Final = "#8a8a8a"
SHADE: Final = "#D55E00"
DIAMOND: Final = {"color": "none", "markeredgecolor": "#0072B2", "markeredgewidth": 1.6, "markersize": 11, "zorder": 5}
RING: Final = {"color": "none", "markeredgecolor": INK, "markeredgewidth": 1.6, "markersize": 15, "zorder": 5}
STATISTICS: Final = {
    "mean": "mean",
    "p50": "median",
    "p90": "90th percentile",
    "p95": "95th percentile",
    "p99": "99th percentile",
}
METRICS: Final = {Metric.INTER_TOKEN_LATENCY: "inter-token latency", Metric.TIME_TO_FIRST_TOKEN: "time to first token"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `plot`."""
    parser = subparsers.add_parser(
        "plot",
        help="draw a profile and the choice, as png, svg or html",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("-f", "--filename", required=True, metavar="FILE", help="BatchProfile manifest; - reads stdin")
    parser.add_argument(
        "-o", "--output", default="profile.png", metavar="FILE", help=".png, .svg or .html (default: %(default)s)"
    )
    options.add_decision_options(parser, "the profile's own")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, decide, draw; returns the exit status."""
    try:
        kind = Path(args.output).suffix.lower().lstrip(".")
        if kind not in FORMATS:
            raise InputError(f"-o {args.output}: the name must end in .png, .svg or .html")
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError(INSTALL)
        profile = manifest.read_profile(args.filename)
        settings = options.settings(profile, args)
        answer = settings.decide(profile)
        shown = picture(profile, answer, floor=settings.efficiency_floor, reserve=settings.memory_reserve)
        _write(Path(args.output), _render(shown, answer, kind))
    except InputError as error:
        say(f"tightship plot: {error}")
        return EXIT_USAGE
    except ProfileError as error:
        say(f"tightship plot: {args.filename}: {error}")
        return EXIT_USAGE
    for remark in options.remark(settings, args):
        say(remark)
    show([f"{args.output}: {answer.message}"])
    return 0


# --- what is drawn ---


@dataclass(frozen=True)
class Panel:
    """A latency that is shown, and the bound on it in seconds; without objectives the mean inter-token latency is."""

    metric: Metric = Metric.INTER_TOKEN_LATENCY
    statistic: Statistic = Statistic.MEAN
    maximum: float | None = None


@dataclass(frozen=True)
class Mark:
    """A measured pair: tokens per second of the whole GPU, and the latencies of the panels in seconds."""

    batch: int
    throughput: float
    latencies: tuple[float | None, ...]
    eligible: bool = True


@dataclass(frozen=True)
class Series:
    """Replicas of one number.

    `estimated`: what the advisor takes of them at the batches of the curve, the trials considered; `predicted`: what the curve
    alone had predicted of each measured one (none where it doesn't tell).
    """

    replicas: int
    measured: tuple[Mark, ...]
    estimated: tuple[Mark, ...] = ()
    predicted: tuple[Mark | None, ...] = ()


@dataclass(frozen=True)
class MemoryBar:
    """The GPU's memory under the choice, in bytes."""

    replicas: int
    each: int
    kv_cache: int
    reserve: int
    total: int


@dataclass(frozen=True)
class Picture:
    """What is drawn."""

    title: str
    subtitle: str
    panels: tuple[Panel, ...]
    series: tuple[Series, ...]
    floor: float | None
    """T(1) times the efficiency floor: a point must stay above `floor` x batch."""
    chosen: Candidate | None
    chosen_latencies: tuple[float | None, ...]
    applied: Mark | None
    """What runs until the choice, which is an estimate, has been tried; `None` where that is the choice itself."""
    baseline: Mark | None
    memory: MemoryBar | None
    confirmed: Mark | None = None
    """One replica that ran alone as it would."""


def picture(profile: Mapping[str, Any], answer: Recommendation, *, floor: float, reserve: str) -> Picture:
    """What to draw of a profile and the answer for it.

    Raises:
        ProfileError: the profile can't be read.
    """
    curve = curve_from_profile(profile)
    panels = tuple(Panel(each.metric, each.statistic, each.maximum) for each in answer.objectives) or (Panel(),)
    fell = {(each.batch, each.replicas) for each in answer.candidates if not each.eligible}
    trials = trials_from_profile(profile)
    singles = tuple(_mark(point, panels, (point.batch, 1) not in fell) for point in curve.points)
    tried = {trial.replicas for trial in trials if trial.replicas > 1}
    wanted = tried | ({answer.replicas} if answer.replicas and answer.replicas > 1 else set())
    expect = _Expectation(curve, panels, trials, 0.0 if has_dedicated_cores(profile) else None)
    packed = tuple(_packed(replicas, trials, fell, expect) for replicas in sorted(wanted))
    single = curve.at(1)
    chosen = answer.chosen
    return Picture(
        title=f"{_model(profile)} on {_device(profile)}",
        subtitle=_subtitle(answer),
        panels=panels,
        series=(Series(1, singles), *packed),
        floor=None if single is None or not floor else floor * single.throughput,
        chosen=chosen,
        chosen_latencies=_latencies(chosen, answer, curve, panels),
        applied=_applied(answer, curve, panels),
        baseline=None if (base := baseline_from_profile(profile)) is None else _mark(base, panels, True),
        memory=_memory(answer, ledger_from_profile(profile), reserve),
        confirmed=_confirmed(confirmation_from_profile(profile), panels, fell),
    )


def _mark(measured: Point | Trial, panels: Sequence[Panel], eligible: bool) -> Mark:
    latencies = tuple(measured.latency(panel.metric, panel.statistic) for panel in panels)
    return Mark(measured.batch, measured.throughput, latencies, eligible)


def _confirmed(found: Confirmation | None, panels: Sequence[Panel], fell: Set[tuple[int, int]]) -> Mark | None:
    if found is None or found.throughput is None:
        return None
    latencies = tuple(found.latency(panel.metric, panel.statistic) for panel in panels)
    return Mark(found.batch, found.throughput, latencies, (found.batch, 1) not in fell)


class _Expectation:
    """What the curve predicts of pairs, with and without what the trials taught."""

    def __init__(
        self, curve: Curve, panels: Sequence[Panel], trials: Sequence[Trial], utilization: float | None
    ) -> None:
        self.panels = panels
        self.batches = [point.batch for point in curve.points]
        self._curve = curve
        self._utilization = utilization
        # The bound has no part in what is predicted.
        shown = [Objective(panel.metric, panel.statistic, panel.maximum or 1.0) for panel in panels]
        # As the advisor does: what preempted says nothing of pairs that don't.
        usable = [trial for trial in trials if (trial.preemptions or 0) <= allowed_preemptions(trial.requests)]
        self._calibration = calibrate(curve, shown, usable, utilization=utilization)

    def predicted(self, batch: int, replicas: int) -> Mark | None:
        """By the curve alone; `None` where it doesn't tell, as without a recorded utilization."""
        found = self._prediction(batch, replicas)
        if found is None:
            return None
        latencies = tuple(found.latency(panel.metric, panel.statistic) for panel in self.panels)
        return Mark(batch, found.total_tokens_per_second, latencies)

    def estimated(self, batch: int, replicas: int) -> Mark | None:
        """As the advisor takes it."""
        found = self._prediction(batch, replicas)
        return None if found is None else Mark(batch, *self._calibration.figures(found))

    def _prediction(self, batch: int, replicas: int) -> Prediction | None:
        try:
            return predict(self._curve, batch, replicas, utilization=self._utilization)
        except ValueError:
            return None


def _packed(replicas: int, trials: Sequence[Trial], fell: Set[tuple[int, int]], expect: _Expectation) -> Series:
    tried = [trial for trial in trials if trial.replicas == replicas]
    estimated = (expect.estimated(batch, replicas) for batch in expect.batches)
    return Series(
        replicas,
        measured=tuple(_mark(trial, expect.panels, trial.pair not in fell) for trial in tried),
        estimated=tuple(mark for mark in estimated if mark is not None),
        predicted=tuple(expect.predicted(trial.batch, replicas) for trial in tried),
    )


def _memory(answer: Recommendation, ledger: Ledger | None, reserve: str) -> MemoryBar | None:
    if ledger is None or answer.chosen is None or answer.memory_per_replica is None:
        return None
    kept = parse_reserve(reserve)
    return MemoryBar(
        replicas=answer.chosen.replicas,
        each=answer.memory_per_replica,
        kv_cache=answer.kv_cache or 0,
        reserve=kept.of(ledger.device_total),
        total=ledger.device_total,
    )


def _latencies(
    pair: Candidate | None, answer: Recommendation, curve: Curve, panels: Sequence[Panel]
) -> tuple[float | None, ...]:
    if pair is None:
        return ()
    if answer.objectives:
        return pair.latencies
    # Nothing was asked of latency: then it is shown only where the pair is a point of the curve.
    point = curve.at(pair.batch) if pair.replicas == 1 else None
    return tuple(None if point is None else point.latency(panel.metric, panel.statistic) for panel in panels)


def _applied(answer: Recommendation, curve: Curve, panels: Sequence[Panel]) -> Mark | None:
    pair = answer.applied
    if pair is None or answer.chosen is None or pair.pair == answer.chosen.pair:
        return None
    return Mark(pair.batch, pair.throughput, _latencies(pair, answer, curve, panels))


def _model(profile: Mapping[str, Any]) -> str:
    source = str(
        _part(profile, "spec", "key", "model").get("source") or _part(profile, "metadata").get("name") or "a model"
    )
    return source.removeprefix("hf://") if source.startswith("hf://") else source.rstrip("/").rsplit("/", 1)[-1]


def _device(profile: Mapping[str, Any]) -> str:
    accelerator = _part(profile, "spec", "key", "accelerator")
    measured, _ = measurement(profile)
    if accelerator.get("device") == "cpu":
        return f"{accelerator.get('coresPerReplica') or 1} of {accelerator.get('cores') or '?'} CPU cores"
    return str(accelerator.get("product") or _part(measured, "gpu").get("product") or "a GPU")


def _part(obj: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The mapping at a path, for a heading: empty where there is none, since no heading is worth refusing a profile."""
    for name in path:
        below = obj.get(name)
        obj = below if isinstance(below, Mapping) else {}
    return obj


def _subtitle(answer: Recommendation) -> str:
    chosen = answer.chosen
    if chosen is None:
        return f"no choice: {answer.failure.value if answer.failure else ''}"
    gain = (
        f", {answer.expected_gain:.2f} x the best single replica"
        if answer.expected_gain and chosen.replicas > 1
        else ""
    )
    return f"{_pair(chosen)}: {chosen.throughput:,.0f} tokens/s{gain} ({answer.basis.value.lower()}); {answer.binding_limit.value} binds"


def _pair(chosen: Candidate) -> str:
    plural = "" if chosen.replicas == 1 else "s"
    return f"batch {chosen.batch} with {chosen.replicas} replica{plural} per GPU"


# --- drawing ---


def draw(shown: Picture) -> Any:
    """The picture as a matplotlib figure."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra, and slow to load)

    bar = shown.memory is not None
    heights = [3.4, *(2.6 for _ in shown.panels), *([0.55] if bar else [])]
    figure: Any = Figure(figsize=(9.5, sum(heights) + 1.9), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curves = axes[: 1 + len(shown.panels)]
    for axis in curves[1:]:
        axis.sharex(curves[0])
    _draw_throughput(curves[0], shown)
    for index, (axis, panel) in enumerate(zip(curves[1:], shown.panels, strict=True)):
        _draw_latency(axis, shown, panel, index)
    _draw_batches(curves, shown)
    if shown.memory is not None:
        _draw_memory(axes[-1], shown.memory)
    # A dollar sign would begin a formula.
    title = shown.title.replace("$", r"\$")
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    curves[0].set_title(shown.subtitle, loc="left", fontsize=10, color=INK, pad=10)
    handles, names = curves[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK, markerscale=0.75
    )
    return figure


def _draw_throughput(axis: Any, shown: Picture) -> None:
    top = 0.0
    for index, series in enumerate(shown.series):
        top = max(top, _draw_series(axis, series, index, lambda mark: mark.throughput))
    if shown.floor is not None:
        batches = [mark.batch for mark in shown.series[0].measured]
        line = _between(batches[0], batches[-1])
        axis.plot(
            line,
            [shown.floor * batch for batch in line],
            color=PALE,
            linestyle=(0, (1, 1.5)),
            label="efficiency floor (one replica)",
        )
    if shown.baseline is not None:
        axis.plot(
            shown.baseline.batch, shown.baseline.throughput, "X", color="white", markeredgecolor=INK, markersize=9, zorder=4,
            linestyle="none", label=f"engine's default batch ({shown.baseline.batch})",
        )  # fmt: skip
        top = max(top, shown.baseline.throughput)
    if shown.confirmed is not None:
        axis.plot(
            shown.confirmed.batch, shown.confirmed.throughput, "D", linestyle="none", label="as a replica (confirmation run)", **DIAMOND
        )  # fmt: skip
        top = max(top, shown.confirmed.throughput)
    if shown.chosen is not None:
        axis.plot(
            shown.chosen.batch, shown.chosen.throughput, "*", color="#F0E442", markeredgecolor=INK, markersize=17, zorder=6,
            linestyle="none", label="the choice",
        )  # fmt: skip
        axis.annotate(
            f"{shown.chosen.batch} x {shown.chosen.replicas}", (shown.chosen.batch, shown.chosen.throughput), xytext=(-12, 12),
            textcoords="offset points", ha="right", fontsize=9.5, fontweight="bold", color=INK, zorder=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip
        top = max(top, shown.chosen.throughput)
    if shown.applied is not None:
        axis.plot(
            shown.applied.batch, shown.applied.throughput, "o", linestyle="none", label="runs until the choice is tried", **RING
        )  # fmt: skip
    if any(before is not None for series in shown.series for before in series.predicted):
        axis.plot(
            [],
            [],
            "_",
            color=PALE,
            markersize=9,
            markeredgewidth=1.5,
            linestyle="none",
            label="what the curve alone predicted",
        )
    if any(not mark.eligible for series in shown.series for mark in series.measured):
        axis.plot(
            [],
            [],
            "o",
            color="white",
            markeredgecolor=PALE,
            markersize=6.5,
            linestyle="none",
            label="hollow: ruled out",
        )
    axis.set_ylim(0, 1.12 * top)
    axis.set_ylabel("throughput of the GPU\n(tokens/s)", color=INK)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_series(
    axis: Any, series: Series, index: int, value: Callable[[Mark], float | None], *, named: bool = True
) -> float:
    """One number of replicas on one panel, `value` of each mark; returns the largest."""
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    name = "1 replica" if series.replicas == 1 else f"{series.replicas} replicas"
    known = [(mark.batch, height, mark.eligible) for mark in series.measured if (height := value(mark)) is not None]
    line = [(mark.batch, height) for mark in series.estimated if (height := value(mark)) is not None]
    if line:
        axis.plot(
            *zip(*line, strict=True), "--", color=colour, linewidth=1.3, alpha=0.85, label=f"{name}, estimated" if named else None
        )  # fmt: skip
    for mark, before in zip(series.measured, series.predicted, strict=False):
        ends = value(mark), None if before is None else value(before)
        if None not in ends:
            axis.plot([mark.batch] * 2, ends, "-", color=colour, linewidth=1, zorder=2.5)
            axis.plot(mark.batch, ends[1], "_", color=colour, markersize=9, markeredgewidth=1.5, zorder=2.5)
    if known:
        axis.plot(
            [batch for batch, _, _ in known], [height for _, height, _ in known], linestyle="-" if series.replicas == 1 else "none",
            color=colour, linewidth=1.8, marker=marker, markersize=6.5, zorder=3, label=f"{name}, measured" if named else None,
        )  # fmt: skip
        hollow = [(batch, height) for batch, height, eligible in known if not eligible]
        axis.plot(
            [batch for batch, _ in hollow], [height for _, height in hollow], linestyle="none", marker=marker,
            markersize=6.5, color="white", markeredgecolor=colour, zorder=3.5,
        )  # fmt: skip
    return max((each[1] for each in (*known, *line)), default=0.0)


def _draw_latency(axis: Any, shown: Picture, panel: Panel, index: int) -> None:
    def milliseconds(mark: Mark) -> float | None:
        seconds = mark.latencies[index]
        return None if seconds is None else 1000 * seconds

    for number, series in enumerate(shown.series):
        _draw_series(axis, series, number, milliseconds, named=False)
    base = shown.baseline.latencies[index] if shown.baseline is not None else None
    if shown.baseline is not None and base is not None:
        axis.plot(shown.baseline.batch, 1000 * base, "X", color="white", markeredgecolor=INK, markersize=9, zorder=4)
    replica = shown.confirmed.latencies[index] if shown.confirmed is not None else None
    if shown.confirmed is not None and replica is not None:
        axis.plot(shown.confirmed.batch, 1000 * replica, "D", **DIAMOND)
    until = shown.applied.latencies[index] if shown.applied is not None else None
    if shown.applied is not None and until is not None:
        axis.plot(shown.applied.batch, 1000 * until, "o", **RING)
    latency = shown.chosen_latencies[index] if shown.chosen_latencies else None
    if shown.chosen is not None and latency is not None:
        axis.plot(
            shown.chosen.batch, 1000 * latency, "*", color="#F0E442", markeredgecolor=INK, markersize=17, zorder=6
        )
    axis.set_yscale("log")
    _ticks(axis)
    if panel.maximum is not None:
        bound = 1000 * panel.maximum
        low, high = axis.get_ylim()
        low, high = min(low, bound / 1.5), max(high, 1.5 * bound)
        axis.axhline(bound, color=SHADE, linewidth=1.3)
        axis.axhspan(bound, high, color=SHADE, alpha=0.08, linewidth=0)
        axis.set_ylim(low, high)
        axis.annotate(
            f"SLO: {format_duration(panel.maximum)}", (0.006, bound), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color="#a23c00", fontsize=8.5,
        )  # fmt: skip
    axis.set_ylabel(f"{STATISTICS[panel.statistic.value]}\n{METRICS[panel.metric]} (ms)", color=INK)


def _ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_batches(curves: Sequence[Any], shown: Picture) -> None:
    """The axis that the panels share, and a line down through the chosen batch."""
    from matplotlib.ticker import FixedLocator, NullLocator  # noqa: PLC0415

    batches = sorted({mark.batch for series in shown.series for mark in series.measured})
    powers = [
        1 << power for power in range(max(batches).bit_length() + 1) if batches[0] <= 1 << power <= 1.5 * batches[-1]
    ]
    for axis in curves:
        axis.set_xscale("log", base=2)
        axis.set_xlim(batches[0] / 1.35, batches[-1] * 1.45)
        axis.xaxis.set_major_locator(FixedLocator(powers))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(visible=True, color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
        if shown.chosen is not None:
            axis.axvline(shown.chosen.batch, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for axis in curves[:-1]:
        axis.tick_params(labelbottom=False)
    curves[-1].set_xlabel("batch of each replica (requests in flight)", color=INK)


def _draw_memory(axis: Any, memory: MemoryBar) -> None:
    """The GPU's memory as one bar: each replica with its KV cache, what is free, what is kept in reserve."""
    total = memory.total / GIB
    each, cache = memory.each / GIB, min(memory.kv_cache, memory.each) / GIB
    for number in range(memory.replicas):
        start = number * each
        axis.barh(0, each - cache, left=start, color=COLOURS[0], edgecolor="white", linewidth=1)
        axis.barh(0, cache, left=start + each - cache, color=COLOURS[5], edgecolor="white", linewidth=1)
    used, kept = memory.replicas * each, memory.reserve / GIB
    axis.barh(0, max(0.0, total - kept - used), left=used, color="#f0f0f0", edgecolor="white", linewidth=1)
    axis.barh(0, kept, left=total - kept, color="white", edgecolor=PALE, hatch="////", linewidth=0.5)
    axis.set_xlim(0, total)
    axis.set_yticks([])
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9)
    axis.set_title(
        f"memory: {memory.replicas} x {each:.1f} GiB, of it {cache:.1f} GiB KV cache each (light); "
        f"{max(0.0, total - kept - used):.1f} GiB free, {kept:.1f} GiB reserve (hatched), {total:.0f} GiB in all",
        loc="left", fontsize=9, color=INK,
    )  # fmt: skip
    axis.set_xlabel("GiB", color=INK, fontsize=9)


def _between(first: float, last: float, steps: int = 64) -> list[float]:
    """Points of a line that a logarithmic axis bends, evenly spaced on it."""
    return [first * (last / first) ** (step / steps) for step in range(steps + 1)]


# --- files ---


def _render(shown: Picture, answer: Recommendation, kind: str) -> bytes:
    import matplotlib as mpl  # noqa: PLC0415

    buffer = io.BytesIO()
    # Text stays text, and the same profile gives the same file.
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "tightship", "font.family": ["DejaVu Sans", "sans-serif"]}
    ):
        figure = draw(shown)
        if kind == "png":
            figure.savefig(buffer, format="png")
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue().decode()
    return svg.encode() if kind == "svg" else page(shown, answer, svg[svg.index("<svg") :]).encode()


def page(shown: Picture, answer: Recommendation, svg: str) -> str:
    """A page that needs nothing else: the picture, the decision in words, and every candidate."""
    told = advise.to_json(answer, explain=True)
    heads = [
        "batch",
        "replicas",
        "tokens/s",
        *(str(each) for each in answer.objectives),
        "efficiency",
        "memory each",
        "outcome",
    ]
    rows = "\n".join(_row(each) for each in told["candidates"])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in answer.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(shown.title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.7rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }}
th:last-child, td:last-child {{ text-align: left; white-space: normal; }}
tr.chosen {{ background: #fff9c4; font-weight: 600; }}
tr.rejected {{ color: #6b6b6b; }}
</style>
</head>
<body>
{svg}
<p>{html.escape(answer.message)}</p>
<ul>{notes}</ul>
<h2>Every candidate</h2>
<table>
<thead><tr>{"".join(f"<th>{html.escape(head)}</th>" for head in heads)}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def _row(candidate: Mapping[str, Any]) -> str:
    outcome, reasons = str(candidate["outcome"]), "; ".join(candidate["reasons"])
    cells = [
        str(candidate["batch"]),
        str(candidate["replicas"]),
        str(candidate["tokensPerSecond"]),
        *(str(each["value"] or "") for each in candidate["latencies"]),
        str(candidate["efficiency"] or ""),
        str(candidate["memoryPerReplica"] or ""),
        f"{outcome}: {reasons}" if reasons else outcome,
    ]
    return f'<tr class="{html.escape(outcome)}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}") from error
