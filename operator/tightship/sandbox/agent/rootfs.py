"""What a container sees at `/`: a plan of mounts, computed before anything is mounted.

The container's root is a tmpfs. Each directory of the machine's root that no pod mount goes into is bound as a whole; a
directory whose mount points are all there already is bound, and they are bound over it; only where a mount point is
missing is the directory rebuilt in the tmpfs, entry by entry. So any `mountPath` works, and no mount point is ever
created on the machine's own file system. `/run` and `/dev` are always the container's own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}


@dataclass(frozen=True)
class Mount:
    """`source` (None: a fresh tmpfs) is seen at the absolute path `target`."""

    target: str
    source: str | None
    read_only: bool = False
    is_file: bool = False
    size: int | None = None


@dataclass
class _Point:
    mount: Mount | None = None
    children: dict[str, _Point] = field(default_factory=dict)


def base_mounts() -> list[Mount]:
    """The mounts every container has before its pod's own; a pod's mount of the same target replaces one."""
    mounts = [Mount("/run", None), Mount("/dev", None), Mount("/dev/shm", None)]
    mounts += [
        Mount(f"/dev/{name}", f"/dev/{name}", is_file=True) for name in DEVICES if os.path.exists(f"/dev/{name}")
    ]
    if os.path.isdir("/dev/pts"):
        mounts.append(Mount("/dev/pts", "/dev/pts"))
    return mounts


def plan(mounts: Iterable[Mount]) -> list[list[str]]:
    """Order the operations that build the root; paths are absolute as the container will see them.

    Operations: `["dir", path]`, `["file", path]`, `["link", path, destination]`, `["tmpfs", path, options]`,
    `["bind", source, path, "ro" or "rw"]`.
    """
    root = _Point()
    for mount in mounts:
        point = root
        for part in Path(os.path.realpath(mount.target)).parts[1:]:
            point = point.children.setdefault(part, _Point())
        point.mount = mount
    operations: list[list[str]] = []
    _rebuild("/", root, operations)
    operations += [["link", f"/dev/{name}", target] for name, target in DEVICE_LINKS.items()]
    return operations


def _rebuild(path: str, point: _Point, out: list[list[str]]) -> None:
    """Make the directory of the machine anew, entry by entry, with the pod's mount points among them."""
    for entry in sorted(os.scandir(path), key=lambda item: item.name):
        if entry.name in point.children:
            continue
        if entry.is_symlink():
            out.append(["link", entry.path, os.readlink(entry.path)])
        elif entry.is_dir(follow_symlinks=False):
            out.append(["dir", entry.path])
            out.append(["bind", entry.path, entry.path, "rw"])
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            out.append(["file", entry.path])
            out.append(["bind", entry.path, entry.path, "rw"])
    for name, child in sorted(point.children.items()):
        _place(os.path.join(path, name), child, out, bound=False)


def _place(path: str, point: _Point, out: list[list[str]], bound: bool) -> None:
    """Put one mount point and what lies below it; `bound`: the parent is a mount, so the path may not be rebuilt."""
    if point.mount is not None:
        out.append(["file" if point.mount.is_file else "dir", path])
        out.append(_operation(path, point.mount))
        for name, child in sorted(point.children.items()):
            _place(os.path.join(path, name), child, out, bound=True)
    elif bound or not os.path.isdir(path):
        out.append(["dir", path])
        for name, child in sorted(point.children.items()):
            _place(os.path.join(path, name), child, out, bound)
    elif _all_exist(path, point):
        out.append(["dir", path])
        out.append(["bind", path, path, "rw"])
        for name, child in sorted(point.children.items()):
            _place(os.path.join(path, name), child, out, bound=True)
    else:
        out.append(["dir", path])
        _rebuild(path, point, out)


def _operation(path: str, mount: Mount) -> list[str]:
    if mount.source is None:
        return ["tmpfs", path, "mode=1777" + (f",size={mount.size}" if mount.size else "")]
    return ["bind", mount.source, path, "ro" if mount.read_only else "rw"]


def _all_exist(path: str, point: _Point) -> bool:
    for name, child in point.children.items():
        inner = os.path.join(path, name)
        wanted = os.path.isfile if child.mount is not None and child.mount.is_file else os.path.isdir
        if os.path.islink(inner) or not wanted(inner):
            return False
        if child.mount is None and not _all_exist(inner, child):
            return False
    return True
