"""The API reference, `docs/api.md`, from the same schemas as the CRDs: one table a kind, one row a field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tightship.api.v1alpha1.common import PERCENTAGE_PATTERN

INTRODUCTION = """# API reference

Generated from the models under `operator/tightship/api` by `make crds`. `kubectl explain llm.spec` prints the same.
Durations are Go durations (`30ms`, `20m`), memory is a Kubernetes quantity (`64Gi`), decimals are strings (`"0.1"`).
"""


def render(definitions: Mapping[str, Mapping[str, Any]]) -> str:
    """The reference in Markdown for CustomResourceDefinitions by plural."""
    parts = [INTRODUCTION]
    for crd in definitions.values():
        names, version = crd["spec"]["names"], crd["spec"]["versions"][0]
        schema = version["schema"]["openAPIV3Schema"]
        parts.append(
            f"## {names['kind']} (`{names['shortNames'][0]}`, {crd['spec']['scope'].lower()})\n\n{schema['description']}\n"
        )
        for part in ("spec", "status"):
            rows = "\n".join(_rows(schema["properties"][part], part))
            parts.append(
                f"### {names['kind']} {part}\n\n| field | type | default | what it is |\n|---|---|---|---|\n{rows}\n"
            )
    return "\n".join(parts)


def _rows(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        inner, suffix = field, ""
        if field.get("type") == "array":
            inner, suffix = field["items"], "[]"
        default = (
            ""
            if field.get("default") in (None, {})
            else f"`{field['default']}`".replace("True", "true").replace("False", "false")
        )
        needed = " (required)" if name in required else ""
        yield f"| `{path}.{name}{suffix}`{needed} | {_type(field)} | {default} | {_cell(field)} |"
        yield from _rows(inner, f"{path}.{name}{suffix}")


def _type(field: Mapping[str, Any]) -> str:
    if field.get("x-kubernetes-int-or-string"):
        return "integer or percentage" if field.get("pattern") == PERCENTAGE_PATTERN else "quantity"
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    return str(field["type"])


def _cell(field: Mapping[str, Any]) -> str:
    bounds = [f"{word} {field[key]}" for key, word in (("minimum", "at least"), ("maximum", "at most")) if key in field]
    text = str(field.get("description", "")) + (f" ({', '.join(bounds)})" if bounds else "")
    return text.replace("|", "\\|").replace("\n", " ")
