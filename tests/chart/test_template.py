"""What the chart renders, over values a cluster's owner would set, and what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.helmtools import CHART, NAMESPACE, RELEASE, only, render, run_helm, values_file
from tightship.__main__ import parser
from tightship.api import crds
from tightship.kube.kinds import KINDS, WATCHED
from tightship.operator_main import options

Values = dict[str, Any]

BASE = Counter(
    {
        "CustomResourceDefinition": 3,
        "ServiceAccount": 1,
        "ClusterRole": 1,
        "ClusterRoleBinding": 1,
        "Role": 1,
        "RoleBinding": 1,
        "Deployment": 1,
        "Service": 1,
    }
)
VALUE_SETS: dict[str, tuple[Values, Counter[str]]] = {
    "defaults": ({}, BASE),
    "CRDs from elsewhere": ({"crds": {"install": False}}, BASE - Counter({"CustomResourceDefinition": 3})),
    "an account and grants from elsewhere": (
        {"serviceAccount": {"create": False, "name": "platform"}, "rbac": {"create": False}},
        Counter({"CustomResourceDefinition": 3, "Deployment": 1, "Service": 1}),
    ),
    "no metrics": ({"metrics": {"service": {"enabled": False}}}, BASE - Counter({"Service": 1})),
    "scraped": (
        {"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}},
        BASE + Counter({"ServiceMonitor": 1}),
    ),
    "everything set": (
        {
            "image": {
                "repository": "registry.example:5000/team/tightship",
                "tag": "1.2.3",
                "pullPolicy": "Always",
                "pullSecrets": [{"name": "pull"}],
            },
            "replicaCount": 2,
            "serviceAccount": {"name": "packer", "annotations": {"example.com/role": "packer"}},
            "operator": {
                "logLevel": "debug",
                "logFormat": "plain",
                "resyncSeconds": 60,
                "maxConcurrentProfiles": 4,
                "gpuNaming": "nri",
            },
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "system-cluster-critical",
            "podAnnotations": {"a": "{{ not a template }}"},
            "podLabels": {"team": "ml"},
            "resources": {"requests": {"cpu": 1}},
        },
        BASE,
    ),
}


@pytest.mark.parametrize("name", VALUE_SETS)
def test_renders_the_expected_objects(helm: Path, tmp_path: Path, name: str) -> None:
    values, expected = VALUE_SETS[name]
    objects = render(helm, tmp_path, values)
    assert Counter(item["kind"] for item in objects) == expected
    lint = run_helm(helm, "lint", str(CHART), "--strict", "--values", str(values_file(tmp_path, values)))
    assert lint.returncode == 0, lint.stdout + lint.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bogus": 1}, "bogus"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"image": {"tag": "not a tag"}}, "tag"),
        ({"image": {"repository": ""}}, "repository"),
        ({"replicaCount": -1}, "replicaCount"),
        ({"replicaCount": "two"}, "replicaCount"),
        ({"crds": {"install": "yes please"}}, "crds"),
        ({"operator": {"logLevel": "shout"}}, "logLevel"),
        ({"operator": {"resyncSeconds": 0}}, "resyncSeconds"),
        ({"operator": {"gpuNaming": "cdi-cri"}}, "gpuNaming"),
        ({"operator": {"maxConcurentProfiles": 2}}, "maxConcurentProfiles"),
        ({"metrics": {"service": {"port": 70000}}}, "port"),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, "interval"),
        ({"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}}, "metrics.service.enabled"),
    ],
)
def test_refuses_wrong_values_by_name(helm: Path, tmp_path: Path, values: Values, said: str) -> None:
    file = values_file(tmp_path, values)
    done = run_helm(helm, "template", RELEASE, str(CHART), "--values", str(file))
    assert done.returncode != 0
    assert said in done.stderr


def test_every_value_has_a_schema(helm: Path) -> None:
    """The defaults and the schema name the same values, so that a typo in an override is never silently ignored."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())

    def compare(value: Any, node: Any, path: str) -> None:
        if not isinstance(value, dict) or "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        named = set(node["properties"]) - {"global"}
        assert named == set(value) or path == ".resources", path
        for key in value:
            compare(value[key], node["properties"][key], f"{path}.{key}")

    compare(defaults, schema, "")


def test_crds_are_the_generated_ones_and_survive_the_release(helm: Path, tmp_path: Path) -> None:
    rendered = {
        item["metadata"]["name"]: item
        for item in render(helm, tmp_path, {})
        if item["kind"] == "CustomResourceDefinition"
    }
    generated = {crd["metadata"]["name"]: crd for crd in crds.definitions().values()}
    assert set(rendered) == set(generated)
    for name, crd in rendered.items():
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert crd["spec"] == generated[name]["spec"], f"{name}: run make crds"


def test_the_pod_passes_the_restricted_pod_security_level(helm: Path, tmp_path: Path) -> None:
    pod = only(render(helm, tmp_path, {}), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "volumes" not in pod
    assert not any(key in pod for key in ("hostPID", "hostNetwork", "hostIPC"))


def test_the_pod_is_probed_and_told_its_own_image(helm: Path, tmp_path: Path) -> None:
    values = {"image": {"repository": "example/tightship", "tag": "9.9"}}
    (container,) = only(render(helm, tmp_path, values), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "example/tightship:9.9"
    assert {"name": "TIGHTSHIP_IMAGE", "value": "example/tightship:9.9"} in container["env"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert {"name": "http", "containerPort": 8080, "protocol": "TCP"} in container["ports"]


def test_the_operator_understands_what_the_pod_tells_it(
    helm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable is an option of `tightship run`, and every value passes its parser."""
    values = VALUE_SETS["everything set"][0]
    (container,) = only(render(helm, tmp_path, values), "Deployment")["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", NAMESPACE))
    parsed = parser("run").parse_args(container["args"])
    chosen = options(parsed)
    assert chosen.settings.operator_image == "registry.example:5000/team/tightship:1.2.3"
    assert chosen.settings.image_pull_policy == "Always"
    assert chosen.settings.operator_namespace == NAMESPACE
    assert (chosen.settings.resync, chosen.settings.max_concurrent_profiles) == (60.0, 4)
    assert chosen.settings.gpu_naming == "nri"
    assert (parsed.log_level, parsed.log_format) == ("debug", "plain")
    known = {f"TIGHTSHIP_{name.upper()}" for name in vars(parsed)}
    assert {variable["name"] for variable in container["env"]} <= known
    assert container["ports"][0]["containerPort"] == chosen.telemetry_port


def test_the_lease_granted_is_the_lease_taken(helm: Path, tmp_path: Path) -> None:
    objects = render(helm, tmp_path, {})
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    (taken,) = [variable["value"] for variable in container["env"] if variable["name"] == "TIGHTSHIP_LEASE_NAME"]
    granted = [name for rule in only(objects, "Role")["rules"] for name in rule.get("resourceNames", [])]
    assert granted == [taken]


def test_objects_of_the_release_are_not_taken_for_the_operators_own(helm: Path, tmp_path: Path) -> None:
    """part-of=tightship selects what the operator made: it must not watch, or count, what Helm installed."""
    for item in render(helm, tmp_path, {}):
        labels = item["metadata"].get("labels", {})
        if item["kind"] != "CustomResourceDefinition":
            assert "app.kubernetes.io/part-of" not in labels, item["kind"]
            assert labels["app.kubernetes.io/managed-by"] == "Helm"
            assert labels["app.kubernetes.io/instance"] == RELEASE


def test_two_releases_share_no_name_but_the_crds(helm: Path, tmp_path: Path) -> None:
    def names(release: str) -> set[tuple[str, str]]:
        objects = render(helm, tmp_path, {"crds": {"install": False}}, release)
        return {(item["kind"], item["metadata"]["name"]) for item in objects}

    assert not names("one") & names("two")


def test_grants_name_what_they_grant(helm: Path, tmp_path: Path) -> None:
    objects = render(helm, tmp_path, {})
    for kind in ("ClusterRole", "Role"):
        for rule in only(objects, kind)["rules"]:
            granted = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in granted
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
            assert "secrets" not in rule["resources"]
    binding = only(objects, "ClusterRoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": RELEASE, "namespace": NAMESPACE}]
    assert binding["roleRef"]["name"] == only(objects, "ClusterRole")["metadata"]["name"]


def test_what_the_operator_watches_it_may_list_and_watch_everywhere(helm: Path, tmp_path: Path) -> None:
    rules = only(render(helm, tmp_path, {}), "ClusterRole")["rules"]
    for kind in (KINDS[name] for name in WATCHED):
        verbs = {
            verb
            for rule in rules
            if kind.group in rule["apiGroups"] and kind.plural in rule["resources"]
            for verb in rule["verbs"]
        }
        assert {"get", "list", "watch"} <= verbs, kind.name


def test_every_rule_is_justified() -> None:
    """In the chart's source a comment stands above each rule."""
    lines = (CHART / "templates" / "rbac.yaml").read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("  - apiGroups:")]
    assert rules
    assert not [number + 1 for number in rules if not lines[number - 1].startswith("  #")]
