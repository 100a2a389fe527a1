"""What a machine must have for a test, in one table, and what happens where it hasn't.

A test says what it needs by a fixture (`kube_assets`, `engine_python`, `paper_data`, `helm`, `kubectl`, ...), which gives
it the path, or by `@pytest.mark.needs("helm", ...)`. What must hold: a test that didn't run is never silent. Its reason names what
is missing and how to get it, and the summary counts the reasons; under `TIGHTSHIP_NO_SKIPS=1` every skip is a failure,
wherever it was raised, but for requirements named in `TIGHTSHIP_MAY_SKIP` (comma-separated), which a caller may list who knows
that this machine can't have them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLANE_BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
# Folders in the order they run: what is cheap and explains most comes first. A folder not named runs last.
FOLDER_ORDER = ("unit", "chart", "sandbox", "chaos", "controlplane", "engine")


@dataclass(frozen=True)
class Requirement:
    """Something a machine may lack: `find` gives its path, or None; `remedy` says how to get it."""

    find: Callable[[], Path | None]
    remedy: str


def find_kube_assets() -> Path | None:
    folder = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent")
    return folder if all(os.access(folder / name, os.X_OK) for name in PLANE_BINARIES) else None


def find_engine_python() -> Path | None:
    python = Path(os.environ.get("TIGHTSHIP_ENGINE_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
    if not os.access(python, os.X_OK):
        return None
    probe = [str(python), "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"]
    return python if subprocess.run(probe, check=False, capture_output=True).returncode == 0 else None


def find_paper_data() -> Path | None:
    folder = Path(os.environ.get("TIGHTSHIP_PAPER_DATA") or "/nonexistent")
    return folder if (folder / "sweep").is_dir() else None


def find_tool(name: str) -> Path | None:
    """A program on PATH, or beside the control plane's binaries, where kubectl and helm often lie."""
    places = os.pathsep.join(filter(None, [os.environ.get("PATH"), os.environ.get("KUBEBUILDER_ASSETS")]))
    found = shutil.which(name, path=places)
    return Path(found) if found else None


def find_image_tools() -> Path | None:
    """buildah, where a base image can be made too: debootstrap wants root."""
    return find_tool("buildah") if find_tool("debootstrap") and os.geteuid() == 0 else None


def find_network_namespace() -> Path | None:
    unshare = find_tool("unshare")
    if unshare is None or find_tool("ip") is None:
        return None
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    probe = [str(unshare), *as_root, "--net", "--mount", "ip", "link", "set", "lo", "up"]
    return unshare if subprocess.run(probe, check=False, capture_output=True).returncode == 0 else None


REQUIREMENTS = {
    "kube_assets": Requirement(
        find_kube_assets,
        f"set KUBEBUILDER_ASSETS to a folder with {', '.join(PLANE_BINARIES)} (Kubernetes 1.20 or later)",
    ),
    "engine_python": Requirement(
        find_engine_python,
        "run `make engine` (vLLM's CPU build), or set TIGHTSHIP_ENGINE_PYTHON to a Python that has vLLM",
    ),
    "paper_data": Requirement(find_paper_data, "set TIGHTSHIP_PAPER_DATA to the folder of the published measurements"),
    "helm": Requirement(lambda: find_tool("helm"), "put helm (3.8 or later) on PATH or in KUBEBUILDER_ASSETS"),
    "kubectl": Requirement(lambda: find_tool("kubectl"), "put kubectl on PATH or in KUBEBUILDER_ASSETS"),
    "buildah": Requirement(find_image_tools, "run as root with buildah and debootstrap installed"),
    "network_namespace": Requirement(
        find_network_namespace, "allow network and mount namespaces (iproute2 and util-linux installed)"
    ),
}


@cache
def find(name: str) -> Path | None:
    return REQUIREMENTS[name].find()


def require(name: str) -> Path:
    """The path of a requirement; skips the calling test, with the remedy, where the machine lacks it."""
    path = find(name)
    if path is None:
        pytest.skip(f"no {name}: {REQUIREMENTS[name].remedy}")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        return FOLDER_ORDER.index(folder) if folder in FOLDER_ORDER else len(FOLDER_ORDER)

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            require(name)


# --- skips are failures where the caller says so ---------------------------------------------------------------------


def refuses_skip(reason: str) -> bool:
    """Whether this run turns a skip with this reason into a failure."""
    if os.environ.get("TIGHTSHIP_NO_SKIPS", "") in ("", "0"):
        return False
    allowed = os.environ.get("TIGHTSHIP_MAY_SKIP", "").replace(" ", "").split(",")
    return not any(name and f"no {name}:" in reason for name in allowed)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skipped report, whose longrepr is (file, line, "Skipped: reason")."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def fail_refused_skip(report: Any) -> None:
    if report.outcome == "skipped" and not hasattr(report, "wasxfail") and refuses_skip(skip_reason(report)):
        report.outcome = "failed"
        report.longrepr = f"skipped, and TIGHTSHIP_NO_SKIPS is set: {skip_reason(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    fail_refused_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    fail_refused_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if not reasons:
        return
    terminalreporter.section("not run on this machine")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d} skipped: {reason}")


# --- the same as fixtures, for tests that want the path ---------------------------------------------------------------


@pytest.fixture(scope="session")
def kube_assets() -> Path:
    """The folder with a real control plane's binaries."""
    return require("kube_assets")


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """A Python interpreter that has vLLM's CPU build."""
    return require("engine_python")


@pytest.fixture(scope="session")
def paper_data() -> Path:
    """The folder of the published measurements, with `sweep/` and `replication/`."""
    return require("paper_data")


@pytest.fixture(scope="session")
def helm() -> Path:
    return require("helm")


@pytest.fixture(scope="session")
def kubectl() -> Path:
    return require("kubectl")


@pytest.fixture(scope="session")
def buildah() -> Path:
    return require("buildah")
