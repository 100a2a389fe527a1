"""The command line: `tightship COMMAND ...`.

Each command lives in a module with `add_parser(subparsers)` and `run(args) -> int`. Only the module of the command asked
for is imported: the injected replica supervisor must not wait for a Kubernetes client to load.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("tightship.operator_main", "run the operator"),
    "advise": (
        "tightship.commands.advise",
        "decide batch and replicas from a BatchProfile manifest, without a cluster",
    ),
    "profile": ("tightship.commands.profile", "measure a model here, without a cluster; or export a profile from one"),
    "import": ("tightship.commands.vllm_bench", "a profile from what another tool measured"),
    "plot": ("tightship.commands.plot", "draw a profile and the choice, as png, svg or html"),
    "predict": (
        "tightship.commands.predict",
        "predict how replicas that share a GPU slow each other down, without a cluster",
    ),
    "plan": ("tightship.commands.plan", "where replicas would go, from manifests, without a cluster"),
    "inject": ("tightship.inject", "copy what runs in engine images into a directory (used by init containers)"),
    "node": ("tightship.node.main", "hold a GPU and run MPS on it (used by holder pods)"),
    "sandbox": ("tightship.sandbox.cli", "a cluster on this machine, to try and to test the operator"),
}
"""Command -> (module, one line of help)."""

EPILOG = """\
`tightship COMMAND --help` tells more about a command.

try it without a cluster or a GPU:
  tightship sandbox up
"""


def version() -> str:
    """The installed version, or "unknown" when run from a bare checkout."""
    try:
        return metadata.version("tightship")
    except metadata.PackageNotFoundError:
        return "unknown"


def parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of all commands only `command` has its options filled in."""
    made = argparse.ArgumentParser(
        prog="tightship",
        description="Measures a language model on a GPU and packs as many vLLM replicas onto it as pay.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"tightship {version()}")
    subparsers = made.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, (module, text) in COMMANDS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if argument in COMMANDS), None)
    args = parser(command).parse_args(arguments)
    module, _ = COMMANDS[args.command]
    status: int = importlib.import_module(module).run(args)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
