"""The operator as a process, against any control plane: start, stand by, hand over, restart, and what it must leave alone.

No node is needed: a profile whose measurements come with it (`spec.results`) goes the whole way through queue, apply, status
and events, and one that has to be measured gets as far as its Job.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from story import PRODUCT, make_profile, make_service, serves
from tightship.api.v1alpha1.labels import NODE_GPU_PRODUCT
from tightship.sandbox.cluster import Sandbox

T = TypeVar("T")
LEASE = ("--lease-duration=4", "--lease-renew-deadline=3", "--lease-retry=0.5")


class OperatorProcess:
    """`tightship run` against a sandbox's API."""

    def __init__(self, sandbox: Sandbox, log: Path, *arguments: str) -> None:
        self._log = log
        self._from = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "tightship", "run", "--kubeconfig", str(sandbox.kubeconfig)]
        telemetry = ["--telemetry-host=127.0.0.1", "--telemetry-port=0"]
        with log.open("ab") as output:
            self.process = subprocess.Popen([*command, *telemetry, *LEASE, *arguments], stderr=output)

    @property
    def log(self) -> str:
        return self._log.read_text()[self._from :]

    @property
    def leads(self) -> bool:
        return self.metric("leader") == 1

    def ask(self, path: str) -> tuple[int, str]:
        """Status and body of /healthz, /readyz or /metrics; (0, "") while nobody listens."""
        found = re.search(r"telemetry on (http://\S+)", self.log)
        if not found:
            return 0, ""
        try:
            with urllib.request.urlopen(f"{found[1]}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str, **wanted: str) -> float:
        """Sum of a metric's samples whose labels are as wanted."""
        total = 0.0
        for line in self.ask("/metrics")[1].splitlines():
            head, _, value = line.rpartition(" ")
            if re.match(rf"tightship_operator_{name}(_total)?($|{{)", head) and all(
                f'{key}="{text}"' in head for key, text in wanted.items()
            ):
                total += float(value)
        return total

    def at_rest(self) -> bool:
        """Whether it leads, has looked at everything, and has nothing left to do."""
        busy = self.metric("queue_depth") + self.metric("queue_active")
        return self.ask("/readyz")[0] == 200 and self.leads and self.metric("reconciles") > 0 and busy == 0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def running(sandbox: Sandbox, log: Path, *arguments: str) -> Iterator[OperatorProcess]:
    operator = OperatorProcess(sandbox, log, *arguments)
    try:
        yield operator
    finally:
        if operator.process.poll() is None:
            operator.stop(signal.SIGKILL)


def eventually(look: Callable[[], T], why: Callable[[], str], seconds: float = 40) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)
    return answer


def until_at_rest(operator: OperatorProcess) -> None:
    eventually(operator.at_rest, lambda: f"{operator.ask('/readyz')}\n{operator.log[-3000:]}")


def get(sandbox: Sandbox, *what: str) -> Any:
    return json.loads(sandbox.kubectl("get", *what, "-o", "json"))


def create(sandbox: Sandbox, obj: dict[str, Any]) -> None:
    sandbox.kubectl("create", "--validate=false", "-f", "-", stdin=json.dumps(obj))


def imported(name: str, namespace: str = "default") -> dict[str, Any]:
    """A profile that comes with its measurements."""
    profile = make_profile(make_service(), name=name)
    profile["metadata"]["namespace"] = namespace
    return profile


def to_measure(name: str) -> dict[str, Any]:
    """A profile that has to be measured."""
    profile = imported(name)
    del profile["spec"]["results"]
    return profile


def condition(sandbox: Sandbox, name: str, kind: str) -> tuple[str, str]:
    found = get(sandbox, "bprof", name).get("status", {}).get("conditions", [])
    return next(((each["status"], each["reason"]) for each in found if each["type"] == kind), ("", ""))


def await_condition(sandbox: Sandbox, operator: OperatorProcess, name: str, kind: str, value: tuple[str, str]) -> None:
    def why() -> str:
        return f"{name}: {kind} is {condition(sandbox, name, kind)}, not {value}\n{operator.log[-3000:]}"

    eventually(lambda: condition(sandbox, name, kind) == value, why)


# --- the stories ---


def a_profile_is_answered_and_nothing_of_the_framework_lands_on_it(sandbox: Sandbox, log: Path) -> None:
    with running(sandbox, log) as operator:
        until_at_rest(operator)
        create(sandbox, imported("git"))
        await_condition(sandbox, operator, "git", "Complete", ("True", "Imported"))
        profile = get(sandbox, "bprof", "git", "--show-managed-fields")
        assert "finalizers" not in profile["metadata"]
        assert "annotations" not in profile["metadata"]
        assert {entry["manager"] for entry in profile["metadata"]["managedFields"]} <= {
            "kubectl-create",
            "tightship-status",
        }
        eventually(
            lambda: "Imported" in sandbox.kubectl("get", "events", "-o", "custom-columns=R:.reason", "--no-headers"),
            lambda: operator.log,
        )
        assert operator.stop() == 0


def reconciling_again_changes_nothing(sandbox: Sandbox, log: Path) -> None:
    def versions() -> dict[str, str]:
        found = get(sandbox, "bprof,jobs,sa,roles,rolebindings,events", "-A")["items"]
        return {f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for o in found}

    with running(sandbox, log) as operator:
        until_at_rest(operator)
        create(sandbox, imported("again"))
        create(sandbox, to_measure("measured"))
        await_condition(sandbox, operator, "again", "Complete", ("True", "Imported"))
        await_condition(sandbox, operator, "measured", "Progressing", ("True", "Unschedulable"))
        eventually(lambda: "measured-1" in sandbox.kubectl("get", "jobs", "-o", "name"), lambda: operator.log)
        until_at_rest(operator)
        before = eventually(lambda: settled(versions, operator), lambda: "versions keep changing")
        assert operator.stop() == 0
    with running(sandbox, log) as operator:
        until_at_rest(operator)
        eventually(lambda: operator.metric("watch_events", kind="BatchProfile") >= 2, lambda: operator.log)
        until_at_rest(operator)
        assert versions() == before
        assert operator.stop() == 0


def settled(look: Callable[[], T], operator: OperatorProcess) -> T | None:
    """What `look` sees, when it sees the same before and after a moment at rest."""
    before = look()
    until_at_rest(operator)
    return before if look() == before else None


def one_leads_and_another_takes_over(sandbox: Sandbox, log: Path) -> None:
    with running(sandbox, log) as first:
        until_at_rest(first)
        with running(sandbox, log.with_suffix(".second")) as second:
            eventually(lambda: "standing by" in second.log, lambda: second.log)
            assert second.ask("/readyz")[0] == 200
            assert not second.leads
            create(sandbox, imported("first"))
            await_condition(sandbox, first, "first", "Complete", ("True", "Imported"))
            assert second.metric("reconciles") == 0
            first.stop(signal.SIGKILL)
            create(sandbox, imported("second"))
            await_condition(sandbox, second, "second", "Complete", ("True", "Imported"))
            assert second.stop() == 0
            assert not get(sandbox, "lease", "tightship-operator", "-n", "tightship-system")["spec"]["holderIdentity"]


def losing_the_lease_ends_the_process(sandbox: Sandbox, log: Path) -> None:
    with running(sandbox, log) as operator:
        until_at_rest(operator)
        stolen = json.dumps({"spec": {"holderIdentity": "somebody else"}})
        patch = ("patch", "lease", "tightship-operator", "-n", "tightship-system", "--type=merge", "-p")
        try:
            sandbox.kubectl(*patch, stolen)
            assert operator.process.wait(30) == 1
            assert "held by somebody else now" in operator.log
        finally:
            sandbox.kubectl(*patch, json.dumps({"spec": {"holderIdentity": ""}}))


def a_leader_that_was_paused_writes_nothing_more(sandbox: Sandbox, log: Path) -> None:
    """It is stopped in the midst of leading; another takes over in seconds; what it then wakes up to, it leaves alone."""
    with running(sandbox, log) as first, ExitStack() as later:
        until_at_rest(first)
        second = later.enter_context(running(sandbox, log.with_suffix(".second")))
        eventually(lambda: "standing by" in second.log, lambda: second.log)
        first.process.send_signal(signal.SIGSTOP)
        paused = time.monotonic()
        create(sandbox, imported("second"))
        await_condition(sandbox, second, "second", "Complete", ("True", "Imported"))
        assert time.monotonic() - paused < 15  # 4 s of lease, 0.5 s to look, and its start
        holder = lease_holder(sandbox)
        second.process.send_signal(signal.SIGSTOP)
        try:
            create(sandbox, imported("third"))  # work for whoever believes to lead
            first.process.send_signal(signal.SIGCONT)
            eventually(lambda: "stopping: lease" in first.log, lambda: first.log[-3000:])
            assert "status" not in get(sandbox, "bprof", "third")
            assert lease_holder(sandbox) == holder
        finally:
            second.process.send_signal(signal.SIGCONT)
        assert first.process.wait(30) == 1
        await_condition(sandbox, second, "third", "Complete", ("True", "Imported"))
        assert lease_holder(sandbox) == holder


def lease_holder(sandbox: Sandbox) -> str:
    found = get(sandbox, "lease", "tightship-operator", "-n", "tightship-system")
    return str(found["spec"]["holderIdentity"])


def a_job_that_is_not_ours_is_left_alone(sandbox: Sandbox, log: Path) -> None:
    container = {"name": "c", "image": "theirs"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    foreign = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "taken-1"}, "spec": {"template": template}}
    create(sandbox, foreign)
    before = get(sandbox, "job", "taken-1")["spec"]
    with running(sandbox, log) as operator:
        until_at_rest(operator)
        create(sandbox, to_measure("taken"))
        await_condition(sandbox, operator, "taken", "Progressing", ("True", "NameConflict"))
        assert get(sandbox, "job", "taken-1")["spec"] == before
        sandbox.kubectl("delete", "job", "taken-1")
        assert operator.stop() == 0


def lengths_are_read_from_a_config_map_with_the_label(sandbox: Sandbox, log: Path) -> None:
    """The label may come, go and come again: the watch is by label, and says DELETED of what only lost it."""
    service = make_service(
        "lengths", workload={"lengthsFrom": {"configMap": {"name": "chat", "key": "lengths.csv"}}}, replicas=0
    )

    def accepted(*wanted: str) -> None:
        def now() -> tuple[str, str]:
            found = get(sandbox, "llm", "lengths").get("status", {}).get("conditions", [])
            return next(((each["status"], each["reason"]) for each in found if each["type"] == "Accepted"), ("", ""))

        eventually(lambda: now() == wanted, lambda: f"Accepted is {now()}, not {wanted}\n{operator.log[-3000:]}")

    with running(sandbox, log) as operator:
        until_at_rest(operator)
        create(
            sandbox,
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "chat"}, "data": {"lengths.csv": "1,2"}},
        )
        create(sandbox, service)
        accepted("False", "InvalidSpec")
        for _ in range(2):
            sandbox.kubectl("label", "configmap", "chat", "tightship.dev/lengths=")
            accepted("False", "UnsupportedAccelerator")  # read: what is missing now is a node
            sandbox.kubectl("label", "configmap", "chat", "tightship.dev/lengths-")
            accepted("False", "InvalidSpec")
        sandbox.kubectl("delete", "llm/lengths", "configmap/chat")
        assert operator.stop() == 0


SCALE = "/apis/tightship.dev/v1alpha1/namespaces/default/llmservices/scaled/scale"


def the_scale_subresource_is_read_and_written(sandbox: Sandbox, log: Path) -> None:
    """What an autoscaler does: GET, then PUT, of `/scale`; `kubectl scale` patches the same."""
    with running(sandbox, log) as operator:
        until_at_rest(operator)
        create(sandbox, make_service("scaled", replicas=2))

        def scale() -> Any:
            return json.loads(sandbox.kubectl("get", "--raw", SCALE))

        found = eventually(lambda: scale() if scale()["status"].get("selector") else None, lambda: operator.log[-3000:])
        assert (found["kind"], found["apiVersion"], found["spec"]) == ("Scale", "autoscaling/v1", {"replicas": 2})
        assert found["status"]["replicas"] == 0
        assert "app.kubernetes.io/component=replica" in found["status"]["selector"].split(",")

        found["spec"]["replicas"] = 5
        answer = json.loads(sandbox.kubectl("replace", "--raw", SCALE, "-f", "-", stdin=json.dumps(found)))
        assert answer["spec"] == {"replicas": 5}
        assert get(sandbox, "llm", "scaled")["spec"]["replicas"] == 5
        stale = sandbox.kubectl("replace", "--raw", SCALE, "-f", "-", stdin=json.dumps(found), check=False)
        assert "the object has been modified" in stale, "an autoscaler that looked too early starts over"
        sandbox.kubectl("scale", "llm/scaled", "--replicas=3", "--current-replicas=5")
        assert scale()["spec"] == {"replicas": 3}
        generation = get(sandbox, "llm", "scaled")["metadata"]["generation"]
        eventually(
            lambda: get(sandbox, "llm", "scaled")["status"].get("observedGeneration") == generation,
            lambda: operator.log[-3000:],
        )
        sandbox.kubectl("delete", "llm/scaled")
        assert operator.stop() == 0


def a_budget_is_made_where_the_cluster_has_them(sandbox: Sandbox, log: Path) -> None:
    """Made, followed, mended, gone with its service; one that isn't ours is left alone and in nobody's way. Where policy/v1 is absent it is said."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "bare", "labels": {NODE_GPU_PRODUCT: PRODUCT}}}
    create(sandbox, node)
    try:
        with running(sandbox, log) as operator:
            until_at_rest(operator)
            create(sandbox, make_service("kept", replicas=4))

            def said(name: str) -> dict[str, str]:
                found = get(sandbox, "llm", name).get("status", {}).get("conditions", [])
                return next((each for each in found if each["type"] == "Accepted"), {})

            def accepted(name: str) -> tuple[str, str]:
                return said(name).get("status", ""), said(name).get("reason", "")

            def accepted_words(name: str) -> str:
                return said(name).get("message", "")

            def why() -> str:
                return sandbox.kubectl("get", "llm,pdb", "-o", "yaml", check=False)[-3000:] + operator.log[-3000:]

            eventually(lambda: accepted("kept") == ("True", "Valid"), why)
            if not serves(sandbox, "policy/v1"):
                assert "doesn't serve policy/v1 (PodDisruptionBudget)" in operator.log
                assert operator.metric("api_requests", kind="PodDisruptionBudget", code="404") == 1, (
                    "asked once, no more"
                )
                assert operator.stop() == 0
                return

            def allowed() -> Any:
                return (
                    json.loads(sandbox.kubectl("get", "pdb", "kept", "-o", "json", "--ignore-not-found") or "{}")
                    .get("spec", {})
                    .get("maxUnavailable")
                )

            eventually(lambda: allowed() == 1, why)
            sandbox.kubectl(
                "patch", "llm", "kept", "--type=merge", "-p", '{"spec": {"rollout": {"maxUnavailable": "50%"}}}'
            )
            eventually(lambda: allowed() == "50%", why)
            sandbox.kubectl("delete", "pdb", "kept")
            eventually(lambda: allowed() == "50%", why)
            sandbox.kubectl("create", "poddisruptionbudget", "taken", "--min-available=1", "--selector=app=x")
            create(sandbox, make_service("taken", replicas=0))
            eventually(lambda: "without a budget of its own" in accepted_words("taken"), why)
            assert accepted("taken") == ("True", "Valid")
            there = json.loads(sandbox.kubectl("get", "pdb", "taken", "-o", "json"))
            assert (there["spec"].get("minAvailable"), "ownerReferences" in there["metadata"]) == (1, False)
            sandbox.kubectl("delete", "llm/kept", "llm/taken", "pdb/taken")
            eventually(lambda: allowed() is None, why)
            assert operator.stop() == 0
    finally:
        sandbox.kubectl("delete", "llm,node", "--all", check=False)


POOLS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "inferencepools.inference.networking.k8s.io",
        # Kubernetes asks for it in groups of its own; the rest of the text is free.
        "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
    },
    "spec": {
        "group": "inference.networking.k8s.io",
        "names": {"kind": "InferencePool", "plural": "inferencepools", "singular": "inferencepool"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                        },
                    }
                },
            }
        ],
    },
}
"""The kind as far as the operator meets it; what goes into it is validated elsewhere."""


def a_pool_is_made_where_the_cluster_has_them(sandbox: Sandbox, log: Path) -> None:
    """Asked of a cluster without the kind, the Service stands alone and it is said; with it, the pool comes and goes with the mode."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "bare", "labels": {NODE_GPU_PRODUCT: PRODUCT}}}
    create(sandbox, node)
    routing = {"mode": "InferencePool", "endpointPicker": {"name": "epp"}}
    create(sandbox, make_service("routed", replicas=0, routing=routing))

    def accepted() -> str:
        found = get(sandbox, "llm", "routed").get("status", {}).get("conditions", [])
        return next((each["message"] for each in found if each["type"] == "Accepted" and each["status"] == "True"), "")

    def pools() -> list[Any]:
        return list(get(sandbox, "inferencepools")["items"])

    try:
        with running(sandbox, log) as operator:
            eventually(
                lambda: "doesn't serve inference.networking.k8s.io/v1" in accepted(), lambda: operator.log[-3000:]
            )
            assert operator.stop() == 0
        create(sandbox, POOLS)
        sandbox.kubectl("wait", "crd/inferencepools.inference.networking.k8s.io", "--for=condition=Established")
        with running(sandbox, log) as operator:
            (pool,) = eventually(pools, lambda: operator.log[-3000:])
            assert pool["spec"]["targetPorts"] == [{"number": 8000}]
            assert pool["metadata"]["ownerReferences"][0]["name"] == "routed"
            eventually(lambda: "inference.networking" not in accepted() and accepted(), accepted)
            sandbox.kubectl(
                "patch", "llm", "routed", "--type=merge", "-p", '{"spec": {"routing": {"mode": "Service"}}}'
            )
            eventually(lambda: not pools(), lambda: operator.log[-3000:])
            assert get(sandbox, "svc", "routed")["spec"]["selector"]
            assert operator.stop() == 0
    finally:
        sandbox.kubectl("delete", "llm,node", "--all", check=False)
        sandbox.kubectl("delete", "crd", "inferencepools.inference.networking.k8s.io", check=False)


def a_namespace_goes_away_with_everything_in_it(sandbox: Sandbox, log: Path) -> None:
    with running(sandbox, log) as operator:
        until_at_rest(operator)
        create(sandbox, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "short-lived"}})
        create(sandbox, imported("p", "short-lived"))
        eventually(
            lambda: get(sandbox, "bprof", "p", "-n", "short-lived").get("status", {}).get("phase") == "Complete",
            lambda: operator.log,
        )
        sandbox.kubectl("delete", "namespace", "short-lived", "--wait=false")
        eventually(
            lambda: "short-lived" not in sandbox.kubectl("get", "namespaces", "-o", "name"),
            lambda: sandbox.kubectl("get", "namespace", "short-lived", "-o", "yaml", check=False) + operator.log,
        )
        until_at_rest(operator)
        assert operator.stop() == 0


def it_waits_for_its_kinds_and_says_so(sandbox: Sandbox, log: Path) -> None:
    crds = Path(__file__).resolve().parent.parent / "crds"
    sandbox.kubectl("delete", "crd", "gpupacks.tightship.dev")
    try:
        with running(sandbox, log) as operator:
            eventually(lambda: "doesn't serve" in operator.ask("/readyz")[1], lambda: operator.log)
            status, text = operator.ask("/readyz")
            assert status == 503
            assert "install the CustomResourceDefinitions" in text
            assert operator.ask("/healthz")[0] == 200
            sandbox.kubectl("create", "--validate=false", "-f", str(crds / "gpupacks.yaml"))
            until_at_rest(operator)
            assert operator.stop() == 0
    finally:
        sandbox.kubectl("create", "--validate=false", "-f", str(crds / "gpupacks.yaml"), check=False)


STORIES = (
    a_profile_is_answered_and_nothing_of_the_framework_lands_on_it,
    reconciling_again_changes_nothing,
    one_leads_and_another_takes_over,
    losing_the_lease_ends_the_process,
    a_leader_that_was_paused_writes_nothing_more,
    a_job_that_is_not_ours_is_left_alone,
    lengths_are_read_from_a_config_map_with_the_label,
    the_scale_subresource_is_read_and_written,
    a_budget_is_made_where_the_cluster_has_them,
    a_pool_is_made_where_the_cluster_has_them,
    a_namespace_goes_away_with_everything_in_it,
    it_waits_for_its_kinds_and_says_so,
)


def clean(sandbox: Sandbox) -> None:
    """Leave nothing to the next story."""
    sandbox.kubectl("delete", "bprof,jobs,events", "--all", "--wait=true", check=False)
