"""Writes the CustomResourceDefinitions and the API reference from the pydantic models: `python -m tightship.api.crds [--check]`.

A structural schema (Kubernetes) is stricter than JSON Schema: no references, no nulls, no unknown `additionalProperties: false`, a
type on every node. `structural` rewrites pydantic's schema into that form; what it can't express it refuses, so that a model that
would make an invalid CRD fails here and not on a cluster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tightship.api import reference
from tightship.api.v1alpha1 import batchprofile, gpupack, labels, llmservice

KINDS = (llmservice, batchprofile, gpupack)
DROPPED = ("title", "$defs", "discriminator", "const")
NOTICE = "Generated from the models under operator/tightship/api by `make crds`; not to be edited."
CHART_HEADER = f"{{{{- /* {NOTICE} */}}}}\n{{{{- if .Values.crds.install }}}}\n"


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors: what repeats in a schema is written out, as people and Helm expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True)


def structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The structural schema for pydantic's JSON schema `schema`; raises ValueError for what has no such form."""
    merged = _resolve(schema, definitions)
    out: dict[str, Any] = {key: value for key, value in merged.items() if key not in DROPPED}
    if "const" in merged:
        out["enum"] = [merged["const"]]
    if out.get("default", ...) is None:
        del out["default"]
    if out.get("x-kubernetes-int-or-string"):
        return out
    additional = out.pop("additionalProperties", None)
    if additional is True:
        out["x-kubernetes-preserve-unknown-fields"] = True
    elif isinstance(additional, Mapping):
        out["additionalProperties"] = structural(additional, definitions)
    if "properties" in out:
        properties = {name: structural(value, definitions) for name, value in out["properties"].items()}
        out["properties"] = {
            name: value if name in out.get("required", []) else _defaulted(value) for name, value in properties.items()
        }
    if "items" in out:
        out["items"] = structural(out["items"], definitions)
    if "anyOf" in out or "oneOf" in out or "allOf" in out:
        raise ValueError(f"no structural form for {schema!r:.200}")
    if "type" not in out:
        raise ValueError(f"no type in {schema!r:.200}")
    return out


def _defaulted(schema: dict[str, Any]) -> dict[str, Any]:
    """An object whose fields have defaults, and none of which is required, gets the default {}: else they would never be filled in."""
    fields = schema.get("properties", {})
    if not schema.get("required") and any("default" in field for field in fields.values()):
        return schema | {"default": {}}
    return schema


def _without_defaults(schema: Any) -> Any:
    """The schema with no defaults in it: a status says what was observed, never what might be."""
    if isinstance(schema, Mapping):
        return {
            key: {name: _without_defaults(field) for name, field in value.items()}
            if key == "properties"
            else _without_defaults(value)
            for key, value in schema.items()
            if key != "default"
        }
    return schema


def _resolve(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with its reference inlined and its `null` alternative dropped; siblings of a reference win over it."""
    merged = dict(schema)
    if "$ref" in merged:
        target = definitions[merged.pop("$ref").rsplit("/", 1)[-1]]
        inner = _resolve(target, definitions)
        return _with_validations(inner, merged)
    if "anyOf" in merged and not merged.get("x-kubernetes-int-or-string"):
        choices = [choice for choice in merged.pop("anyOf") if choice.get("type") != "null"]
        if len(choices) == 1:
            return _with_validations(_resolve(choices[0], definitions), merged)
        merged["anyOf"] = choices
    return merged


def _with_validations(inner: dict[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    rules = [*inner.get("x-kubernetes-validations", []), *outer.get("x-kubernetes-validations", [])]
    merged = {**inner, **outer}
    if rules:
        merged["x-kubernetes-validations"] = rules
    return merged


def definition(module: Any) -> dict[str, Any]:
    """The CustomResourceDefinition of the kind that `module` defines."""
    crd: dict[str, Any] = module.CRD
    schema = crd["model"].model_json_schema(by_alias=True, mode="validation")
    definitions = schema.get("$defs", {})
    spec = structural(schema["properties"]["spec"], definitions)
    status = _without_defaults(structural(schema["properties"]["status"], definitions))
    spec.setdefault("description", "What is wanted.")
    status["description"] = "What is observed."
    if rules := crd.get("spec_validations"):
        spec["x-kubernetes-validations"] = [*spec.get("x-kubernetes-validations", []), *rules]
    root: dict[str, Any] = {
        "description": crd["description"],
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of the API: " + labels.API_VERSION},
            "kind": {"type": "string", "description": "Kind of the object."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    if rules := crd.get("validations"):
        root["x-kubernetes-validations"] = rules
    subresources: dict[str, Any] = {"status": {}}
    if scale := crd.get("scale"):
        subresources["scale"] = scale
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{crd['plural']}.{labels.GROUP}",
            "labels": {labels.NAME: labels.PRODUCT, labels.PART_OF: labels.PRODUCT},
        },
        "spec": {
            "group": labels.GROUP,
            "scope": crd["scope"],
            "names": {
                "kind": module.KIND,
                "listKind": module.KIND + "List",
                "plural": crd["plural"],
                "singular": crd["singular"],
                "shortNames": crd["short"],
                "categories": crd["categories"],
            },
            "versions": [
                {
                    "name": labels.VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": crd["columns"],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


def definitions() -> dict[str, dict[str, Any]]:
    """Every CustomResourceDefinition, by plural."""
    return {module.PLURAL: definition(module) for module in KINDS}


def files(root: Path) -> dict[Path, str]:
    """The generated files below the repository `root`, with their content."""
    out = {root / "docs" / "api.md": reference.render(definitions())}
    for plural, crd in definitions().items():
        text = _dump(crd)
        out[root / "crds" / f"{plural}.yaml"] = f"# {NOTICE}\n{text}"
        out[root / "charts" / "tightship" / "templates" / "crds" / f"{plural}.yaml"] = _chart_template(crd)
    return out


def _chart_template(crd: Mapping[str, Any]) -> str:
    """The same as a Helm template: kept on uninstall, and with every `{{` of a description out of Helm's reach."""
    kept = {
        **crd,
        "metadata": {**crd["metadata"], "annotations": {"helm.sh/resource-policy": "keep"}},
    }
    text = _dump(kept)
    if "{{" in text:
        raise ValueError(f"{crd['metadata']['name']}: `{{{{` in a description or rule would be read by Helm")
    return CHART_HEADER + text + "{{- end }}\n"


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with --check say which differ (exit status 1)."""
    parser = argparse.ArgumentParser(prog="python -m tightship.api.crds", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: the current directory)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs from the models")
    args = parser.parse_args(argv)
    drifted = []
    for path, text in files(args.root).items():
        if path.exists() and path.read_text() == text:
            continue
        drifted.append(path)
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in drifted:
        sys.stdout.write(f"{'differs' if args.check else 'wrote'} {path.relative_to(args.root)}\n")
    return 1 if args.check and drifted else 0


if __name__ == "__main__":
    raise SystemExit(main())
