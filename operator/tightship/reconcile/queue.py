"""The work queue: which object to look at next, and nothing about what changed.

Whoever learns of something puts a key in; a worker takes it out and looks at the whole object. What must always hold:

- a key is in the queue at most once, however often it is added;
- two workers never work on one key at the same time: a key added while it is worked on comes again afterwards;
- a key that failed comes again after a delay that doubles up to a bound, and starts small again after a success;
- of several wishes to look again later the earliest wins; `add` beats them all.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from tightship.kube.clock import Clock
from tightship.kube.errors import Conflict, KubeError
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
    """How a reconcile ended well. `requeue_after`: look again in that many seconds, should nothing happen before."""

    requeue_after: float | None = None


Reconciler = Callable[[Context, Key], Awaitable[Result]]


class Queue:
    """Deduplicated keys, due now or later."""

    def add(self, key: Key) -> None:
        """Look at `key` as soon as a worker is free."""
        raise NotImplementedError

    def add_after(self, key: Key, seconds: float) -> None:
        """Look at `key` in that many seconds at the latest."""
        raise NotImplementedError
