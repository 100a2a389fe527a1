"""The subcommands `tightship node prepare|mps|watch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `node`."""
    parser = subparsers.add_parser("node", help="hold a GPU and run MPS on it (used by holder pods)")
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(dest="node_command", required=True)
    for name, text in (
        ("prepare", "make the pack's directory and give it to the replicas' user (root)"),
        ("mps", "hold the GPU and run the MPS daemon"),
        ("watch", "publish GPU and MPS health on the own pod"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--dir", type=Path, required=True, help="the pack's directory")
        if name == "prepare":
            command.add_argument("--uid", type=int, required=True, help="the replicas' user")
        if name == "watch":
            command.add_argument("--interval", type=float, default=3.0, metavar="SECONDS", help="default: %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one of them; returns the exit status."""
    if args.node_command == "prepare":
        return _prepare(args.dir, args.uid)
    if args.node_command == "mps":
        from tightship.node import daemon  # noqa: PLC0415 (each container loads what it runs)

        return daemon.run(args.dir)
    from tightship.node import watch  # noqa: PLC0415

    return watch.run(args.dir, args.interval)


def _prepare(directory: Path, uid: int) -> int:
    from tightship.node import prepare  # noqa: PLC0415

    try:
        prepare.prepare(directory, uid)
    except OSError as error:
        print(f"tightship: {directory} can't be prepared for user {uid}: {error}", file=sys.stderr)
        return 1
    return 0
