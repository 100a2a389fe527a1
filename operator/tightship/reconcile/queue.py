"""The work queue: which object to look at next, and nothing about what changed.

Whoever learns of something puts a key in; a worker takes it out and looks at the whole object. What must always hold:

- a key is in the queue at most once, however often it is added;
- two workers never work on one key at the same time: a key added while it is worked on comes again afterwards;
- a key that failed comes again after a delay that doubles up to a bound, and starts small again after a success;
- of several wishes to look again later the earliest wins; `add` beats them all, and a success doesn't cancel them;
- a key that rests comes when its rest is over, once, if anybody asked for it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tightship.kube.clock import Clock
from tightship.kube.errors import Conflict, KubeError, NamespaceTerminating, OutlivedOwner
from tightship.reconcile.context import Context

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Key:
    """Names one piece of work. `kind`: LLMService, BatchProfile, GPUPack, or Placement (one key: "", "cluster")."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


PLACEMENT = Key("Placement", "", "cluster")


@dataclass(frozen=True)
class Result:
    """How a reconcile ended well.

    `requeue_after`: look again in that many seconds, should nothing happen before. `rest`: not again within that many seconds, whatever
    happens: what happens meanwhile is looked at together.
    """

    requeue_after: float | None = None
    rest: float = 0.0


Reconciler = Callable[[Context, Key], Awaitable[Result]]


class Closed(Exception):
    """The queue was closed: there is no more work."""


class Queue:
    """Deduplicated keys, due now or later. For one event loop.

    `base_delay` and `max_delay` bound the wait after failures, in seconds: base, 2 base, 4 base, ... Each wait is cut by
    up to `jitter` of its length at random, so that what failed together doesn't come back together.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        base_delay: float = 0.25,
        max_delay: float = 300.0,
        jitter: float = 0.2,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self._base_delay, self._max_delay, self._jitter = base_delay, max_delay, jitter
        self._rng = rng or random.Random()
        self._ready: deque[Key] = deque()
        self._waiting: set[Key] = set()  # what _ready holds
        self._active: set[Key] = set()
        self._again: set[Key] = set()  # added while active
        self._due: dict[Key, float] = {}
        self._timers: list[tuple[float, Key]] = []  # a heap; entries that _due contradicts are stale
        self._failures: dict[Key, int] = {}
        self._resting: dict[Key, float] = {}
        self._wakeup = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """How many keys are due now and wait for a worker."""
        return len(self._ready)

    @property
    def active(self) -> int:
        """How many keys are being worked on."""
        return len(self._active)

    def add(self, key: Key) -> None:
        """Look at `key` as soon as a worker is free."""
        left = self._resting.get(key, 0.0) - self._clock.monotonic()
        if left > 0 and key not in self._active:
            self.add_after(key, left)
            return
        self._resting.pop(key, None)
        self._due.pop(key, None)
        if key in self._active:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.append(key)
            self._wakeup.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Look at `key` in that many seconds at the latest."""
        if seconds <= 0:
            self.add(key)
            return
        if key in self._waiting or key in self._again:
            return
        due = self._clock.monotonic() + seconds
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            heapq.heappush(self._timers, (due, key))
            self._wakeup.set()

    async def get(self) -> Key:
        """Take the next key, waiting for one to be due. Call `done` when finished. Raises `Closed`."""
        while not self._closed:
            pause = self._promote()
            if self._ready:
                key = self._ready.popleft()
                self._waiting.discard(key)
                self._active.add(key)
                return key
            self._wakeup.clear()
            await self._sleep(pause)
        raise Closed

    def done(
        self, key: Key, *, failed: bool = False, requeue_after: float | None = None, rest: float = 0.0
    ) -> float | None:
        """Give a key back. Returns in how many seconds it comes again at the latest, None when nothing asks for it."""
        self._active.discard(key)
        if rest > 0:
            self._resting[key] = self._clock.monotonic() + rest
        delay = requeue_after
        if failed:
            self._failures[key] = self._failures.get(key, 0) + 1
            delay = self._backoff(self._failures[key])
        else:
            self._failures.pop(key, None)
        if key in self._again:
            self._again.discard(key)
            if not failed:
                self.add(key)
                return rest
        if delay is not None:
            self.add_after(key, delay)
        return delay

    def close(self) -> None:
        """No more work is handed out; waiting workers get `Closed`."""
        self._closed = True
        self._wakeup.set()

    def _backoff(self, failures: int) -> float:
        delay = min(self._max_delay, self._base_delay * 2.0 ** min(failures - 1, 30))
        return delay * (1 - self._jitter * self._rng.random())

    def _promote(self) -> float | None:
        """Make due keys ready. Returns the seconds until the next one is, None when none waits."""
        now = self._clock.monotonic()
        while self._timers:
            due, key = self._timers[0]
            if self._due.get(key) != due:
                heapq.heappop(self._timers)
            elif due <= now:
                heapq.heappop(self._timers)
                del self._due[key]
                self.add(key)
            else:
                return due - now
        return None

    async def _sleep(self, seconds: float | None) -> None:
        """Wait for a wake-up, at most that long."""
        tasks: set[asyncio.Future[Any]] = {asyncio.ensure_future(self._wakeup.wait())}
        if seconds is not None:
            tasks.add(asyncio.ensure_future(self._clock.sleep(seconds)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()


class Workers:
    """Runs reconcilers over the queue: `count` at a time, never two on one key.

    A reconciler that raises is tried again with backoff; so is one that takes longer than `timeout` seconds, since a hung
    one would keep its object from ever being looked at again. In a namespace that is being deleted nothing is retried:
    all that is left to do there is Kubernetes' own.
    """

    def __init__(
        self, context: Context, reconcilers: Mapping[str, Reconciler], *, count: int = 4, timeout: float = 120.0
    ) -> None:
        self._context = context
        self._reconcilers = reconcilers
        self._count = count
        self._timeout = timeout

    async def run(self) -> None:
        """Work until the queue is closed. What is begun is finished first."""
        workers = [asyncio.create_task(self._work(), name=f"worker {number}") for number in range(self._count)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        with contextlib.suppress(Closed):
            while True:
                await self._one(await self._context.queue.get())

    async def _one(self, key: Key) -> None:
        queue, clock, metrics = self._context.queue, self._context.clock, self._context.metrics
        started = clock.monotonic()
        failed, result = True, Result()
        try:
            reconciler = self._reconcilers[key.kind]
            result = await asyncio.wait_for(reconciler(self._context, key), self._timeout)
            failed = False
        except NamespaceTerminating as error:
            failed = False
            log.info("%s: its namespace is being deleted: %s", key, error)
        except (Conflict, OutlivedOwner) as error:
            log.info("%s: looked at again, since the cluster changed meanwhile: %s", key, error)
        except KubeError as error:
            log.warning("%s: %s", key, error)
        except asyncio.TimeoutError:
            log.error("%s: not done after %g seconds, given up for now", key, self._timeout)
        except Exception:
            log.exception("%s: failed", key)
        finally:
            delay = queue.done(key, failed=failed, requeue_after=result.requeue_after, rest=result.rest)
        metrics.reconciled(key.kind, "error" if failed else "ok", clock.monotonic() - started)
        log.debug(
            "%s: %s, next look %s",
            key,
            "failed" if failed else "done",
            "on change" if delay is None else f"in {delay:.1f} s",
        )
