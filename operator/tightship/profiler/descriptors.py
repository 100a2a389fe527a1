"""How many requests this process can have in flight: each has a socket of its own, and sockets are open files.

The usual soft limit, 1,024, is less than the batch that vLLM takes by itself on a large GPU; the hard limit is what the machine allows.
Engines inherit what is set here, and raise it by themselves where it is too low for them.
"""

from __future__ import annotations

import resource
from typing import Final

WANTED: Final = 65_536
"""Open files that are enough for any packing. More is no better: some programs walk through all they might have open."""
OTHERS: Final = 256
"""Open files that are no requests: reports, and of each of up to 48 engines a pipe, a connection for its metrics and the like."""
SURPLUS: Final = 1.5
"""Requests in flight for each that an engine shall run, at the most: gaps between requests are filled with more of them
(`tightship.profiler.windows` has that bound)."""


def raise_limit() -> int:
    """Raise the soft limit of open files as far as is useful and allowed; returns the largest number of requests for engines to run at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return requests_within(WANTED if soft == resource.RLIM_INFINITY else soft)


def requests_within(limit: int) -> int:
    """Requests that engines can be made to run at once with so many open files."""
    return max(1, int((limit - OTHERS) / SURPLUS))
