"""A test that can't run here is counted with its reason, and fails the run where skips are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
STORY = """
import pytest

def test_runs():
    pass

def test_wants_a_control_plane(kube_assets):
    pass

@pytest.mark.needs("paper_data")
def test_wants_data():
    pass
"""
WORDS = ("passed", "skipped", "error")
MODULE_SKIP = "import pytest\npytest.skip('never here', allow_module_level=True)\n"


def run_pytest(folder: Path, modules: dict[str, str], **environment: str) -> tuple[int, str]:
    """Run pytest on a copy of the policy and some test modules in a folder of their own."""
    tests = folder / "tests"
    (tests / "unit").mkdir(parents=True)
    (tests / "conftest.py").write_text(CONFTEST.read_text())
    for name, text in modules.items():
        (tests / "unit" / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = needs(*names): what the machine must have\n")
    hidden = {
        "KUBEBUILDER_ASSETS",
        "TIGHTSHIP_PAPER_DATA",
        "TIGHTSHIP_NO_SKIPS",
        "TIGHTSHIP_MAY_SKIP",
        "PYTEST_ADDOPTS",
    }
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=folder, env=clean | environment, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout


def outcomes(output: str) -> dict[str, int]:
    """The counts of pytest's last line: passed, skipped, error."""
    last = output.strip().splitlines()[-1]
    return {word: int(match[1]) if (match := re.search(rf"(\d+) {word}", last)) else 0 for word in WORDS}


def test_a_skip_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, {"story": STORY, "module": MODULE_SKIP})
    assert code == 0
    assert "not run on this machine" in output
    assert "1 skipped: no kube_assets: set KUBEBUILDER_ASSETS" in output
    assert "1 skipped: no paper_data: set TIGHTSHIP_PAPER_DATA" in output
    assert "1 skipped: never here" in output


@pytest.mark.parametrize(
    ("may_skip", "errors"),
    [("", 2), ("paper_data", 1), ("paper_data, kube_assets", 0)],
)
def test_refused_skips_fail_but_for_those_allowed(tmp_path: Path, may_skip: str, errors: int) -> None:
    code, output = run_pytest(tmp_path, {"story": STORY}, TIGHTSHIP_NO_SKIPS="1", TIGHTSHIP_MAY_SKIP=may_skip)
    assert code == (1 if errors else 0)
    assert outcomes(output) == {"passed": 1, "skipped": 2 - errors, "error": errors}


def test_a_module_that_skips_itself_is_refused_too(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, {"story": STORY, "module": MODULE_SKIP}, TIGHTSHIP_NO_SKIPS="1")
    assert code != 0
    assert "skipped, and TIGHTSHIP_NO_SKIPS is set: never here" in output
