"""What a container of an image gets when there is no image: the sandbox's table of images.

A container in the sandbox is a local process, so an image is nothing but an environment: a PATH whose `python3` is the
image's own interpreter, a PYTHONPATH with what the image carries, and variables. `resolve` maps an image name to that
environment, or to None for an image the sandbox can't stand in for (the node agent then reports ErrImagePull).

What must always hold:

- The simulated engine image does not carry Tightship. Its interpreter starts without site-packages, so `tightship` can
  only come from what the init container injected, as in a real engine image.
- What a pod spec says wins over the image, except PATH and PYTHONPATH, which are joined with the pod's part first.
- Resolving twice gives the same environment; files written for it (launchers, links) are replaced atomically.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import tightship

SOCKET_VARIABLE = "TIGHTSHIP_SIM_SOCKET"
NODE_VARIABLE = "TIGHTSHIP_SIM_NODE"
ENGINE_PYTHON_VARIABLE = "TIGHTSHIP_ENGINE_PYTHON"

_SIMULATED = Path(__file__).parent / "simulation" / "images" / "simulated"
_SYSTEM_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
# What every vLLM image carries and the profiler may therefore use.
_ENGINE_DISTRIBUTIONS = ("httpx", "pydantic", "prometheus-client", "aiohttp", "pyyaml")
_JOINED = ("PATH", "PYTHONPATH")


@dataclass(frozen=True)
class ImageSettings:
    """What the sandbox knows when it resolves images.

    `state` is a directory for launchers and links, made when missing. `device_socket` is the simulated devices' Unix
    socket, None when the sandbox has no GPUs. `node` is the name of the node the container runs on. `engine_python` is
    the interpreter that has vLLM's CPU build (None: taken from TIGHTSHIP_ENGINE_PYTHON; absent there too: no such
    image). `engine_environment` goes to engine containers only, real or simulated.
    """

    state: Path
    device_socket: Path | None = None
    node: str | None = None
    engine_python: str | None = None
    engine_environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageEnvironment:
    """What a container gets from its image: directories for PATH, first one first, and environment variables."""

    path: list[str]
    env: dict[str, str]

    def merged(self, pod: Mapping[str, str]) -> dict[str, str]:
        """Return the container's whole environment: the image's, overridden by the pod's, with PATH and PYTHONPATH joined.

        The pod's own entries come first, so that an injected package wins over one the image carries.
        """
        image = {**self.env, "PATH": os.pathsep.join(self.path)}
        whole = {**image, **pod}
        for name in _JOINED:
            parts = [part for part in (pod.get(name, ""), image.get(name, "")) if part]
            if parts:
                whole[name] = os.pathsep.join(parts)
        return whole


def resolve(image: str, settings: ImageSettings) -> ImageEnvironment | None:
    """Return what a container of `image` gets, or None when the sandbox has nothing to stand in for it."""
    for pattern, build in _TABLE:
        if fnmatch.fnmatchcase(image, pattern):
            return build(settings)
    return None


def _operator(settings: ImageSettings) -> ImageEnvironment:
    """The operator image: the running interpreter, with the nvidia tools that the real toolkit would mount into a holder."""
    directory = settings.state / "images" / "operator" / "bin"
    _launchers(directory, {"python3": [sys.executable], "tightship": [sys.executable, "-m", "tightship"]})
    _tool_launchers(directory)
    # The source root by name: the sandbox may itself run from a checkout that nobody installed.
    env = {"PYTHONPATH": str(Path(tightship.__file__).parents[1]), **_device_variables(settings)}
    return ImageEnvironment(path=[str(directory), *_SYSTEM_PATH], env=env)


def _simulated_engine(settings: ImageSettings) -> ImageEnvironment:
    """The simulated engine: a bare interpreter, the packages a vLLM image carries, and the simulated `vllm` and NVML."""
    root = settings.state / "images" / "simulated"
    _launchers(root / "bin", {"python3": [*_bare_python()]})
    _tool_launchers(root / "bin")
    _link_packages(root / "site", _ENGINE_DISTRIBUTIONS)
    env = {
        "PYTHONPATH": os.pathsep.join((str(_SIMULATED), str(root / "site"))),
        "TIGHTSHIP_CUDA_PROBE": str(root / "bin" / "cuda-probe"),
        **_device_variables(settings),
        **settings.engine_environment,
    }
    return ImageEnvironment(path=[str(root / "bin"), *_SYSTEM_PATH], env=env)


def _cpu_engine(settings: ImageSettings) -> ImageEnvironment | None:
    """The real engine on the CPU: whatever interpreter the user named; without one there is no such image here."""
    python = settings.engine_python or os.environ.get(ENGINE_PYTHON_VARIABLE)
    if not python:
        return None
    directory = settings.state / "images" / "vllm-cpu" / "bin"
    _launchers(directory, {"python3": [python]})
    env = {"HF_HUB_OFFLINE": "1", **settings.engine_environment}
    return ImageEnvironment(path=[str(directory), *_SYSTEM_PATH], env=env)


_TABLE: tuple[tuple[str, Callable[[ImageSettings], ImageEnvironment | None]], ...] = (
    ("*vllm-cpu*", _cpu_engine),
    ("vllm/vllm-openai:*", _simulated_engine),
    ("*/vllm/vllm-openai:*", _simulated_engine),
    ("tightship/operator:*", _operator),
    ("*/tightship/operator:*", _operator),
)


def _bare_python() -> tuple[str, ...]:
    """The base interpreter without site-packages: only the standard library and PYTHONPATH can be imported."""
    return (getattr(sys, "_base_executable", None) or sys.executable, "-S")


def _device_variables(settings: ImageSettings) -> dict[str, str]:
    variables = {}
    if settings.device_socket is not None:
        variables[SOCKET_VARIABLE] = str(settings.device_socket)
    if settings.node is not None:
        variables[NODE_VARIABLE] = settings.node
    return variables


def _tool_launchers(directory: Path) -> None:
    """Put every stand-in of `images/simulated/bin` on PATH; they need the standard library only, and start fast with that."""
    _launchers(
        directory,
        {tool.name: [*_bare_python(), str(tool)] for tool in (_SIMULATED / "bin").iterdir() if tool.is_file()},
    )


def _launchers(directory: Path, commands: Mapping[str, Iterable[str]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, command in commands.items():
        text = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
        target = directory / name
        if target.exists() and target.read_text() == text:
            continue
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_text(text)
        temporary.chmod(0o755)
        temporary.replace(target)


def _link_packages(directory: Path, distributions: Iterable[str]) -> None:
    """Link the top-level files of distributions and of all they require from the running environment."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in _closure(distributions):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(distribution.locate_file(top)))
            link = directory / top
            if not link.is_symlink() or link.readlink() != target:
                temporary = directory / f".{top}.{os.getpid()}"
                temporary.symlink_to(target)
                temporary.replace(link)


def _closure(distributions: Iterable[str]) -> list[str]:
    """Return the distributions and their requirements, extras left out, as far as they are installed."""
    found: dict[str, None] = {}
    wanted = list(distributions)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            # A requirement of another platform or Python version; what is really missing fails at import, by name.
            continue
        found[name] = None
        wanted += [
            match.group() for text in requires if "extra ==" not in text and (match := re.match(r"[\w.-]+", text))
        ]
    return list(found)
