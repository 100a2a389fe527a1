"""Running helm on the chart, and reading what it renders."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "tightship"
RELEASE = "tightship"
NAMESPACE = "tightship-system"


def run_helm(
    helm: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run helm and return what it said, whatever its exit status."""
    return subprocess.run(
        [str(helm), *arguments],
        env=environment, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip


def values_file(folder: Path, values: Mapping[str, Any]) -> Path:
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(dict(values)))
    return path


def render(helm: Path, folder: Path, values: Mapping[str, Any], release: str = RELEASE) -> list[dict[str, Any]]:
    """The objects of `helm template`; every document must be a YAML mapping with a kind."""
    file = values_file(folder, values)
    done = run_helm(helm, "template", release, str(CHART), "--namespace", NAMESPACE, "--values", str(file))
    assert done.returncode == 0, done.stderr
    objects = [document for document in yaml.safe_load_all(done.stdout) if document is not None]
    assert all(isinstance(item, dict) and item.get("kind") for item in objects), done.stdout
    return objects


def only(objects: Sequence[Mapping[str, Any]], kind: str) -> Any:
    """The one object of a kind."""
    found = [item for item in objects if item["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]
