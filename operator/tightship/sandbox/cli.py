"""`tightship sandbox up | run | down`."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tightship.api.units import parse_quantity
from tightship.sandbox.cluster import Sandbox, SandboxError
from tightship.sandbox.network import NamespaceError
from tightship.sandbox.real import AssetsError
from tightship.sandbox.settings import PLANES, Settings

_DEFAULTS = Settings(state="", sockets="")


def default_state() -> Path:
    """Where a sandbox lives that was not told where."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "tightship" / "sandbox"


def add_parser(subparsers: Any) -> None:
    """Add `sandbox` to a command line, whose arguments then go to `run`."""
    parser = subparsers.add_parser("sandbox", help="a cluster on this machine for trying Tightship out")
    add_commands(parser)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add up, run and down to a parser."""
    commands = parser.add_subparsers(dest="sandbox_command", required=True, metavar="up|run|down")
    up = commands.add_parser("up", help="start a sandbox in the background")
    _options(up)
    up.set_defaults(sandbox_run=_up)
    foreground = commands.add_parser("run", help="start a sandbox, run a command with KUBECONFIG set, end the sandbox")
    _options(foreground)
    foreground.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments"
    )
    foreground.set_defaults(sandbox_run=_run)
    down = commands.add_parser("down", help="end the sandbox")
    down.add_argument("--state", type=Path, default=default_state(), help="its directory (default: %(default)s)")
    down.set_defaults(sandbox_run=_down)


def run(args: argparse.Namespace) -> int:
    """Carry out the command that was parsed; returns the exit status."""
    return int(args.sandbox_run(args))


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plane", choices=PLANES, default=_DEFAULTS.plane, help="control plane; real needs KUBEBUILDER_ASSETS")
    add("--nodes", type=int, default=_DEFAULTS.nodes, help="simulated nodes (default: %(default)s)")
    add("--cpus", type=int, default=_DEFAULTS.cpus, help="CPUs of each node (default: %(default)s)")
    add("--gpus-per-node", type=int, default=_DEFAULTS.gpus_per_node, help="simulated GPUs (default: %(default)s)")
    add("--product", default=_DEFAULTS.product, help="the GPUs' product (default: %(default)s)")
    add("--gpu-memory", default="80Gi", help="the GPUs' memory (default: %(default)s)")
    add(
        "--engine-cores",
        default="",
        metavar="LIST",
        help="this machine's cores for containers with CPUs of their own, e.g. 1,2",
    )
    add(
        "--engine-python",
        default=None,
        metavar="PATH",
        help="an interpreter with vLLM's CPU build, for images vllm-cpu",
    )
    add("--models", type=Path, default=None, metavar="DIR", help="a directory that the claim `models` in default holds")
    add(
        "--device-argument", action="append", default=[], metavar="ARG", help="passed to the simulated devices (repeat)"
    )
    add("--state", type=Path, default=default_state(), help="the sandbox's directory (default: %(default)s)")
    add(
        "--dra",
        action="store_true",
        help="hand GPUs out by ResourceClaims, as NVIDIA's DRA driver does, in place of nvidia.com/gpu (embedded control plane)",
    )
    add("--operator", action=argparse.BooleanOptionalAction, default=True, help="start the operator as a local process")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "plane": args.plane,
        "nodes": args.nodes,
        "cpus": args.cpus,
        "gpus_per_node": args.gpus_per_node,
        "product": args.product,
        "gpu_memory": parse_quantity(args.gpu_memory),
        "engine_cores": [int(core) for core in args.engine_cores.split(",") if core],
        "engine_python": args.engine_python,
        "models": None if args.models is None else str(args.models.absolute()),
        "device_arguments": args.device_argument,
        "operator": args.operator,
        "dra": args.dra,
    }


def _up(args: argparse.Namespace) -> int:
    def work() -> int:
        sandbox = Sandbox(args.state, detached=True, **_settings(args)).start()
        print(f"The sandbox is up ({args.plane} control plane). Use it with\n")
        print(f"  export KUBECONFIG={sandbox.kubeconfig}\n")
        print(f"Services answer at {sandbox.gateway_url}/<namespace>/<service>/...")
        print(f"Logs are in {sandbox.logs_dir}. End it with: tightship sandbox down --state {args.state}")
        return 0

    return _guard(work)


def _run(args: argparse.Namespace) -> int:
    command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not command:
        print("tightship sandbox run: name a command after --", file=sys.stderr)
        return 2
    if shutil.which(command[0]) is None:
        print(f"tightship sandbox run: there is no command {command[0]!r}", file=sys.stderr)
        return 127

    def work() -> int:
        with Sandbox(args.state, **_settings(args)) as sandbox:
            child = subprocess.Popen(command, env=sandbox.environment())
            while True:
                try:
                    return _exit_status(child.wait())
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGINT)

    return _guard(work)


def _exit_status(code: int) -> int:
    """What a shell would say of a command that ended so: 128 and the signal, where it died of one."""
    return code if code >= 0 else 128 - code


def _down(args: argparse.Namespace) -> int:
    def work() -> int:
        Sandbox.attach(args.state).stop()
        print("The sandbox is down.")
        return 0

    return _guard(work)


def _guard(work: Any) -> int:
    try:
        return int(work())
    except (SandboxError, NamespaceError, AssetsError, ValueError) as error:
        print(f"tightship sandbox: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def main(argv: list[str] | None = None) -> int:
    """The command line without the rest of Tightship: `python -m tightship.sandbox`."""
    parser = argparse.ArgumentParser(prog="tightship sandbox", description="a cluster on this machine")
    add_commands(parser)
    args = parser.parse_args(argv)
    return run(args)
