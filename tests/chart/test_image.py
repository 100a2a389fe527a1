"""The operator's image, built for real on a Debian base made here, and started as the pods start it.

No registry is asked: the base image is a Debian minimal system, and the wheels are fetched by this machine's own pip, so
that its configuration (an index, a certificate) stays outside the build.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/debian-python:bookworm"
IMAGE = "localhost/tightship:test"
DEBIAN_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
PYTHON_OF_BASE = "3.11"
INJECTED = {"__init__.py", "api", "core", "profiler", "replica"}

pytestmark = pytest.mark.needs("buildah")


@dataclass(frozen=True)
class Builder:
    """buildah with a store of its own: no daemon, no overlay, no user namespaces, nothing left behind."""

    folder: Path

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        store = ["--root", str(self.folder / "store"), "--runroot", str(self.folder / "run")]
        done = subprocess.run(
            ["buildah", *store, *arguments],
            env=os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"},
            check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        assert not check or done.returncode == 0, (
            f"buildah {' '.join(arguments)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done


def debian_mirror() -> list[str]:
    """The mirror this machine installs from, as debootstrap's argument; none leaves the choice to debootstrap."""
    for file in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if file.is_file() and (
            found := re.search(r"^(?:URIs:|deb(?: \[.*\])?)\s+(\S+)", file.read_text(), re.MULTILINE)
        ):
            return [found[1]]
    return []


def make_base_image(builder: Builder, folder: Path) -> None:
    """A Debian 12 minimal system with Python, imported from scratch."""
    root = folder / "root"
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--include={DEBIAN_PACKAGES}",
        "bookworm",
        str(root),
        *debian_mirror(),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    archive = folder / "root.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    subprocess.run(["rm", "-rf", str(root)], check=True)
    container = builder("from", "scratch").stdout.strip()
    builder("add", container, str(archive), "/")
    builder("commit", "--rm", container, BASE)
    archive.unlink()


def fetch_wheels(folder: Path) -> None:
    """What the package and its build need, for the base image's Python, by this machine's pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    options = ["--quiet", "--only-binary=:all:", "--python-version", PYTHON_OF_BASE, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, *wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A builder whose store holds the base image and the operator's image."""
    folder = tmp_path_factory.mktemp("image")
    made = Builder(folder)
    try:
        make_base_image(made, folder)
        wheels = folder / "wheels"
        fetch_wheels(wheels)
        configuration = folder / "pip.conf"
        configuration.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        made(
            "bud", "--build-arg", f"BASE_IMAGE={BASE}", "--secret", f"id=pip,src={configuration}",
            "--volume", f"{wheels}:/wheels:ro", "--tag", IMAGE, str(ROOT),
        )  # fmt: skip
        yield made
    finally:
        made("rm", "--all", check=False)
        subprocess.run(["rm", "-rf", str(folder)], check=False)  # the store is hundreds of megabytes


@pytest.fixture(scope="module")
def configuration(builder: Builder) -> dict[str, Any]:
    """The image's run configuration."""
    return dict(json.loads(builder("inspect", "--type", "image", IMAGE).stdout)["OCIv1"]["config"])


@pytest.fixture
def container(builder: Builder) -> Iterator[str]:
    name = builder("from", "--pull-never", IMAGE).stdout.strip()
    yield name
    builder("rm", name)


def test_the_image_runs_the_operator_as_nobody_in_particular(configuration: dict[str, Any]) -> None:
    user, _, group = configuration["User"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert configuration["Entrypoint"] == ["/usr/local/bin/tightship"]
    assert configuration["Cmd"] == ["run"]
    assert "8080/tcp" in configuration["ExposedPorts"]


def test_it_starts(builder: Builder, container: str, configuration: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    said = builder("run", container, "--", *configuration["Entrypoint"], "--version").stdout
    assert said.strip() == f"tightship {version}"


def test_every_command_of_the_image_loads(builder: Builder, container: str, configuration: dict[str, Any]) -> None:
    """`run` imports kopf and the Kubernetes client, `node` httpx: what the image lacks fails here, not in a cluster."""
    for command in ("run", "inject", "node"):
        said = builder("run", container, "--", *configuration["Entrypoint"], command, "--help").stdout
        assert f"tightship {command}" in said


def test_inject_drops_what_runs_in_engine_images(
    builder: Builder, container: str, configuration: dict[str, Any], tmp_path: Path
) -> None:
    """As the init container does it: into a fresh volume, as the image's own user; the host's Python can import it."""
    shared = tmp_path / "tightship"
    shared.mkdir()
    shared.chmod(0o777)
    volume = f"{shared}:/tightship"
    builder("run", "--volume", volume, container, "--", *configuration["Entrypoint"], "inject", "/tightship/lib")
    injected = shared / "lib" / "tightship"
    assert {path.name for path in injected.iterdir() if path.name != "py.typed"} == INJECTED
    program = f"import sys; sys.path.insert(0, {str(shared / 'lib')!r}); import tightship.replica, tightship.core; print('ok')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


def test_there_is_no_installer_in_it(builder: Builder, container: str) -> None:
    listing = builder("run", container, "--", "ls", "/opt/tightship/bin").stdout.split()
    assert "tightship" in listing
    assert not [name for name in listing if name.startswith("pip")]
