"""Every sample is a manifest that the API takes, and the pages that quote a field quote one that exists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tightship.api import crds
from tightship.api.v1alpha1.batchprofile import BatchProfile, ProfileKey
from tightship.api.v1alpha1.validation import parse_service, profile_key

SAMPLES = Path(__file__).resolve().parents[2] / "docs" / "samples"
FILES = sorted(SAMPLES.glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every object closed to unknown fields, as kubectl's own validation has it."""
    out = {
        key: closed(value) if isinstance(value, dict) and key != "properties" else value
        for key, value in schema.items()
    }
    if "properties" in schema:
        out["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_sample_is_valid_and_has_no_field_that_the_schema_lacks(path: Path) -> None:
    by_kind = {crd["spec"]["names"]["kind"]: crd for crd in crds.definitions().values()}
    for document in documents(path):
        schema = by_kind[document["kind"]]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        body = {key: value for key, value in document.items() if key != "metadata"}
        jsonschema.validate(body, closed({**schema, "properties": {**schema["properties"], "metadata": {}}}))
        if document["kind"] == "LLMService":
            parse_service(document)


def test_the_imported_profile_carries_its_own_hash() -> None:
    (document,) = documents(SAMPLES / "batchprofile-imported.yaml")
    key = BatchProfile.model_validate(document).spec.key
    parts = {name: getattr(key, name) for name in ("model", "engine", "accelerator", "workload", "resources")}
    assert ProfileKey.of(**parts).hash == key.hash


def test_the_imported_profile_is_found_by_the_service_it_was_measured_for() -> None:
    (service,) = documents(SAMPLES / "llmservice-opt.yaml")
    service["spec"]["accelerator"]["product"] = "NVIDIA-H100-64GB"
    (profile,) = documents(SAMPLES / "batchprofile-imported.yaml")
    assert profile_key(parse_service(service).spec).hash == profile["spec"]["key"]["hash"]


@pytest.mark.parametrize(
    ("objective", "status", "batch"),
    # What arXiv:2503.08311 finds for OPT-1.3B: 96 within 15 ms; and nothing is within 1 ms.
    [("15ms", 0, 96), ("1ms", 3, None)],
)
def test_advise_decides_from_the_imported_profile(objective: str, status: int, batch: int | None) -> None:
    file = SAMPLES / "batchprofile-imported.yaml"
    command = [sys.executable, "-m", "tightship", "advise", "-f", str(file), "--itl", objective, "-o", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == status, done.stderr
    assert json.loads(done.stdout).get("batch") == batch
