"""`Sandbox`: a whole cluster on this machine, for the command line and for tests.

    with Sandbox(plane="real", nodes=2, gpus_per_node=2, operator=False) as sandbox:
        print(sandbox.kubectl("get", "nodes"))

The sandbox lives exactly as long as the `with` block or, started detached, until `down`. It dies with the process that
owns it, whatever that process dies of.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tightship.sandbox import network
from tightship.sandbox.lifeline import CONTROL_SOCKET, DEVICE_SOCKET, HOLLOW_JOURNAL, HOLLOW_SOCKET
from tightship.sandbox.real import assets
from tightship.sandbox.settings import PLANES, Settings

_SOCKET_PATH_LIMIT = 80


class SandboxError(Exception):
    """The sandbox could not be started or is not up; the text says why."""


class Sandbox:
    """One sandbox.

    Args:
        state: its directory; None makes a temporary one, removed at the end.
        detached: it outlives this process, until `stop`.
        settings: fields of Settings.
    """

    def __init__(self, state: str | Path | None = None, detached: bool = False, **settings: Any) -> None:
        self._temporary = state is None
        self.state = Path(state or tempfile.mkdtemp(prefix="tightship-")).absolute()
        self._detached = detached
        sockets = str(self.state / "s")
        self._settings = replace(Settings(state=str(self.state), sockets=sockets), **settings)
        self._process: subprocess.Popen[str] | None = None
        self._description: dict[str, Any] = {}

    @classmethod
    def attach(cls, state: str | Path) -> Sandbox:
        """The running sandbox whose directory is `state`. Raises SandboxError when none runs there."""
        path = Path(state).absolute() / "sandbox.json"
        if not path.exists():
            raise SandboxError(f"no sandbox runs in {state}: {path} is missing")
        sandbox = cls(state, detached=True)
        sandbox._settings = Settings.read(sandbox.state / "settings.json")
        sandbox._description = json.loads(path.read_text())
        return sandbox

    # -- up and down ----------------------------------------------------------------------------------------------

    def start(self) -> Sandbox:
        """Bring it up; returns when nodes are ready and, if wanted, the operator runs.

        Raises:
            SandboxError: it did not come up.
            NamespaceError: this machine forbids what it needs.
            AssetsError: the real control plane's binaries are missing.
        """
        if self._settings.plane not in PLANES:
            raise SandboxError(f"there is no plane {self._settings.plane!r}: choose one of {', '.join(PLANES)}")
        if (self.state / "sandbox.json").exists() and _alive(Sandbox.attach(self.state).supervisor_pid):
            raise SandboxError(
                f"a sandbox runs in {self.state} already; use it, or end it with `tightship sandbox down`"
            )
        if self._settings.plane == "real":
            assets()
        network.check()
        self._prepare()
        arguments = [str(self.state), *([] if self._detached else ["attached"])]
        with (self.state / "logs" / "supervisor.log").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tightship.sandbox.outside", *arguments],
                stdin=subprocess.DEVNULL if self._detached else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                cwd="/",
            )
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or "{}")
        if "ready" not in answer:
            log = (self.state / "logs" / "supervisor.log").read_text(errors="replace")[-2000:]
            self.stop()
            raise SandboxError(str(answer.get("error") or f"the sandbox's supervisor died:\n{log}"))
        self._description = answer["ready"]
        return self

    def _prepare(self) -> None:
        """Make the state directory; every sandbox begins empty, the logs of earlier ones go with the rest."""
        for name in ("logs", "nodes", "pki", "plane"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        (self.state / "logs").mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)
        if len(self._settings.sockets) > _SOCKET_PATH_LIMIT:
            self._settings = replace(self._settings, sockets=tempfile.mkdtemp(prefix="tightship-"))
        sockets = Path(self._settings.sockets)
        sockets.mkdir(exist_ok=True)
        for path in sockets.glob("*.sock"):
            path.unlink()
        self._settings.write(self.state / "settings.json")

    def stop(self) -> None:
        """End everything. Does nothing when it is down."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            else:
                self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        elif self._description and _alive(self.supervisor_pid):
            os.kill(self.supervisor_pid, signal.SIGTERM)
            deadline = time.monotonic() + 30
            while _alive(self.supervisor_pid) and time.monotonic() < deadline:
                time.sleep(0.05)
        if self._settings.sockets != str(self.state / "s"):
            shutil.rmtree(self._settings.sockets, ignore_errors=True)
        if self._temporary:
            shutil.rmtree(self.state, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what it offers -------------------------------------------------------------------------------------------

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig for use on this machine."""
        return Path(self._description["kubeconfig"])

    @property
    def gateway_url(self) -> str:
        """`<gateway_url>/<namespace>/<service>/...` reaches a Service."""
        return str(self._description["gateway"])

    @property
    def supervisor_pid(self) -> int:
        """The process to end for ending the sandbox."""
        return int(self._description["supervisor"])

    @property
    def logs_dir(self) -> Path:
        """The logs of the sandbox's own processes."""
        return self.state / "logs"

    def node_dir(self, node: int) -> Path:
        """The directory of a node, counted from 0; its file system is below `root`."""
        return Path(self._description["nodes"][self._settings.node_name(node)])

    def environment(self) -> dict[str, str]:
        """This process's environment with KUBECONFIG set."""
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "TIGHTSHIP_GATEWAY": self.gateway_url}

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 900) -> str:
        """Run kubectl; returns what it printed.

        Raises:
            SandboxError: kubectl is missing, or failed and `check` is set.
        """
        command = shutil.which("kubectl") or os.path.join(os.environ.get("KUBEBUILDER_ASSETS", ""), "kubectl")
        if not os.path.exists(command):
            raise SandboxError("kubectl is neither on PATH nor in KUBEBUILDER_ASSETS")
        result = subprocess.run(
            [command, *arguments],
            env=self.environment(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode:
            raise SandboxError(f"kubectl {' '.join(arguments)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout if check else result.stdout + result.stderr

    def exec_in_namespace(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside the sandbox's namespaces, where pod and service addresses are reachable."""
        prefix = network.enter_command(int(self._description["init"]))
        environment = {**self.environment(), "KUBECONFIG": str(self.state / "kubeconfig.inside")}
        defaults: dict[str, Any] = {"capture_output": True, "text": True, "env": environment}
        return subprocess.run([*prefix, *command], check=False, **{**defaults, **options})

    def kill_operator(self) -> None:
        """SIGKILL the operator and leave it down."""
        self._control("POST", "operator/kill")

    def start_operator(self) -> None:
        """Start the operator (again)."""
        self._control("POST", "operator/start")

    def kill_agent(self) -> None:
        """SIGKILL the node agent, and with it every container; it stays down."""
        self._control("POST", "agent/kill")

    def start_agent(self) -> None:
        """Start the node agent again."""
        self._control("POST", "agent/start")

    def kill_process(self, name: str) -> None:
        """SIGKILL a process of the sandbox (a name as for `process_id`) and leave it down; the data of the embedded plane die with it."""
        self._control("POST", f"{name}/kill")

    def start_process(self, name: str) -> None:
        """Start a killed process again."""
        self._control("POST", f"{name}/start")

    def ask_hollow(self, path: str) -> None:
        """Ask hollow nodes for a fault; `path` as in `agent/hollow/control.py`.

        Raises:
            SandboxError: there is no such node, pod, container or GPU; the text says what there is.
        """
        status, body = self._ask(HOLLOW_SOCKET, "POST", f"/{path}")
        if status >= 400:
            raise SandboxError(body)

    @property
    def journal(self) -> Path:
        """What happened on hollow nodes (`agent/hollow/journal.py`)."""
        return self.state / HOLLOW_JOURNAL

    def process_id(self, name: str) -> int | None:
        """The process ID (inside) of `agent`, `operator`, `devices` or a part of the control plane; None when down."""
        return self._control("GET", name)

    def kill_container(self, pod: str, container: str, reason: str = "OOMKilled", namespace: str = "default") -> None:
        """End a container at once, with the reason that its status will give."""
        node = self.kubectl("get", "pod", pod, "-n", namespace, "-o", "jsonpath={.status.hostIP}")
        self._ask_node(node, f"kill/{namespace}/{pod}/{container}?reason={reason}")

    def lose_gpu(self, node: int, uuid: str) -> None:
        """Make a GPU of a node, counted from 0, fail: it is allocatable no more, until `find_gpu`."""
        self._ask_node(self._settings.node_address(node), f"gpus/{uuid}/lost")

    def find_gpu(self, node: int, uuid: str) -> None:
        """Make a lost GPU healthy again."""
        self._ask_node(self._settings.node_address(node), f"gpus/{uuid}/found")

    def control_gpu(self, uuid: str, verb: str, **more: Any) -> dict[str, Any]:
        """Do to a simulated GPU what no user can: `fault`, `lose`, `restore`, `kill` or `hang` (the last two: with `pid`, one client)."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(os.path.join(self._description["sockets"], DEVICE_SOCKET))
            connection.sendall(json.dumps({"op": "control", "uuid": uuid, "verb": verb, **more}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer = dict(json.loads(lines.readline()))
        if "error" in answer:
            raise SandboxError(f"{verb} {uuid}: {answer['error']}")
        return answer

    def gpu_uuids(self, node: int) -> list[str]:
        """The GPUs of a node, counted from 0."""
        return self._settings.gpu_uuids(node)

    def _ask_node(self, address: str, path: str) -> None:
        """POST to the sandbox's own part of a node's kubelet."""
        script = (
            "import ssl, sys, urllib.request as u;"
            "u.urlopen(u.Request(sys.argv[1], method='POST'), context=ssl._create_unverified_context()).read()"
        )
        url = f"https://{address}:10250/sandbox/{path}"
        result = self.exec_in_namespace([sys.executable, "-c", script, url])
        if result.returncode:
            raise SandboxError(f"{path}: {result.stderr.strip()[-500:]}")

    def kill_pod_processes(self, uid: str) -> None:
        """SIGKILL every process of the pod with that UID, as a fault of its node would."""
        mark = f"/pod{uid}/"
        found = [
            path.parent.name
            for node in self._description["nodes"].values()
            for path in Path(node, "proc").glob("*/cgroup")
            if mark in path.read_text()
        ]
        if not found:
            raise SandboxError(f"no process of a pod with UID {uid} runs")
        self.exec_in_namespace(["kill", "-KILL", *found])

    def _control(self, method: str, path: str) -> int | None:
        status, body = self._ask(CONTROL_SOCKET, method, f"/processes/{path}")
        if status >= 400:
            raise SandboxError(body)
        pid = json.loads(body)["pid"]
        return None if pid is None else int(pid)

    def _ask(self, name: str, method: str, path: str) -> tuple[int, str]:
        """Status and body of an answer on one of the sandbox's Unix sockets."""
        connection = _UnixConnection(os.path.join(self._description["sockets"], name))
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("sandbox", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


def _alive(pid: int) -> bool:
    """Whether `pid` is a sandbox's supervisor (and not another process that got its number)."""
    try:
        return b"tightship.sandbox.outside" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
