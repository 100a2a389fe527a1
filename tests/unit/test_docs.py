"""The pages say what is so: links lead somewhere, and reasons, targets and metrics that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tightship.api.v1alpha1.conditions import Reason
from tightship.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {value for name, value in vars(Reason).items() if not name.startswith("_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("user-guide.md", r"^\| `(?:Accepted|Profiled|Recommended|Packed|Available|Ready)` \| (.+?) \|"),
        ("operations.md", r"^\| pack (.+?) \|"),
    ],
)
def test_reasons_named_in_tables_are_the_operators_own(name: str, pattern: str) -> None:
    cells = re.findall(pattern, (ROOT / "docs" / name).read_text(), re.MULTILINE)
    named = {reason for cell in cells for reason in re.findall(r"`([A-Za-z]+)`", cell)}
    assert named
    assert named <= REASONS


def test_metrics_named_are_shown() -> None:
    named = set(
        re.findall(r"`(tightship_[a-z_]+?)(?:_total)?(?:\{[^`]*)?`", (ROOT / "docs" / "operations.md").read_text())
    )
    shown = {family.name for family in Metrics().registry.collect()}
    assert named
    assert named <= shown


def test_make_targets_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        code = "\n".join(re.findall(r"`[^`]+`", page.read_text().replace("```", "`")))
        assert {*re.findall(r"\bmake ([a-z][a-z-]+)\b", code)} <= targets, page.name
