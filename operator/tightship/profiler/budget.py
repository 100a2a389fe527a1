"""The budget: wall time over all attempts, in each from the first healthy engine, how it is shared out, and what it was spent on.

The first start of an attempt (with fetching image and model) is free, in whatever phase it falls; all after it counts, restarts
included. Each phase leaves to those after it what they need at the least, so that a short budget still ends with a curve, a replica's
memory and a packing trial, and not with a curve alone; what can't be done in the budget anyway (packing trials whose engines would not
even start) gets nothing kept. What a phase doesn't use goes to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, Final, Literal, TypeVar, get_args

from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler import points
from tightship.profiler.clock import Clock

LEVEL_MOST: Final = 20.0
CONFIRM_LEAST: Final = 5.0
"""Below this a confirmation run is not even begun, seconds beyond its engine's start."""
CONFIRM_SHARE: Final = 0.5
ARRIVALS_SECONDS: Final = 30.0
ARRIVALS_LEAST: Final = 10.0
ARRIVALS_SHARE: Final = 0.11
BASELINE_SECONDS: Final = 20.0
BASELINE_LEAST: Final = 9.0
BASELINE_SHARE: Final = 0.1
TRIALS_SHARE: Final = 0.2
TRIALS_SHARE_MOST: Final = 0.3
TRIAL_SECONDS: Final = 8.0
"""One packing trial beside the starts of its two engines."""

_LEAST_WAIT: Final = 0.001

Phase = Literal["starts", "sweep", "baseline", "confirmation", "trials"]
T = TypeVar("T")


class Budget:
    """Seconds of device time, spent and left."""

    def __init__(self, seconds: float, spent: float, clock: Clock, *, packing: bool = True) -> None:
        """`spent`: what earlier attempts used; `packing`: whether packing trials may follow."""
        self.seconds = seconds
        self._before = spent
        self._clock = clock
        self._packing = packing
        self._since: float | None = None
        self._start_cost = 0.0

    def engine_healthy(self, took: float) -> None:
        """An engine became healthy `took` seconds after its start: from the first on, time counts."""
        self._start_cost = max(self._start_cost, took)
        if self._since is None:
            self._since = self._clock.now()

    async def bound(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. While no engine of this attempt has been healthy it has all the time it takes: time doesn't count.

        Raises:
            asyncio.TimeoutError: the budget was spent first; the work was cancelled.
        """
        task = asyncio.get_running_loop().create_task(work)
        try:
            while True:
                counts = self._since is not None
                await asyncio.wait({task}, timeout=max(_LEAST_WAIT if counts else 1.0, self.left))
                if task.done():
                    return task.result()
                if counts and self.left <= 0:
                    raise asyncio.TimeoutError
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def spent(self) -> float:
        """Device seconds used, over all attempts."""
        return self._before + self.spent_now

    @property
    def spent_now(self) -> float:
        """Device seconds that this attempt used."""
        return 0.0 if self._since is None else self._clock.now() - self._since

    @property
    def left(self) -> float:
        """Seconds until the cap."""
        return self.seconds - self.spent

    @property
    def start_cost(self) -> float:
        """Seconds that starting an engine takes: the longest start so far."""
        return self._start_cost

    @property
    def for_sweep(self) -> float:
        """Seconds the sweep may still take."""
        return self.for_baseline - self._kept_for_baseline

    @property
    def for_baseline(self) -> float:
        """Seconds the baseline may take: what the confirmation run and the trials don't need."""
        return self.left - self._kept_for_confirmation - self._kept_for_arrivals - self._kept_for_trials

    @property
    def for_arrivals(self) -> float:
        """Seconds that requests may arrive at random: at most 30, and 0 where there is no time for at least 10."""
        seconds = min(ARRIVALS_SECONDS, self.left - self._kept_for_trials)
        return seconds if seconds >= ARRIVALS_LEAST else 0.0

    @property
    def for_trials(self) -> float:
        """Seconds for packing trials: all that is left."""
        return self.left

    def for_level(self, levels: int, most: float = LEVEL_MOST) -> float:
        """Seconds for one level: an even share of the sweep's time over the levels still possible, at most `most`."""
        return min(most, self.for_sweep / max(1, levels))

    @property
    def _kept_for_baseline(self) -> float:
        return _share(self.seconds, BASELINE_SHARE, BASELINE_LEAST, BASELINE_SECONDS)

    @property
    def _kept_for_confirmation(self) -> float:
        """An engine start, the worst step and one level."""
        return min(self._start_cost + min(12.0 + 0.02 * self.seconds, 40.0), CONFIRM_SHARE * self.seconds)

    @property
    def _kept_for_arrivals(self) -> float:
        return _share(self.seconds, ARRIVALS_SHARE, ARRIVALS_LEAST, ARRIVALS_SECONDS)

    @property
    def _kept_for_trials(self) -> float:
        least = 2 * self._start_cost + TRIAL_SECONDS
        if not self._packing or least > TRIALS_SHARE_MOST * self.seconds:
            return 0.0
        return max(least, TRIALS_SHARE * self.seconds)


class Cost:
    """Device seconds by what they were spent on, over all attempts.

    Time belongs to the innermost phase that is entered: an engine that starts within the confirmation run is a start.
    """

    def __init__(self, earlier: api.Cost | None, clock: Clock) -> None:
        self._clock = clock
        earlier = earlier or api.Cost()
        self._seconds: dict[Phase, float] = {phase: float(getattr(earlier, phase) or 0) for phase in get_args(Phase)}
        self._entered: list[Phase] = []
        self._mark = clock.now()

    @contextlib.contextmanager
    def in_phase(self, phase: Phase) -> Iterator[None]:
        """Count the time until this is left as spent on `phase`."""
        self._settle()
        self._entered.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._entered.pop()

    def seconds(self, phase: Phase) -> float:
        """Seconds spent on a phase up to now."""
        self._settle()
        return self._seconds[phase]

    def report(self) -> api.Cost:
        """What was spent up to now, as it is reported."""
        self._settle()
        return api.Cost(**{phase: points.decimal(round(took, 1), digits=1) for phase, took in self._seconds.items()})

    def _settle(self) -> None:
        now = self._clock.now()
        if self._entered:
            self._seconds[self._entered[-1]] += now - self._mark
        self._mark = now


def _share(whole: float, share: float, least: float, most: float) -> float:
    """A share of the whole, at most `most`; nothing where that is too little to serve."""
    part = min(share * whole, most)
    return part if part >= least else 0.0
