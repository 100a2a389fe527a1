"""File locks in the pack's directory, by `flock`: the kernel lets go of them however their process ends.

A lock belongs to an open file, so it is not inherited by the engine (Python opens files close-on-exec) and a killed
supervisor never leaves one behind. A holder that leaves removes the files: a lock on a file that is no longer the one of that name
excludes nobody, and is no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path


def is_held(path: Path) -> bool:
    """Whether some process holds an exclusive lock on the file; False when there is no such file.

    The test takes a shared lock for an instant, so that replicas testing at once don't take each other for the holder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def content(path: Path) -> dict[str, object]:
    """What the holder of a lock wrote into it; empty where nothing readable is there."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class FileLock:
    """An exclusive lock on one file, taken without waiting."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def try_acquire(self, text: str) -> bool:
        """Take the lock if it is free, and write `text` into the file; False when somebody else holds it.

        Raises:
            OSError: the file can't be opened; without it nothing is safe to start.
        """
        # Readable and writable by all: replicas of different users may share a pack of CPU cores.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        if not _is_at(descriptor, self.path):
            os.close(descriptor)
            return False
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, 0o666)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let go; nothing happens when it isn't held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None
