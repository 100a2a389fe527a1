"""The locks a holder takes, exclusive `flock`s that the kernel lets go however their process ends: `holder.lock` while it holds the GPU, and
the replicas' `start.lock` once it leaves.

A holder that leaves removes the file, so a lock on a file that is no longer the one of that name is none.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class HolderLock:
    """One of them. `holder.lock` is held while the pack owns its GPU; replicas refuse to run when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def try_acquire(self, text: str) -> bool:
        """Take it and write `text` into the file; False while somebody else has it, or a replica is just looking."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        if not _is_at(descriptor, self._path):
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let go; nothing happens when it isn't held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
