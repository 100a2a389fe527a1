"""A GPU that isn't there: memory that can run out and time that must be queued for.

Memory is a ledger of owners: an allocation beyond what is free fails, and an owner that goes gives everything back.

Time is one server with a first-come-first-served queue. A step of an engine has a host part, during which the engine
doesn't need the GPU, and a GPU part, which the server works off; its length is drawn from an exponential distribution
around the given mean. With a host part of any distribution this is the closed queueing network that mean value analysis
solves (think time Z, one server with demand D), which is why packed engines slow each other down by as much as published
measurements say. A deterministic service time would let engines slot into each other's gaps and be some 15 % too good.
That holds in company only: an owner that has the GPU to itself takes the mean, since published single replicas leave room
for no more (OPT-1.3B, 390 tokens out, batch 16: median inter-token latency 4.89 ms, mean 5.03; drawn, the median were 4.1).

The model does not tell processes under MPS from processes that time-slice: both queue. Nothing here reads a clock; every
call is given the time in seconds, and times of one GPU must come from one clock.

Invariants: the sum of allocations never exceeds the total; service intervals never overlap and never start before the
request was ready.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

# NVML's utilisation counters look back over a window of between 1/6 s and 1 s, depending on the product.
UTILIZATION_WINDOW = 1.0


class OutOfMemoryError(Exception):
    """An allocation asked for more than is free. All figures in bytes."""

    def __init__(self, requested: int, free: int, total: int) -> None:
        super().__init__(f"{requested} bytes requested, {free} of {total} bytes free")
        self.requested = requested
        self.free = free
        self.total = total


@dataclass
class Memory:
    """Device memory in bytes, with the owner of every byte."""

    total: int
    _owned: dict[Hashable, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Bytes allocated by all owners together."""
        return sum(self._owned.values())

    @property
    def free(self) -> int:
        """Bytes that the next allocation may take."""
        return self.total - self.used

    def owned(self, owner: Hashable) -> int:
        """Bytes that one owner has."""
        return self._owned.get(owner, 0)

    def allocate(self, owner: Hashable, amount: int) -> None:
        """Give `amount` bytes to `owner`.

        Raises:
            OutOfMemoryError: less than that is free; nothing was allocated.
            ValueError: a negative amount.
        """
        if amount < 0:
            raise ValueError(f"an allocation can't be negative: {amount} bytes")
        if amount > self.free:
            raise OutOfMemoryError(amount, self.free, self.total)
        self._owned[owner] = self.owned(owner) + amount

    def release(self, owner: Hashable, amount: int | None = None) -> None:
        """Take `amount` bytes back from `owner`, or all it has.

        Raises:
            ValueError: the owner has less than that.
        """
        owned = self.owned(owner)
        amount = owned if amount is None else amount
        if not 0 <= amount <= owned:
            raise ValueError(f"can't release {amount} of {owned} bytes")
        if amount == owned:
            self._owned.pop(owner, None)
        else:
            self._owned[owner] = owned - amount


@dataclass(frozen=True)
class Utilization:
    """Shares of the last window, 0 to 1: time a kernel ran, and time memory was read or written."""

    gpu: float
    memory: float


@dataclass
class Gpu:
    """One simulated GPU: identity, memory, and the queue for its time."""

    uuid: str
    product: str
    memory: Memory
    node: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._free_at = 0.0
        self._busy = 0.0
        # Recent idle intervals (start, end), oldest first.
        self._idle: deque[tuple[float, float]] = deque()
        # When each owner's last GPU part was ready, for as long as that makes it company.
        self._seen: dict[Hashable, float] = {}
        # (start, end, share of the interval in which memory was busy) of recent services, about oldest first.
        self._recent: deque[tuple[float, float, float]] = deque()

    @property
    def busy(self) -> float:
        """Seconds of service given since the start, booked ahead included."""
        return self._busy

    def serve(self, ready: float, mean: float, memory_share: float = 0.0, owner: Hashable = None) -> float:
        """Queue one GPU part that is ready at `ready` and takes `mean` seconds on average; return when it ends.

        Requests should come in the order in which they become ready. One that comes late, behind others that were
        ready after it, can't be put before them any more, but gets what time they left idle since it was ready: on a
        busy machine messages are late, and the GPU must not be slower for it.
        `memory_share` is the part of its time in which memory is busy; `owner` whose work it is: alone, it takes the mean.
        """
        service = 0.0 if mean <= 0 else mean if self._alone(owner, ready) else self._random.expovariate(1.0 / mean)
        self._busy += service
        self._forget(ready - 2 * UTILIZATION_WINDOW)
        end, left = self._backfill(ready, service, memory_share) if ready < self._free_at else (ready, service)
        if left > 0:
            if ready > self._free_at:
                self._idle.append((self._free_at, ready))
            start = max(ready, self._free_at)
            self._free_at = end = start + left
            self._recent.append((start, end, memory_share))
        return end

    def utilization(self, now: float, window: float = UTILIZATION_WINDOW) -> Utilization:
        """Return the shares of the last `window` seconds before `now`."""
        busy = memory = 0.0
        for start, end, share in self._recent:
            overlap = max(0.0, min(end, now) - max(start, now - window))
            busy += overlap
            memory += overlap * share
        return Utilization(gpu=busy / window, memory=memory / window)

    def _alone(self, owner: Hashable, ready: float) -> bool:
        """Whether nobody else has had the GPU in the last second; never for work that is nobody's."""
        if owner is None:
            return False
        self._seen[owner] = ready
        if len(self._seen) == 1:
            return True
        self._seen = {one: last for one, last in self._seen.items() if ready - last <= UTILIZATION_WINDOW}
        return len(self._seen) == 1

    def _backfill(self, ready: float, service: float, memory_share: float) -> tuple[float, float]:
        """Use idle time since `ready`; return when the last of it ended, and the seconds of service still to do."""
        end, left = ready, service
        if not self._idle or self._idle[-1][1] <= ready:
            return end, left
        idle: deque[tuple[float, float]] = deque()
        for start, stop in self._idle:
            begin = max(start, ready)
            used = min(left, stop - begin)
            if used <= 0:
                idle.append((start, stop))
                continue
            end, left = begin + used, left - used
            self._recent.append((begin, end, memory_share))
            idle.extend(piece for piece in ((start, begin), (end, stop)) if piece[0] < piece[1])
        self._idle = idle
        return end, left

    def _forget(self, before: float) -> None:
        while self._idle and self._idle[0][1] < before:
            self._idle.popleft()
        while self._recent and self._recent[0][1] < before:
            self._recent.popleft()
