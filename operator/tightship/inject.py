"""`tightship inject DIR`: put what runs in engine images into a directory that their containers put on PYTHONPATH.

A container that is started again finds the files of the last time, perhaps half of them; so the package is copied beside its
place and moved there whole. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGES = ("api", "core", "profiler", "replica")
_SOURCE = Path(__file__).parent


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `inject`."""
    parser = subparsers.add_parser(
        "inject", help="copy what runs in engine images into a directory", description=__doc__.splitlines()[0]
    )
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where `tightship/` is put")
    return parser


def run(args: argparse.Namespace) -> int:
    """Copy; returns the exit status."""
    try:
        inject(args.directory)
    except (OSError, shutil.Error) as error:
        print(f"tightship inject: {args.directory}: {error}", file=sys.stderr)
        return 1
    return 0


def inject(directory: Path) -> None:
    """Make `directory/tightship` the package that engine images run, readable by every user.

    Raises:
        OSError: the directory can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    place = directory / "tightship"
    staging = Path(tempfile.mkdtemp(prefix=".tightship-", dir=directory))
    try:
        package = staging / "tightship"
        package.mkdir()
        shutil.copyfile(_SOURCE / "__init__.py", package / "__init__.py")
        for name in PACKAGES:
            shutil.copytree(_SOURCE / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        _make_readable(package)
        if place.exists():
            place.rename(staging / "replaced")
        package.rename(place)
    finally:
        shutil.rmtree(staging)


def _make_readable(package: Path) -> None:
    for path in (package, *package.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
