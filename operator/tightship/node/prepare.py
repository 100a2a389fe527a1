"""The pack's directory: made for the user that daemon and replicas run as (MPS demands one user), emptied when the holder leaves.

It is memory of the node, and what engines shared through it (`shm`) would stay until a reboot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

# The shared memory is like /dev/shm, whose place it takes.
_MODES = {"": 0o755, "mps": 0o755, "mps/pipe": 0o755, "mps/log": 0o755, "shm": 0o1777}
_LAST = ("holder.lock", "start.lock")


def prepare(directory: Path, uid: int) -> None:
    """Make what is missing and give all of it to `uid`.

    Raises:
        OSError: not allowed; this runs as root.
    """
    for name, mode in _MODES.items():
        path = directory / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
        os.chown(path, uid, -1)
    # An earlier holder of this pack may have had another GPU: nobody must read its identity as this one's.
    (directory / "gpu.json").unlink(missing_ok=True)
    # Left by an earlier container of another user, they could not be opened.
    for name in _LAST:
        if (directory / name).exists():
            os.chown(directory / name, uid, -1)


def empty(directory: Path) -> None:
    """Take away everything but the directories that `prepare` makes; the caller holds both locks.

    Those stay, since the next holder of the pack may have them mounted already and wait for the lock. The locks' files go last, and the
    start lock's after the holder's: whoever then gets a start lock finds no holder, or the next one.
    """
    kept = {directory / name for name in _MODES}
    found = [each for place in kept for each in place.glob("*") if each not in kept]
    for path in sorted(found, key=lambda each: _LAST.index(each.name) if each.name in _LAST else -1):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
