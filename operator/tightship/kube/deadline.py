"""A time limit that nothing slips past: what waits when it is over never goes on, not even where what it waited for has come meanwhile.

That is what `asyncio.timeout` does from Python 3.11 on. `asyncio.wait_for` doesn't: it runs the work in a task of its own, and of two
things that are due at once, as after a pause of the whole process, the work may be first.
"""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType


class Deadline:
    """`async with Deadline(seconds):` raises asyncio.TimeoutError out of the block; None never does."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._over = False

    async def __aenter__(self) -> Deadline:
        if self._seconds is not None:
            self._task = asyncio.current_task()
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        return self

    def _end(self) -> None:
        assert self._task is not None
        self._over = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._over:
            return
        if sys.version_info >= (3, 11) and self._task is not None:
            self._task.uncancel()
        if kind is asyncio.CancelledError:
            raise asyncio.TimeoutError from error
