"""An event loop whose seconds pass at once: it jumps to the next timer instead of waiting for it.

What must hold: a coroutine sees no difference to real time, but that nothing it computes takes any; a loop in which nobody
will ever be woken is an error at once, not a hang.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
START = 1000.0
"""The loop's first moment in seconds: not 0, so that nobody takes a time for a duration."""


class _NoWait(selectors.DefaultSelector):
    """Never sleeps: what would be waited for is added to the loop's time instead."""

    def __init__(self) -> None:
        super().__init__()
        self.time = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; else let `timeout` seconds pass."""
        ready = super().select(0)
        if not ready and timeout:
            self.time += timeout
        if not ready and timeout is None:
            raise RuntimeError("deadlock: nothing is scheduled and nobody will wake the loop")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds pass at once."""

    def __init__(self) -> None:
        self._virtual = _NoWait()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.time

    def work(self, seconds: float) -> None:
        """Let that much time pass in which the loop does nothing else: its timers run late."""
        self._virtual.time += seconds


def work(seconds: float) -> None:
    """Keep the running virtual loop busy for that many seconds."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.work(seconds)


class VirtualClock:
    """The profiler's clock, on the loop's time."""

    def now(self) -> float:
        """Seconds of the running loop."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Let that much virtual time pass; negative means none."""
        await asyncio.sleep(max(0.0, seconds))


def in_virtual_time(story: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a story to its end in virtual time.

    Raises:
        RuntimeError: the story waits for something that will never happen.
    """
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(story())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
