"""How hollow programs behave: time constants and what they claim to see, as one plain value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HollowSettings:
    """Times in seconds. Where a real part has the constant, the comment names it."""

    start_seconds: float = 1.0
    """From an engine's start until it is healthy."""
    attach_seconds: float = 0.2
    """From an engine's start until its first CUDA context, which makes it a client of MPS; a part of `start_seconds`."""
    daemon_seconds: float = 0.1
    """From the start of an MPS daemon until it serves."""
    fence_seconds: float = 1.5
    """From the loss of the holder's lock until a replica ends itself: two looks, as in `replica.supervisor.Pace.holder`."""
    watch_seconds: float = 1.0
    """Between two annotations that a watcher writes; a real one looks every 3 s."""
    drain_seconds: float = 0.2
    """What an engine takes to end when asked to; there are no requests in flight."""
    leave_seconds: float = 75.0
    """What clients get to leave a holder that was asked to stop, as in `node.daemon.Pace.leave`."""
    fenced_seconds: float = 45.0
    """What they get once it has let its lock go, as in `node.daemon.Pace.fenced`."""
    memory_seconds: float = 30.0
    """How long an engine's memory may still be missing at its preflight, as in `replica.supervisor.Pace.memory`."""
    driver: str = "570.124.06"
    missing_images: tuple[str, ...] = ()
    """Beginnings of image names that can't be pulled."""
    events: bool = False
    """Whether the agent writes Events about pods, as a kubelet does: a dozen requests a pod."""
