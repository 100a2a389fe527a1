"""The holder of a GPU: two containers, one GPU, least rights."""

from __future__ import annotations

import pytest

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.template import TemplateSpec
from tightship.manifests import replicas
from tightship.manifests.holder import GRACE_SECONDS, holder_access, holder_pod
from tightship.manifests.podparts import OperatorImage

OPENER = {labels.SERVICE: "opt", labels.SERVICE_NAMESPACE: "team"}


def make_pack(**spec):
    fields = {"namespace": "team", "product": "H100", "runAsUser": 1000, **spec}
    metadata = {"name": "team-opt-0", "uid": "pack-uid", "labels": {**OPENER, "other": "x"}}
    return GPUPack.model_validate({"metadata": metadata, "spec": fields})


def make_holder(pack=None, node=None, **template):
    return holder_pod(
        pack or make_pack(),
        TemplateSpec.model_validate(template),
        OperatorImage("op:1", "Always"),
        "tightship-system",
        node,
    )


def containers(pod):
    return {each["name"]: each for each in pod["spec"]["containers"]}


def test_only_the_daemon_s_container_takes_a_gpu():
    pod = make_holder()
    gpus = {
        name: each["resources"].get("limits", {}).get(labels.GPU_RESOURCE) for name, each in containers(pod).items()
    }
    assert gpus == {"mps": "1", "watch": None}
    values = {each["name"]: each.get("value") for each in containers(pod)["watch"]["env"]}
    assert values["NVIDIA_VISIBLE_DEVICES"] == "none"


def test_the_daemon_runs_as_the_replicas_user_and_the_directory_is_prepared_by_root():
    pod = make_holder()
    assert {name: each["securityContext"]["runAsUser"] for name, each in containers(pod).items()} == {
        "mps": 1000,
        "watch": 1000,
    }
    prepare = pod["spec"]["initContainers"][0]
    assert prepare["securityContext"]["runAsUser"] == 0
    assert prepare["command"] == ["tightship", "node", "prepare", "--dir", "/run/tightship/pack", "--uid", "1000"]


def test_it_outlives_its_replicas_and_is_not_evicted_by_an_autoscaler():
    pod = make_holder()
    assert pod["spec"]["hostPID"] is True
    assert pod["spec"]["terminationGracePeriodSeconds"] == GRACE_SECONDS > replicas.GRACE_SECONDS
    assert pod["metadata"]["annotations"] == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    assert pod["metadata"]["ownerReferences"][0]["kind"] == "GPUPack"


@pytest.mark.parametrize(
    ("pack", "node", "fields"),
    [
        (make_pack(), None, []),
        (make_pack(excludedNodes=["bad"]), None, [{"key": "metadata.name", "operator": "NotIn", "values": ["bad"]}]),
        (make_pack(excludedNodes=["bad"]), "n0", [{"key": "metadata.name", "operator": "In", "values": ["n0"]}]),
    ],
)
def test_where_it_may_go(pack, node, fields):
    affinity = make_holder(pack, node)["spec"]["affinity"]["nodeAffinity"]
    term = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]
    assert term["matchExpressions"] == [{"key": labels.NODE_GPU_PRODUCT, "operator": "In", "values": ["H100"]}]
    assert term.get("matchFields", []) == fields


def test_it_takes_the_scheduling_of_the_service():
    toleration = {"key": "gpu", "operator": "Exists"}
    pod = make_holder(
        tolerations=[toleration], priorityClassName="high", runtimeClassName="nvidia", nodeSelector={"zone": "a"}
    )
    spec = pod["spec"]
    assert spec["tolerations"] == [toleration]
    assert (spec["priorityClassName"], spec["runtimeClassName"], spec["nodeSelector"]) == (
        "high",
        "nvidia",
        {"zone": "a"},
    )


def test_constraints_spread_the_holders_of_one_service():
    """Replicas have no choice of node, so the GPUs are what spreads: those of this service, not every holder's."""
    given = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
    pod = make_holder(topologySpreadConstraints=[given])
    (made,) = pod["spec"]["topologySpreadConstraints"]
    assert {name: value for name, value in made.items() if name != "labelSelector"} == given
    selected = made["labelSelector"]["matchLabels"]
    assert selected == {labels.COMPONENT: "holder", **OPENER}
    assert selected.items() <= pod["metadata"]["labels"].items()


def test_a_holder_made_anew_goes_to_its_pack_whatever_the_spread():
    given = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}
    assert "topologySpreadConstraints" not in make_holder(node="n0", topologySpreadConstraints=[given])["spec"]


def test_its_token_reaches_its_own_pod_only():
    account, role, binding = holder_access(make_pack(), "tightship-system")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "resourceNames": ["holder-team-opt-0"], "verbs": ["get", "patch"]}
    ]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "holder-team-opt-0", "namespace": "tightship-system"}
    ]
    assert account["automountServiceAccountToken"] is False
