"""The chart on a real control plane, with RBAC enforced: installed, at work, upgraded, uninstalled, installed again.

The sandbox's node runs what Helm installed, so the operator here is the chart's own pod under the chart's own ServiceAccount. What
it may not do it can't, and what the chart grants without need shows against the requests that the operator counts.

Kubernetes 1.20 wants `--server-side=false --disable-openapi-validation`: it knows no CEL, and its server-side apply refuses
the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chart.helmtools import CHART, NAMESPACE, RELEASE, run_helm
from story import PRODUCT, apply, get, items, make_profile, make_service, packs, wait_ready, wait_until
from tightship.api.v1alpha1.batchprofile import BatchProfile
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.manifests.holder import holder_access
from tightship.manifests.profile_job import profiler_access
from tightship.sandbox.cluster import Sandbox

pytestmark = pytest.mark.needs("kube_assets", "kubectl", "helm", "network_namespace")

OLD_PLANE = ("--server-side=false", "--disable-openapi-validation")
CRDS = {"llmservices.tightship.dev", "batchprofiles.tightship.dev", "gpupacks.tightship.dev"}
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"


class Cluster:
    """A sandbox with a real control plane and no Tightship in it, and helm pointed at it."""

    def __init__(self, sandbox: Sandbox, helm: Path) -> None:
        self.sandbox = sandbox
        self._helm = helm

    def helm(self, *arguments: str) -> str:
        done = run_helm(self._helm, *arguments, "--namespace", NAMESPACE, environment=self.sandbox.environment())
        assert done.returncode == 0, f"helm {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def install(self, *options: str) -> str:
        return self.helm("install", RELEASE, str(CHART), *OLD_PLANE, *options)

    def upgrade(self, *options: str) -> str:
        return self.helm("upgrade", RELEASE, str(CHART), *OLD_PLANE, *options)

    def uninstall(self) -> str:
        return self.helm("uninstall", RELEASE)

    def crds(self) -> set[str]:
        return {item["metadata"]["name"] for item in items(self.sandbox, "crd")}

    def operator_pods(self) -> list[dict[str, Any]]:
        pods = items(self.sandbox, "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=operator")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def wait_available(self, replicas: int) -> None:
        def holds() -> bool:
            status = get(self.sandbox, "deploy", RELEASE, "-n", NAMESPACE).get("status", {})
            current = status.get("updatedReplicas") == status.get("replicas") == replicas
            return current and status.get("availableReplicas") == replicas

        wait_until(self.sandbox, f"{replicas} operators available", holds, 90)

    def operator_logs(self) -> str:
        selector = "app.kubernetes.io/component=operator"
        return self.sandbox.kubectl("logs", "-n", NAMESPACE, "-l", selector, "--tail=-1", check=False)

    def metrics(self) -> str:
        """What the operator shows Prometheus, through the metrics Service; a probe that came late may have emptied it for a moment."""
        self.wait_available(1)
        service = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-metrics:http"
        return self.sandbox.kubectl("get", "--raw", f"{service}/proxy/metrics")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    helm: Path = request.getfixturevalue("helm")
    nothing = tmp_path_factory.mktemp("no-crds")
    with Sandbox(plane="real", nodes=1, gpus_per_node=2, operator=False, crds=str(nothing)) as sandbox:
        yield Cluster(sandbox, helm)


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Iterator[Cluster]:
    cluster.install()
    cluster.wait_available(1)
    yield cluster
    cluster.uninstall()


def test_install_upgrade_uninstall_and_install_again(cluster: Cluster) -> None:
    """The CRDs come with the release, follow it, and outlive it together with what was made of them."""
    sandbox = cluster.sandbox
    said = cluster.install()
    assert "pod-security.kubernetes.io/enforce=privileged" in said
    assert cluster.crds() >= CRDS
    cluster.wait_available(1)

    apply(sandbox, make_service("kept", autoApply=False, accelerator__product="NVIDIA-NOT-HERE"))
    cluster.upgrade("--set", "operator.logLevel=debug", "--set", "replicaCount=2")
    cluster.wait_available(2)
    cluster.upgrade("--set", "crds.install=false")
    assert cluster.crds() >= CRDS, "an upgrade that no longer brings the CRDs must not take them away"
    cluster.upgrade()

    cluster.uninstall()
    wait_until(sandbox, "the operator is gone", lambda: not cluster.operator_pods(), 60)
    assert cluster.crds() >= CRDS
    assert get(sandbox, "llm/kept")["spec"]["replicas"] == 4
    mine = [
        item["metadata"]["name"]
        for item in items(
            sandbox, "clusterroles,clusterrolebindings,deployments,serviceaccounts,roles,rolebindings", "-A"
        )
        if item["metadata"].get("labels", {}).get("app.kubernetes.io/instance") == RELEASE
    ]
    assert not mine, f"left behind: {mine}"

    cluster.install()
    cluster.wait_available(1)
    assert get(sandbox, "llm/kept")["spec"]["replicas"] == 4
    sandbox.kubectl("delete", "llm", "kept")
    cluster.uninstall()


def test_a_service_goes_all_the_way_under_the_chart_s_own_grants(installed: Cluster) -> None:
    """Measured, packed, scaled and deleted by the chart's operator, which is refused nothing on the way."""
    sandbox = installed.sandbox
    apply(sandbox, make_service(replicas=2))
    wait_ready(sandbox, "opt", 2, seconds=240)
    sandbox.kubectl("scale", "llm/opt", "--replicas=1")
    wait_ready(sandbox, "opt", 1)
    sandbox.kubectl("delete", "llm/opt")
    wait_until(sandbox, "the packs are freed", lambda: not packs(sandbox), 90)

    refused = [line for line in installed.operator_logs().splitlines() if "forbidden" in line.lower()]
    assert not refused, "\n".join(refused[:10])
    answered = re.findall(r"^tightship_operator_api_requests_total\{(.*)\}", installed.metrics(), re.MULTILINE)
    assert answered, "the operator counts its requests to the API"
    assert not [request for request in answered if 'code="403"' in request]


def test_the_operator_may_do_no_more_than_it_says(installed: Cluster) -> None:
    """What an operator of this kind is often given, and this one isn't."""
    kubectl = installed.sandbox.kubectl
    for words in (
        ("get", "secrets", "-A"),
        ("create", "deployments", "-A"),
        ("update", "llmservices.tightship.dev", "-A"),
        ("delete", "llmservices.tightship.dev", "-A"),
        ("create", "clusterrolebindings"),
        ("escalate", "roles", "-A"),
        ("bind", "clusterroles"),
        ("delete", "nodes"),
        ("patch", "nodes"),
        ("patch", "pods", "-n", "default"),
        ("create", "pods", "--subresource=exec", "-A"),
        ("get", "leases", "-n", "kube-system"),
        ("impersonate", "users"),
    ):
        assert kubectl("auth", "can-i", *words, "--as", ACCOUNT, check=False).startswith("no"), " ".join(words)
    for words in (
        ("patch", "llmservices.tightship.dev", "--subresource=status", "-A"),
        ("create", "pods", "-n", "default"),  # a dry run needs the right to the real thing
        ("create", "pods", "-n", NAMESPACE),
        ("patch", "pods", "-n", NAMESPACE),
    ):
        assert kubectl("auth", "can-i", *words, "--as", ACCOUNT).startswith("yes"), " ".join(words)


def test_the_operator_may_grant_what_the_profiler_and_the_holder_get_and_no_more(installed: Cluster) -> None:
    """Kubernetes refuses a Role, and a binding to one, that grants more than its creator holds."""
    kubectl = installed.sandbox.kubectl
    metadata = {"name": "probe", "namespace": "default", "uid": "0b6a1c0e-0000-4000-8000-000000000000"}
    profile = BatchProfile.model_validate({**make_profile(make_service()), "metadata": metadata})
    pack = GPUPack.model_validate({"metadata": metadata, "spec": {"namespace": "default", "product": PRODUCT}})
    for item in [*profiler_access(profile), *holder_access(pack, NAMESPACE)]:
        # Without its owner, which doesn't exist: the garbage collector would be quick.
        orphan = {**item, "metadata": {**item["metadata"], "ownerReferences": []}}
        kubectl("create", "--as", ACCOUNT, "-f", "-", stdin=json.dumps(orphan))

    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "greedy", "namespace": "default"},
        "rules": [{"apiGroups": ["tightship.dev"], "resources": ["llmservices"], "verbs": ["delete"]}],
    }
    refused = kubectl("create", "--as", ACCOUNT, "-f", "-", stdin=json.dumps(role), check=False)
    assert "attempting to grant RBAC permissions not currently held" in refused
