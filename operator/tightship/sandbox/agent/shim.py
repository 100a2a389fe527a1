"""The parent of one container: builds its namespaces, starts its command, and leaves nothing of it behind.

Run as `python shim.py SPEC` by the agent, never imported by it. The shim is the subreaper of all the container's
processes: when the command ends, or the agent dies, everything it ever started is killed, as it is when a real container's
first process ends. SIGTERM goes on to the command; SIGUSR1 (the agent wants it gone) and SIGUSR2 (the agent is gone)
kill everything. On the status descriptor it writes one JSON line: `{"started": pid}` or `{"error": text}`.
Standard library only, and little of it: its start is part of every container's start.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x04000000, 0x08000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_UNBINDABLE, MS_PRIVATE = 4096, 16384, 1 << 17, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError with `what` in its text when a libc call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    data = options.encode() if options else None
    result = libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data)
    check(result, f"mount {source} on {target}")


def bind(source: str, target: str, read_only: bool) -> None:
    """Bind a tree; a read-only bind keeps the flags that the kernel locks in a user namespace."""
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def build_root(root: str, operations: list[list[str]]) -> None:
    """Carry out a plan of rootfs.py below the fresh tmpfs `root`, then make it this process's root."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tightship", root, "tmpfs", 0, "mode=755")
    mount("none", root, None, MS_UNBINDABLE)  # a bind of the directory that the root is built in leaves the root out
    for name, *arguments in operations:
        OPERATIONS[name](root, *arguments)
    os.chdir(root)
    machine = os.uname().machine
    check(libc.syscall(SYS_PIVOT_ROOT[machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    mount("none", "/", None, MS_PRIVATE)


def _make_dir(root: str, path: str) -> None:
    os.makedirs(root + path, exist_ok=True)


def _make_file(root: str, path: str) -> None:
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    if not os.path.exists(root + path):
        os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY, 0o644))


def _make_link(root: str, path: str, destination: str) -> None:
    if not os.path.lexists(root + path):
        os.symlink(destination, root + path)


def _mount_tmpfs(root: str, path: str, options: str) -> None:
    mount("tmpfs", root + path, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _bind(root: str, source: str, path: str, mode: str) -> None:
    bind(source, root + path, mode == "ro")


OPERATIONS: dict[str, Callable[..., None]] = {
    "dir": _make_dir,
    "file": _make_file,
    "link": _make_link,
    "tmpfs": _mount_tmpfs,
    "bind": _bind,
}


def enter(spec: dict[str, Any]) -> None:
    """Join the pod's network, take namespaces of our own, and build the root."""
    if spec["netns"] is not None:
        check(libc.setns(spec["netns"], CLONE_NEWNET), "setns")
        os.close(spec["netns"])
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC), "unshare")
    hostname = spec["hostname"].encode()
    check(libc.sethostname(hostname, len(hostname)), "sethostname")
    build_root(spec["root"], spec["operations"])


def execute(spec: dict[str, Any], failure: int) -> None:
    """In the child: become the container's command. Returns never; a failure's text goes down `failure`."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if spec["cpus"]:
            os.sched_setaffinity(0, spec["cpus"])
        os.chdir(spec["cwd"])
        os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
    except OSError as error:
        os.write(failure, f"exec {spec['argv'][0]!r}: {error.strerror} ({error.filename or spec['cwd']})".encode())
    finally:
        os._exit(128)


def start(spec: dict[str, Any]) -> int:
    """Fork the command and wait until it has been executed.

    Raises:
        OSError: it could not be.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        execute(spec, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        error = pipe.read()
    if error:
        raise OSError(error)
    return pid


def children() -> list[int]:
    """Processes whose parent is the shim, orphans of the container included."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def kill_everything(*_: object) -> None:
    """Kill every child; grandchildren come to us as their parents die, and the reaping loop gets those."""
    for pid in children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def reap(main: int) -> int:
    """Wait for the command, then for all it left behind; returns the command's exit code (128 + signal when killed)."""
    code = 255
    ended = False
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == main:
            code = os.waitstatus_to_exitcode(status)
            ended = True
        if ended:
            kill_everything()


def main() -> int:
    """Read the spec, run the container, report and return its exit code."""
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    status = spec["status"]
    os.set_inheritable(status, False)
    stop = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.getppid() != spec["parent"]:
        return 137
    try:
        enter(spec)
        main_pid = start(spec)
    except (OSError, KeyError) as error:
        os.write(status, json.dumps({"error": str(error)}).encode() + b"\n")
        return 128

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(main_pid, number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGUSR1, kill_everything)
    signal.signal(signal.SIGUSR2, kill_everything)
    os.write(status, json.dumps({"started": main_pid}).encode() + b"\n")
    os.close(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)
    code = reap(main_pid)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
