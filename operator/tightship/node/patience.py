"""For how long a holder puts up with a GPU or an MPS daemon that is no good any more. Pure, but for what it is told.

A daemon that was killed is seen at once. These are the faults that no process ends of: a server that stays in FAULT because a client
doesn't leave, a daemon that doesn't answer, a GPU that has fallen off the bus. Each ends the holder's container in time, also when the
operator is down: the replicas lose the lock and stop, the kubelet starts the container anew, with its own back-off.
"""

from __future__ import annotations

from dataclasses import dataclass

from tightship.node import control

LOST_LOOKS = 2
"""Looks in a row in which nvidia-smi must miss the GPU: a driver that is busy may fail once."""


@dataclass
class Patience:
    """Seconds until a fault that lasts ends the container.

    `fault` is longer than a pod's grace period: until then the operator has all clients leave in order.
    """

    fault: float = 90.0
    silent: float = 60.0
    _since: float | None = None
    _state: control.State = "IDLE"
    _lost: int = 0

    def daemon(self, health: control.Health, now: float) -> str | None:
        """Take the daemon's health at `now` (monotonic seconds); returns the last words once it is too bad for too long."""
        state: control.State = health.state if health.state in ("FAULT", "DOWN") else "IDLE"
        if state != self._state or self._since is None:
            self._state, self._since = state, now
        lasted = now - self._since
        if state == "FAULT" and lasted >= self.fault:
            clients = ", ".join(map(str, health.clients)) or "none"
            return (
                f"MPSFault: the MPS server {health.server} has been in FAULT for {lasted:.0f} s (limit {self.fault:g} s) with "
                f"{len(health.clients)} clients that did not leave (PIDs {clients}): they are terminated and the daemon is started anew"
            )
        if state == "DOWN" and lasted >= self.silent:
            return f"MPSFault: the MPS daemon has not answered for {lasted:.0f} s (limit {self.silent:g} s) and is started anew"
        return None

    def gpu(self, missing: str | None) -> str | None:
        """Take what nvidia-smi said against the GPU (None: it is there); returns the last words once that isn't chance."""
        self._lost = self._lost + 1 if missing else 0
        if self._lost < LOST_LOOKS:
            return None
        return f"GPUNotVisible: the GPU is lost, by {self._lost} looks in a row: {missing}"
