"""How far a measurement is, on a terminal: one line that is redrawn, or elsewhere a line for every change.

`render` is the line as a pure function; `ProgressBar` is where it goes. Written without a library: the measurement must not
share its cores with one. What must hold: a stream that nobody reads any more costs what is shown, and never the measurement.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Final, TextIO

from tightship.api.units import format_duration, parse_duration
from tightship.api.v1alpha1.batchprofile import Progress
from tightship.commands.output import silence

BAR: Final = 24
REDRAW_SECONDS: Final = 0.5
STAGES: Final = {
    "Starting": "starting",
    "Sweeping": "sweep",
    "Baseline": "baseline",
    "Confirming": "confirming",
    "Trying": "trials",
    "Done": "done",
}


def render(progress: Progress, elapsed: float, budget: float, columns: int | None = None) -> str:
    """One line: bar, time of the budget, stage, batch, points, words; cut to `columns`.

    `elapsed` and `budget` are seconds from the first healthy engine.
    """
    share = min(1.0, elapsed / budget)
    full = int(share * BAR)
    bar = "#" * full + "-" * (BAR - full)
    where = STAGES[progress.stage]
    if progress.batch is not None:
        where += f" batch {progress.batch}"
    if progress.replicas is not None:
        where += f" x {progress.replicas} replicas"
    points = f"{progress.points} point{'' if progress.points == 1 else 's'}"
    line = f"[{bar}] {_clock(elapsed)} of {_clock(budget)}  {where}, {points}"
    if progress.message and progress.stage != "Done":  # then it is the outcome's, and said in full
        line += f": {progress.message}"
    return line if columns is None or len(line) < columns else line[: max(1, columns - 4)] + "..."


class ProgressBar:
    """Shows progress on a stream."""

    def __init__(
        self,
        stream: TextIO,
        budget: float,
        *,
        now: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ) -> None:
        """`budget`: seconds; `now`: a monotonic clock."""
        self._stream = stream
        self._budget = budget
        self._now = now
        self._columns = columns
        self._live = stream.isatty()
        self._began = now()
        self._progress: Progress | None = None
        self._seen = 0.0
        self._drawn = False
        self._last = ""
        self._gone = False
        """Whether nobody reads the stream any more."""

    def show(self, progress: Progress) -> None:
        """Take in where the measurement is now."""
        self._progress, self._seen = progress, self._now()
        self.redraw()

    def redraw(self) -> None:
        """Draw the line anew; away from a terminal, print it when something other than the time has changed."""
        if self._progress is None:
            return
        line = render(self._progress, self._elapsed(), self._budget, self._columns() if self._live else None)
        if self._live:
            self._drawn = True
            self._write(f"\r\x1b[K{line}")
        elif (said := self._progress.model_copy(update={"elapsed": None}).model_dump_json()) != self._last:
            self._last = said
            self._write(line + "\n")

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self._write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        if self._drawn:
            self.redraw()

    def close(self) -> None:
        """Leave the last state standing, and the cursor below it."""
        if self._drawn:
            self.redraw()
            self._write("\n")
        self._progress, self._drawn = None, False

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._gone = True
            silence(self._stream)

    def _elapsed(self) -> float:
        """Seconds of the budget now: what was reported, and what has passed since, once time counts."""
        assert self._progress is not None
        reported = parse_duration(self._progress.elapsed or "0s")
        running = self._live and reported > 0 and self._progress.stage != "Done"
        return reported + (self._now() - self._seen if running else 0.0)


def _clock(seconds: float) -> str:
    return format_duration(float(round(seconds))) if seconds >= 1 else "0s"
