"""What CUDA's MPS does on this machine, beside what Tightship relies on: `python scripts/check_mps.py [-o FILE]`.

Needs an NVIDIA GPU that nobody else uses, its driver (libcuda, `nvidia-smi`, `nvidia-cuda-mps-control`) and root; no CUDA toolkit,
no PyTorch. A real holder (`tightship node mps`) runs the daemon; clients are processes of this script that talk to the CUDA driver
themselves, in namespaces as a pod's containers have them. Each check prints what is relied on, whether it holds, and what was seen;
the exit status is 1 when something doesn't hold. It lasts about half a minute, and kills clients, server and daemon on purpose.
Nothing of the GPU's settings is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "operator"))

from tightship.node import control  # noqa: E402 (the checkout's own)
from tightship.replica.cuda_probe import format_uuid  # noqa: E402

MPS_ENABLED = 133
GIB = 1 << 30
USER = 65532
PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry spin(.param .u64 rounds, .param .u64 at) {
  .reg .u64 %n, %x, %a; .reg .pred %p;
  ld.param.u64 %n, [rounds]; ld.param.u64 %a, [at]; mov.u64 %x, 1;
L: mad.lo.u64 %x, %x, 6364136223846793005, 1442695040888963407;
  sub.u64 %n, %n, 1; setp.ne.u64 %p, %n, 0; @%p bra L;
  st.global.u64 [%a], %x; ret;
}
.visible .entry poke(.param .u64 at) {
  .reg .u64 %a; .reg .u32 %v;
  ld.param.u64 %a, [at]; mov.u32 %v, 1; st.global.u32 [%a], %v; ret;
}
"""


# --- a client: a process that answers commands, one JSON line each ---


def client() -> int:
    """Make a context, say what is seen, then do as told."""
    driver = ctypes.CDLL("libcuda.so.1")
    results: list[int] = []

    def call(name: str, *arguments: Any) -> int:
        results.append(getattr(driver, name)(*arguments))
        return results[-1]

    def say(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    began = time.monotonic()
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    identity, enabled = (ctypes.c_ubyte * 16)(), ctypes.c_int(-1)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGetCount", (ctypes.byref(count),)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetUuid", (ctypes.byref(identity), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(enabled), MPS_ENABLED, device)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuCtxSetCurrent", (context,)),
        ("cuMemGetInfo_v2", (ctypes.byref(free), ctypes.byref(total))),
    ):
        if call(name, *arguments):
            say(error=results[-1], at=name, count=count.value, mps=enabled.value, seconds=time.monotonic() - began)
            return 1
    seen = {"count": count.value, "uuid": format_uuid(bytes(identity)), "mps": enabled.value}
    say(**seen, free=free.value, total=total.value, pid=os.getpid(), seconds=round(time.monotonic() - began, 2))
    module, spin, poke, cell = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    call("cuModuleLoadData", ctypes.byref(module), PTX)
    call("cuModuleGetFunction", ctypes.byref(spin), module, b"spin")
    call("cuModuleGetFunction", ctypes.byref(poke), module, b"poke")
    call("cuMemAlloc_v2", ctypes.byref(cell), ctypes.c_size_t(1024))

    def launch(function: ctypes.c_void_p, *values: int) -> int:
        cells = [ctypes.c_uint64(value) for value in values]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(one) for one in cells))
        return call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, pointers, None)

    for line in sys.stdin:
        word, *values = line.split()
        began = time.monotonic()
        if word == "spin":
            say(result=launch(spin, int(values[0]), cell.value))
        elif word == "sync":
            say(result=call("cuCtxSynchronize"), seconds=round(time.monotonic() - began, 3))
        elif word == "poke":
            launch(poke, 8)
            say(result=call("cuCtxSynchronize"))
        elif word == "alloc":
            pointer = ctypes.c_uint64()
            say(result=call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(int(values[0]))))
        elif word == "memory":
            result = call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            say(result=result, free=free.value, total=total.value)
    return 0


class Gone(Exception):
    """A client that ended or says nothing; the text tells which."""


class Client:
    """A client process as the checks see it."""

    def __init__(self, env: Mapping[str, str], *, prefix: Sequence[str] = (), user: int | None = None) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(env["TIGHTSHIP_CHECK"]) / "scripts" / Path(__file__).name), "--client"],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            start_new_session=True,
            bufsize=0,
        )
        self._rest = b""

    def hear(self, timeout: float = 30.0) -> dict[str, Any]:
        """The next line. Raises Gone."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Gone(f"no word for {timeout:g} s")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise Gone(f"ended with {self.process.wait()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, command: str, timeout: float = 30.0) -> dict[str, Any]:
        """The answer to one command. Raises Gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command.encode() + b"\n")
        except OSError as error:
            raise Gone(f"ended with {self.process.wait()}: {error}") from error
        return self.hear(timeout)

    def try_ask(self, command: str, timeout: float = 30.0) -> dict[str, Any] | str:
        """The answer, or in words why there is none."""
        try:
            return self.ask(command, timeout)
        except Gone as gone:
            return str(gone)

    def end(self) -> None:
        """Let it leave in order, or kill it after 5 s."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# --- the checks ---


@dataclass
class Check:
    """One thing relied on. `holds` is None where nothing is relied on and it is only good to know."""

    name: str
    relied_on: str
    holds: bool | None = None
    seen: Any = None


@dataclass
class Bench:
    """A pack's directory with a real holder, and the checks made so far."""

    home: Path
    checks: list[Check] = field(default_factory=list)
    holder: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """A client's environment, as a replica's."""
        places = {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.home / "mps/pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(self.home / "mps/log"),
        }
        return {**os.environ, **places}

    def note(self, name: str, relied_on: str, holds: bool | None, seen: Any) -> None:
        """Record and print a check."""
        self.checks.append(Check(name, relied_on, holds, seen))
        verdict = {True: "holds", False: "DIFFERS", None: "seen"}[holds]
        print(f"{verdict:8}{name}: {relied_on}\n        {json.dumps(seen)}", flush=True)

    def start_holder(self) -> float:
        """Start `tightship node mps`; returns the seconds until its daemon answered."""
        began = time.monotonic()
        code = "import sys; from pathlib import Path; from tightship.node import daemon; sys.exit(daemon.run(Path(sys.argv[1])))"
        command = [sys.executable, "-c", code, str(self.home)]
        env = {**self.env, "TIGHTSHIP_PACK_UID": "check", "TIGHTSHIP_TERMINATION_MESSAGE": str(self.home / "words")}
        self.holder = subprocess.Popen(command, env=env, start_new_session=True)
        while time.monotonic() < began + 30 and self.holder.poll() is None:
            if self.health().state != "DOWN":
                break
            time.sleep(0.1)
        return round(time.monotonic() - began, 2)

    def health(self) -> control.Health:
        """As the watcher sees it."""
        return control.health()

    def raw(self, command: str) -> str:
        """What the daemon prints, or how it fails to."""
        try:
            return control.ask(command)
        except control.ControlError as error:
            return f"error: {error}"

    @contextlib.contextmanager
    def clients(self, count: int, **how: Any) -> Iterator[list[Client]]:
        """Clients that are attached, for the length of a block."""
        made = [Client(self.env, **how) for _ in range(count)]
        try:
            for one in made:
                one.hear()
            yield made
        finally:
            for one in made:
                one.end()


def processes(*, parent: int | None = None, name: str | None = None) -> list[int]:
    """PIDs of a process's children, or of those whose name (its first 15 letters) is as given; ended ones left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                head, _, tail = (entry / "stat").read_text().rpartition(")")
                state, above = tail.split()[:2]
                fits = int(above) == parent if parent is not None else head.partition("(")[2] == name
                found += [int(entry.name)] if fits and state != "Z" else []
    return sorted(found)


def used() -> int:
    """Used memory of the GPU in MiB, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def first_word(env: Mapping[str, str], timeout: float = 20.0, **how: Any) -> dict[str, Any] | str:
    """What a new client says first; it leaves afterwards."""
    one = Client(env, **how)
    try:
        return one.hear(timeout)
    except Gone as gone:
        return str(gone)
    finally:
        one.end()


def attached(word: dict[str, Any] | str) -> bool:
    """Whether a client has a context that goes through MPS."""
    return isinstance(word, dict) and word.get("mps") == 1 and "error" not in word


def check_start(bench: Bench) -> None:
    """Identity, lock, daemon, and what it says before there is a client."""
    seconds = bench.start_holder()
    identity = json.loads((bench.home / "gpu.json").read_text())
    bench.note("identity", "nvidia-smi tells UUID, product, memory and driver", bool(identity["uuid"]), identity)
    health = bench.health()
    bench.note(
        "daemon",
        "answers before it has a client, and lists no server",
        health.state == "IDLE",
        [asdict(health), seconds],
    )
    bench.note("answers, idle", "raw", None, {word: bench.raw(word) for word in ("get_server_list", "ps")})


def check_clients(bench: Bench) -> None:
    """Attachment, PIDs, memory of contexts, and how answers look."""
    before = used()
    alone = first_word({**os.environ, "CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"})
    bench.note("no pipe directory", "no error: the process runs without MPS, and the attribute says so",
               isinstance(alone, dict) and alone.get("mps") == 0 and "error" not in alone, alone)  # fmt: skip
    one = Client(bench.env)
    word = one.hear()
    first = used()
    two = Client(bench.env)
    two.hear()
    second = used()
    identity = json.loads((bench.home / "gpu.json").read_text())
    bench.note("client", "attaches, sees one device, MPS on, the UUID of nvidia-smi",
               attached(word) and word["count"] == 1 and word["uuid"] == identity["uuid"], word)  # fmt: skip
    health = bench.health()
    pids = sorted((one.process.pid, two.process.pid))
    bench.note(
        "ps",
        "lists exactly the clients' PIDs",
        list(health.clients) == pids and health.state == "ACTIVE",
        [asdict(health), pids],
    )
    words = {
        word: bench.raw(word)
        for word in ("get_server_list", f"get_server_status {health.server}", "ps", f"get_client_list {health.server}")
    }
    bench.note("answers, two clients", "raw", None, words)
    bench.note("memory of contexts", "MiB used: before, after one client, after two", None, [before, first, second])
    one.end()
    two.end()
    time.sleep(1)
    bench.note(
        "after the last client",
        "the server stays, no client is listed",
        bench.health().clients == (),
        [asdict(bench.health()), used()],
    )


def check_devices(bench: Bench) -> None:
    """CUDA_VISIBLE_DEVICES of a client."""
    uuid = json.loads((bench.home / "gpu.json").read_text())["uuid"]
    words = {}
    for value in ("0", uuid, "1"):
        words[value] = first_word({**bench.env, "CUDA_VISIBLE_DEVICES": value})
    bench.note("CUDA_VISIBLE_DEVICES=0", "is the daemon's GPU", attached(words["0"]), words["0"])
    bench.note("CUDA_VISIBLE_DEVICES=<uuid>", "good to know", None, words[uuid])
    bench.note("CUDA_VISIBLE_DEVICES=1", "no device", not attached(words["1"]), words["1"])


def check_namespaces(bench: Bench) -> None:
    """Clients in namespaces as containers have them."""
    pod = ["unshare", "--net", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
    one = Client(bench.env, prefix=pod)
    try:
        word: Any = one.hear()
        health = bench.health()
        children = processes(parent=one.process.pid)
        seen = {"word": word, "listed": health.clients, "PID here": children}
        holds = attached(word) and list(health.clients) == children
    except Gone as gone:
        seen, holds = {"word": str(gone)}, False
    finally:
        one.kill()
    bench.note(
        "namespaces",
        "a client in net, ipc and pid namespaces of its own attaches; ps lists its PID outside",
        holds,
        seen,
    )
    shell = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    own = first_word(bench.env, prefix=["unshare", "--mount", "--ipc", "sh", "-c", shell, "sh"])
    bench.note("a /dev/shm of its own", "good to know: does a client need the daemon's /dev/shm?", None, own)


def check_users(bench: Bench) -> None:
    """A client that runs as another user than the daemon."""
    for directory in (bench.home, bench.home / "mps", bench.home / "mps/pipe"):
        directory.chmod(0o755)
    word = first_word(bench.env, timeout=15.0, user=USER)
    bench.note("another user", "good to know: is it served?", None, [word, asdict(bench.health())])
    time.sleep(1)
    bench.note(
        "after another user",
        "the daemon's own user attaches again",
        attached(first_word(bench.env)),
        asdict(bench.health()),
    )


def check_concurrency(bench: Bench) -> None:
    """Two clients compute at once under MPS, and take turns without."""
    seconds: dict[str, list[float]] = {}
    for name, env in (("MPS", bench.env), ("no MPS", {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"})):
        pair = [Client(env), Client(env)]
        for one in pair:
            one.hear()
            one.ask("spin 1000")
            one.ask("sync")
        rounds = 100_000_000
        pair[0].ask(f"spin {rounds}")
        alone = pair[0].ask("sync", 60)["seconds"]
        began = time.monotonic()
        for one in pair:
            one.ask(f"spin {rounds}")
        for one in pair:
            one.ask("sync", 60)
        seconds[name] = [alone, round(time.monotonic() - began, 3)]
        for one in pair:
            one.end()
    ratio = {name: round(together / alone, 2) for name, (alone, together) in seconds.items()}
    bench.note("kernels of two clients", "run at once under MPS (1 x the time alone), in turns without (2 x)",
               ratio["MPS"] < 1.2 and ratio["no MPS"] > 1.6, [ratio, seconds])  # fmt: skip


def check_limit(bench: Bench) -> None:
    """What CUDA_MPS_PINNED_DEVICE_MEM_LIMIT does to memory as a client sees it."""
    one = Client({**bench.env, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=8G"})
    try:
        word: Any = one.hear()
        answers = [one.try_ask(f"alloc {amount * GIB}") for amount in (6, 4)]
        seen = {
            "total GiB": round(word["total"] / GIB, 2),
            "free GiB": round(word["free"] / GIB, 2),
            "6 GiB, then 4 GiB": answers,
        }
        refused = isinstance(answers[1], dict) and answers[1]["result"] == 2
        bench.note(
            "memory limit of 8 GiB", "refuses what exceeds it; is `total` the limit's or the GPU's?", refused, seen
        )
    except Gone as gone:
        bench.note("memory limit of 8 GiB", "refuses what exceeds it", False, str(gone))
    finally:
        one.end()


def check_kills(bench: Bench) -> None:
    """A client that is killed, or terminated by the daemon, with work in flight."""
    with bench.clients(2) as (one, two):
        two.ask("spin 400000000")
        one.ask("spin 50000000")
        two.kill()
        began = time.monotonic()
        answer = one.try_ask("sync", 30)
        time.sleep(0.5)
        seen = [answer, round(time.monotonic() - began, 2), asdict(bench.health())]
        bench.note(
            "SIGKILL with work in flight", "good to know: does the other client go on? Nothing relies on it", None, seen
        )
    with bench.clients(2) as (one, two):
        server = bench.health().server
        two.ask("spin 400000000")
        one.ask("spin 50000000")
        began = time.monotonic()
        said = bench.raw(f"terminate_client {server} {two.process.pid}")
        took = round(time.monotonic() - began, 2)
        answers = [one.try_ask("sync", 30), two.try_ask("sync", 30)]
        time.sleep(0.5)
        told: dict[str, Any] = {
            "said": said,
            "seconds": took,
            "the other, itself": answers,
            "health": asdict(bench.health()),
        }
        holds = isinstance(answers[0], dict) and answers[0]["result"] == 0
        bench.note("terminate_client", "the other client goes on", holds, told)
        two.kill()


def check_fault(bench: Bench) -> None:
    """A fatal fault of one client."""
    one, two = Client(bench.env), Client(bench.env)
    for each in (one, two):
        each.hear()
    server = bench.health().server
    one.ask("spin 100000000")
    seen: dict[str, Any] = {"who faults": two.try_ask("poke", 30), "the other": one.try_ask("sync", 30)}
    seen["status"] = bench.raw(f"get_server_status {server}")
    seen["health"] = asdict(bench.health())
    both = not (isinstance(seen["the other"], dict) and seen["the other"]["result"] == 0)
    bench.note(
        "a client's fault",
        "takes the other client with it, and the server says FAULT",
        both and seen["health"]["state"] == "FAULT",
        seen,
    )
    word = first_word(bench.env, timeout=15.0)
    bench.note("a new client meanwhile", "is not served before the old ones have left", not attached(word), word)
    two.end()
    one.end()
    began = time.monotonic()
    while bench.health().state == "FAULT" and time.monotonic() < began + 20:
        time.sleep(0.2)
    took = round(time.monotonic() - began, 2)
    word = first_word(bench.env)
    bench.note(
        "after the old ones have left",
        "the server recovers, and a new client attaches",
        attached(word),
        [took, word, asdict(bench.health())],
    )


def check_server_killed(bench: Bench) -> None:
    """The server dies, the daemon lives."""
    with bench.clients(1) as (one,):
        server = bench.health().server
        assert server is not None
        one.ask("spin 100000000")
        os.kill(server, signal.SIGKILL)
        answer = one.try_ask("sync", 20)
        seen = {"client": answer, "health": asdict(bench.health())}
    word = first_word(bench.env)
    bench.note(
        "server killed", "its clients die; the daemon makes another one for the next", attached(word), [seen, word]
    )


def check_daemon_killed(bench: Bench) -> None:
    """The daemon dies: what replicas and newcomers see."""
    holder = bench.holder
    assert holder is not None
    one = Client(bench.env)
    one.hear()
    for pid in processes(parent=holder.pid):
        os.kill(pid, signal.SIGKILL)
    status = holder.wait(20)
    seen: dict[str, Any] = {
        "holder": status,
        "words": _words(bench),
        "health": asdict(bench.health()),
        "client": one.try_ask("sync", 20),
    }
    one.ask("spin 1000") if one.process.poll() is None else None
    seen["client, later"] = one.try_ask("sync", 20)
    bench.note(
        "daemon killed",
        "the holder ends with 1 and says so; health is DOWN",
        status == 1 and seen["health"]["state"] == "DOWN",
        seen,
    )
    left = (bench.home / "mps/pipe/control").exists()
    word = first_word(bench.env, timeout=15.0)
    bench.note(
        "a newcomer without a daemon",
        "does not run under MPS",
        not attached(word),
        [{"control left behind": left}, word],
    )
    one.end()
    for pid in processes(name="nvidia-cuda-mps"):
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    seconds = bench.start_holder()
    word = first_word(bench.env)
    bench.note("the next holder", "starts in the same directory, and clients attach", attached(word), [seconds, word])


def check_end(bench: Bench) -> None:
    """The holder is told to stop: with no client, it goes at once."""
    holder = bench.holder
    assert holder is not None
    began = time.monotonic()
    holder.send_signal(signal.SIGTERM)
    try:
        status: int | str = holder.wait(40)
    except subprocess.TimeoutExpired:
        status = "still there"
    left = processes(name="nvidia-cuda-mps")
    bench.note(
        "the holder's end",
        "0, and neither daemon nor server is left",
        status == 0 and not left,
        [status, round(time.monotonic() - began, 2), left],
    )


def _words(bench: Bench) -> str:
    with contextlib.suppress(OSError):
        return (bench.home / "words").read_text()
    return ""


CHECKS: tuple[Callable[[Bench], None], ...] = (
    check_start,
    check_clients,
    check_devices,
    check_namespaces,
    check_concurrency,
    check_limit,
    check_kills,
    check_fault,
    check_server_killed,
    check_users,
    check_daemon_killed,
    check_end,
)


def main() -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the checks as JSON")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        return client()
    for program in (control.PROGRAM, "nvidia-smi", "unshare"):
        if shutil.which(program) is None:
            print(f"{program} is not on PATH: this needs a machine with an NVIDIA GPU and its driver", file=sys.stderr)
            return 2
    home = Path(tempfile.mkdtemp(prefix="tightship-mps-"))
    for name in ("mps/pipe", "mps/log", "checkout/scripts"):
        (home / name).mkdir(parents=True)
    # Where other users can read it, who may not enter the checkout.
    shutil.copytree(ROOT / "operator", home / "checkout/operator", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(__file__, home / "checkout/scripts")
    os.environ |= {"TIGHTSHIP_CHECK": str(home / "checkout"), "PYTHONPATH": str(home / "checkout/operator")}
    bench = Bench(home)
    # `control` asks through this process's environment, as in a holder's containers.
    os.environ |= {name: bench.env[name] for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")}
    try:
        for check in CHECKS:
            try:
                check(bench)
            except Exception as error:
                bench.note(check.__name__, "can be made", False, f"{type(error).__name__}: {error}")
    finally:
        if bench.holder is not None and bench.holder.poll() is None:
            bench.holder.kill()
        for pid in processes(name="nvidia-cuda-mps"):
            os.kill(pid, signal.SIGKILL)
        if options.output is not None:
            options.output.write_text(json.dumps([asdict(check) for check in bench.checks], indent=1) + "\n")
            for log in (home / "mps/log").glob("*.log"):
                shutil.copy(log, options.output.with_name(log.name))
        shutil.rmtree(home, ignore_errors=True)
    differing = [check.name for check in bench.checks if check.holds is False]
    print(
        f"{len(bench.checks)} checks; "
        + (f"differ: {', '.join(differing)}" if differing else "all that is relied on holds")
    )
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
