"""What the node agent must do for plain pods, told once and run on both control planes.

Each story is a function of a `Sandbox` with two nodes of two GPUs each, whose agent was given short time constants. It drives the
cluster with kubectl, waits for conditions, and leaves its namespace empty.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tightship.sandbox.cluster import Sandbox

STORIES: list[Callable[[Sandbox], None]] = []
TIMING = {"backoff_first": 1.0, "backoff_max": 4.0, "retry": 0.5, "refresh": 1.0}
IMAGE = "tightship/host:1"


def told(function: Callable[[Sandbox], None]) -> Callable[[Sandbox], None]:
    """Register a story."""
    STORIES.append(function)
    return function


def make_pod(name: str, script: str, **changes: Any) -> dict[str, Any]:
    """A pod of one container `c` that runs a shell script; `changes` are of the container, `pod__*` of the pod's spec."""
    container = {"name": "c", "image": IMAGE, "command": ["bash", "-c", script]}
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}
    for key, value in changes.items():
        if key.startswith("pod__"):
            spec[key.removeprefix("pod__")] = value
        else:
            container[key] = value
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def make(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    """A core object."""
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **fields}


def apply(sandbox: Sandbox, *objects: dict[str, Any]) -> None:
    sandbox.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))


def get(sandbox: Sandbox, *words: str) -> dict[str, Any]:
    text = sandbox.kubectl("get", *words, "-o", "json", "--ignore-not-found")
    return dict(json.loads(text)) if text.strip() else {}


def until(what: str, holds: Callable[[], Any], seconds: float = 40) -> Any:
    """Poll until `holds()` is true and return it."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.1)
    return found


def phase(sandbox: Sandbox, pod: str, *wanted: str) -> dict[str, Any]:
    """Wait until a pod has one of these phases and return it."""

    def reached() -> dict[str, Any] | None:
        found = get(sandbox, "pod", pod)
        return found if found.get("status", {}).get("phase") in wanted else None

    try:
        return dict(until(f"pod {pod} is {' or '.join(wanted)}", reached))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{sandbox.kubectl('describe', 'pod', pod, check=False)}") from error


def state(pod: dict[str, Any], container: str = "c") -> dict[str, Any]:
    return next(dict(s) for s in pod["status"]["containerStatuses"] if s["name"] == container)


def conditions(pod: dict[str, Any]) -> dict[str, str]:
    return {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}


def output(sandbox: Sandbox, pod: str, script: str, **changes: Any) -> str:
    """Run a pod to its end and return its log."""
    apply(sandbox, make_pod(pod, script, **changes))
    found = phase(sandbox, pod, "Succeeded", "Failed")
    log = sandbox.kubectl("logs", pod, check=False)
    assert found["status"]["phase"] == "Succeeded", f"{found['status']}\n{log}"
    return log


def clean(sandbox: Sandbox) -> None:
    others = ("--field-selector", "metadata.name!=kubernetes", "--wait=false", "--now", "--ignore-not-found")
    for kind in ("sts", "job", "svc", "pod"):
        sandbox.kubectl("delete", kind, *others)
    until("no pod is left", lambda: not get(sandbox, "pods").get("items"))


def mount(name: str, path: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **more}


@told
def a_stateful_set_answers_behind_its_service(sandbox: Sandbox) -> None:
    """Pods with addresses of their own all listen on port 8000; the Service reaches each of them, and only ready ones."""
    script = "mkdir /run/www; hostname > /run/www/name; exec python3 -m http.server 8000 --directory /run/www"
    template = make_pod("web", script, ports=[{"containerPort": 8000, "name": "http"}])
    template["spec"]["restartPolicy"] = "Always"
    probe = {"httpGet": {"path": "/name", "port": "http"}, "periodSeconds": 1, "failureThreshold": 1}
    template["spec"]["containers"][0]["readinessProbe"] = probe
    labels = {"app": "web"}
    port = {"port": 80, "targetPort": "http", "name": "http"}
    service = make("Service", "web", spec={"selector": labels, "ports": [port]})
    stateful = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "web", "labels": labels},
        "spec": {
            "serviceName": "web",
            "replicas": 3,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
        },
    }
    apply(sandbox, service, stateful)
    sandbox.kubectl("rollout", "status", "sts/web", "--timeout=60s")
    pods = get(sandbox, "pods", "-l", "app=web")["items"]
    addresses = {pod["status"]["podIP"] for pod in pods}
    assert len(addresses) == 3
    assert {pod["status"]["hostIP"] for pod in pods} <= {"10.244.1.1", "10.244.2.1"}

    def ask() -> str:
        try:
            with urllib.request.urlopen(f"{sandbox.gateway_url}/default/web/name", timeout=10) as answer:
                return str(answer.read().decode().strip())
        except urllib.error.HTTPError as error:  # of the one without the file, while it is still thought ready
            return str(error)

    until("all three answer", lambda: {ask() for _ in range(9)} == {"web-0", "web-1", "web-2"})
    sandbox.kubectl("exec", "web-0", "--", "rm", "/run/www/name")
    until("the unready one is left out", lambda: {ask() for _ in range(9)} == {"web-1", "web-2"})
    assert conditions(get(sandbox, "pod", "web-0"))["Ready"] == "False"
    sandbox.kubectl("scale", "sts/web", "--replicas=1")
    until("two are gone", lambda: len(get(sandbox, "pods", "-l", "app=web")["items"]) == 1)
    sandbox.kubectl("delete", "sts,svc", "web")


@told
def a_job_runs_and_its_end_is_told(sandbox: Sandbox) -> None:
    """Init containers run first and in order; exit codes, reasons and messages reach the status."""
    volume = {"name": "v", "emptyDir": {}}
    mounts = [mount("v", "/data/deep/inside")]
    inits = [
        {
            "name": name,
            "image": IMAGE,
            "command": ["sh", "-c", f"echo {name} >> /o/log"],
            "volumeMounts": [mount("v", "/o")],
        }
        for name in ("first", "second")
    ]
    spec = make_pod(
        "j", "cat /data/deep/inside/log", volumeMounts=mounts, pod__volumes=[volume], pod__initContainers=inits
    )
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "j"},
        "spec": {"template": {"spec": spec["spec"]}},
    }
    apply(sandbox, job)
    sandbox.kubectl("wait", "job/j", "--for=condition=complete", "--timeout=40s")
    assert sandbox.kubectl("logs", "job/j").split() == ["first", "second"]

    apply(
        sandbox,
        make_pod("told", "echo from the file > /dev/termination-log; exit 3"),
        make_pod("logged", "echo one; echo two; exit 4", terminationMessagePolicy="FallbackToLogsOnError"),
        make_pod("absent", "", command=["/no/such/program"]),
        make_pod("fine", "true"),
    )
    ends = {
        name: state(phase(sandbox, name, "Failed", "Succeeded"))["state"]["terminated"]
        for name in ("told", "logged", "absent", "fine")
    }
    assert (ends["told"]["exitCode"], ends["told"]["reason"], ends["told"]["message"]) == (
        3,
        "Error",
        "from the file\n",
    )
    assert (ends["logged"]["exitCode"], ends["logged"]["message"]) == (4, "one\ntwo")
    assert (ends["absent"]["exitCode"], ends["absent"]["reason"]) == (128, "StartError")
    assert "/no/such/program" in ends["absent"]["message"]
    assert (ends["fine"]["exitCode"], ends["fine"]["reason"]) == (0, "Completed")
    sandbox.kubectl("delete", "job", "j")


@told
def references_reach_the_container(sandbox: Sandbox) -> None:
    """Environment and volumes from ConfigMaps, Secrets, the downward API, and a token the API server accepts."""
    apply(
        sandbox,
        make("ConfigMap", "cm", data={"a": "from-config", "file.txt": "content"}),
        make("Secret", "sec", stringData={"key": "hidden"}),
    )
    env = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "requests.memory", "divisor": "1Mi"}}},
        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "a"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "key"}}},
        {"name": "BOTH", "value": "$(NAME)/$(A)/$(NONE)/$$(A)"},
    ]
    projected = {
        "name": "p",
        "projected": {
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            ]
        },
    }
    call = (
        "import os,ssl,urllib.request as u,urllib.error;"
        "c=ssl.create_default_context(cafile='/var/run/secrets/t/ca.crt');"
        "h=os.environ['KUBERNETES_SERVICE_HOST']+':'+os.environ['KUBERNETES_SERVICE_PORT'];"
        "r=u.Request('https://'+h+'/apis',headers={'Authorization':'Bearer '+open('/var/run/secrets/t/token').read()});"
        "print('apis', u.urlopen(r,context=c).status)"
    )
    script = (
        f'echo $NAME $IP $CPUS $MEM $KEY "$BOTH" $PRE_a; cat /etc/cm/file.txt /etc/one; echo; cat /var/run/secrets/t/labels; echo; '
        f'python3 -c "{call}"'
    )
    log = output(
        sandbox,
        "refs",
        script,
        env=env,
        envFrom=[{"prefix": "PRE_", "configMapRef": {"name": "cm"}}],
        resources={"limits": {"cpu": "1500m", "memory": "64Mi"}},
        volumeMounts=[mount("cm", "/etc/cm"), mount("cm", "/etc/one", subPath="a"), mount("p", "/var/run/secrets/t")],
        pod__volumes=[{"name": "cm", "configMap": {"name": "cm"}}, projected],
    ).splitlines()
    address = get(sandbox, "pod", "refs")["status"]["podIP"]
    assert log[0] == f"refs {address} 2 64 hidden refs/from-config/$(NONE)/$(A) from-config"
    assert log[1] == "contentfrom-config"
    assert log[2] == 'app="refs"'
    assert log[3] == "apis 200"

    missing = {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "late", "key": "x"}}}
    apply(sandbox, make_pod("late", "echo $X", env=[missing]))
    until(
        "the missing ConfigMap is named",
        lambda: 'configmap "late" not found' in str(get(sandbox, "pod", "late")["status"].get("containerStatuses")),
    )
    waiting = state(get(sandbox, "pod", "late"))["state"]["waiting"]
    assert waiting["reason"] == "CreateContainerConfigError"
    apply(sandbox, make("ConfigMap", "late", data={"x": "at last"}))
    phase(sandbox, "late", "Succeeded")
    assert sandbox.kubectl("logs", "late") == "at last\n"
    sandbox.kubectl("delete", "cm", "cm", "late")
    sandbox.kubectl("delete", "secret", "sec")


@told
def volumes_stay_where_they_belong(sandbox: Sandbox) -> None:
    """A hostPath is the node's own; /run, /dev/shm and every mount point are the container's; nothing lands on the machine."""
    probe = f"sandbox-probe-{os.getpid()}"
    host = {"name": "h", "hostPath": {"path": f"/run/{probe}", "type": "DirectoryOrCreate"}}
    script = (
        f"echo $NODE > /run/{probe}/me; cat /run/{probe}/me; touch /dev/shm/{probe} /run/{probe}.own; ls /run; mount -t proc"
        f" > /dev/null; touch /{probe}/x; ls -d /{probe}; touch /etc/{probe}/y; hostname; cat /etc/hostname > /dev/null"
    )
    env = [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]
    mounts = [
        mount("h", f"/run/{probe}"),
        mount("e", f"/{probe}"),
        mount("e", f"/etc/{probe}"),
        mount("e", f"/opt/a/{probe}/b"),
    ]
    for node in ("sandbox-0", "sandbox-1"):
        log = output(
            sandbox,
            f"vol-{node[-1]}",
            script,
            env=env,
            volumeMounts=mounts,
            pod__volumes=[host, {"name": "e", "emptyDir": {}}],
            pod__nodeName=node,
        ).split()
        assert log[0] == node
        assert set(log[1:-2]) <= {probe, f"{probe}.own", "secrets"}
        assert log[-1] == f"vol-{node[-1]}"
        assert (sandbox.node_dir(int(node[-1])) / "root" / "run" / probe / "me").read_text().strip() == node
    for place in ("/run", "/dev/shm", "/", "/etc", "/opt"):
        assert not [name for name in os.listdir(place) if probe in name], f"something of the pod is in {place}"


@told
def probes_decide_over_a_container(sandbox: Sandbox) -> None:
    """Startup holds readiness back; a failing liveness probe restarts; each failure is an event."""
    exists = {"exec": {"command": ["test", "-e", "/run/started"]}, "periodSeconds": 1, "failureThreshold": 30}
    alive = {"exec": {"command": ["test", "!", "-e", "/run/dead"]}, "periodSeconds": 1, "failureThreshold": 2}
    apply(
        sandbox,
        make_pod("probed", "exec sleep 600", startupProbe=exists, livenessProbe=alive, pod__restartPolicy="Always"),
    )
    phase(sandbox, "probed", "Running")
    assert state(get(sandbox, "pod", "probed"))["started"] is False
    assert conditions(get(sandbox, "pod", "probed"))["Ready"] == "False"
    sandbox.kubectl("exec", "probed", "--", "touch", "/run/started")
    sandbox.kubectl("wait", "pod/probed", "--for=condition=Ready", "--timeout=20s")
    sandbox.kubectl("exec", "probed", "--", "touch", "/run/dead")
    until("it was restarted", lambda: state(get(sandbox, "pod", "probed"))["restartCount"] == 1)
    last = state(get(sandbox, "pod", "probed"))["lastState"]["terminated"]
    assert last["exitCode"] in (137, 143)
    events = sandbox.kubectl("get", "events", "--field-selector", "involvedObject.name=probed")
    assert "Startup probe failed" in events
    assert "Liveness probe failed" in events
    assert "failed liveness probe, will be restarted" in events


@told
def a_container_ends_as_it_was_asked_to(sandbox: Sandbox) -> None:
    """preStop comes first, then SIGTERM, then SIGKILL when the grace period is over; no descendant survives."""
    mark = f"descendant-{os.getpid()}"
    volume = {"name": "h", "hostPath": {"path": "/out", "type": "DirectoryOrCreate"}}
    polite = "trap 'echo term >> /out/polite; exit 0' TERM; echo up >> /out/polite; while :; do sleep 0.05; done"
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo prestop >> /out/polite"]}}}
    stubborn = (
        f"trap '' TERM; (exec -a {mark} sleep 1000) & (setsid bash -c 'exec -a {mark} sleep 1000') & wait; sleep 1000"
    )
    shared: dict[str, Any] = {
        "volumeMounts": [mount("h", "/out")],
        "pod__volumes": [volume],
        "pod__nodeName": "sandbox-0",
    }
    apply(
        sandbox,
        make_pod("polite", polite, lifecycle=hook, **{**shared, "pod__terminationGracePeriodSeconds": 20}),
        make_pod("stubborn", stubborn, **shared),
    )
    for name in ("polite", "stubborn"):
        sandbox.kubectl("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=30s")
    written = sandbox.node_dir(0) / "root" / "out" / "polite"
    until("the trap is set", lambda: written.exists() and "up" in written.read_text())
    until("descendants run", lambda: len(processes(mark)) == 2)
    began = time.monotonic()
    sandbox.kubectl("delete", "pod", "polite")
    assert time.monotonic() - began < 10
    assert written.read_text().split() == ["up", "prestop", "term"]
    sandbox.kubectl("delete", "pod", "stubborn")
    assert processes(mark) == []


def processes(mark: str) -> list[int]:
    """Processes of this machine whose name is `mark`."""
    found = subprocess.run(["pgrep", "-f", f"^{mark}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@told
def a_crashing_container_waits_longer_each_time(sandbox: Sandbox) -> None:
    """The first restart is at once, the next ones wait; logs of this and of the previous run can be read."""
    script = "echo run $RANDOM; exit 7"
    apply(sandbox, make_pod("crash", script, pod__restartPolicy="Always"), make_pod("pull", "true", image="nginx:1"))
    until(
        "it crashed three times",
        lambda: state(get(sandbox, "pod", "crash")).get("restartCount", 0) >= 2,
    )

    def waiting() -> dict[str, Any] | None:
        found = state(get(sandbox, "pod", "crash"))
        return found if "waiting" in found["state"] else None

    found = until("it waits", waiting)
    assert found["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    assert found["lastState"]["terminated"]["exitCode"] == 7
    assert sandbox.kubectl("logs", "crash", "--previous").startswith("run ")
    pulled = state(
        until("a status", lambda: (p := get(sandbox, "pod", "pull")) and p["status"].get("containerStatuses") and p)
    )
    assert pulled["state"]["waiting"]["reason"] in ("ErrImagePull", "ImagePullBackOff")
    assert get(sandbox, "pod", "pull")["status"]["phase"] == "Pending"


@told
def logs_can_be_followed_and_cut(sandbox: Sandbox) -> None:
    """kubectl logs: --tail, --timestamps, -f to the end of the container."""
    apply(sandbox, make_pod("talk", "for i in 1 2 3 4; do echo line $i; sleep 0.4; done"))
    until("it runs", lambda: get(sandbox, "pod", "talk")["status"]["phase"] != "Pending")
    assert sandbox.kubectl("logs", "-f", "talk").splitlines() == [f"line {n}" for n in (1, 2, 3, 4)]
    assert sandbox.kubectl("logs", "talk", "--tail=2").splitlines() == ["line 3", "line 4"]
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z line 4", sandbox.kubectl("logs", "talk", "--tail=1", "--timestamps"))


@told
def gpus_go_to_one_container_each(sandbox: Sandbox) -> None:
    """A container sees the GPUs it got; a pod for which none is left waits; a process can be traced to its pod."""
    limits = {"limits": {"nvidia.com/gpu": "1"}}
    names = [f"gpu-{number}" for number in range(4)]
    script = "echo $NVIDIA_VISIBLE_DEVICES; exec sleep 600"
    apply(sandbox, *(make_pod(name, script, resources=limits) for name in names))
    for name in names:
        sandbox.kubectl("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=30s")
    seen = {until("a log", lambda name=name: sandbox.kubectl("logs", name).strip()) for name in names}
    assert len(seen) == 4
    assert all(uuid.startswith("GPU-") for uuid in seen)
    apply(sandbox, make_pod("fifth", script, resources=limits))
    sandbox.kubectl("wait", "pod/fifth", "--for=condition=PodScheduled=False", "--timeout=20s")
    uid = get(sandbox, "pod", "gpu-0")["metadata"]["uid"]
    lines = until("its process is in proc", lambda: cgroups(sandbox, uid))
    assert lines == [f"0::/kubepods/besteffort/pod{uid}/c\n"]
    sandbox.kubectl("delete", "pod", "gpu-1", "--wait=false")
    sandbox.kubectl("wait", "pod/fifth", "--for=condition=Ready", "--timeout=30s")
    refused = make_pod(
        "bound", script, resources=limits, pod__nodeName=get(sandbox, "pod", "gpu-0")["spec"]["nodeName"]
    )
    apply(sandbox, refused)
    assert phase(sandbox, "bound", "Failed")["status"]["reason"] == "UnexpectedAdmissionError"


def cgroups(sandbox: Sandbox, uid: str) -> list[str]:
    """What the agent says of a pod's processes."""
    lines = []
    for node in (0, 1):
        for path in sandbox.node_dir(node).glob("proc/*/cgroup"):
            try:
                text = path.read_text()
            except OSError:
                continue
            if uid in text:
                lines.append(text)
    return lines


@told
def guaranteed_cpus_are_the_engine_cores(sandbox: Sandbox) -> None:
    """A Guaranteed container with whole CPUs runs on the engine cores as far as they go, every other one on the rest."""
    whole = {"limits": {"cpu": "1", "memory": "64Mi"}}
    more = {"limits": {"cpu": "2", "memory": "64Mi"}}
    show = "python3 -c 'import os; print(sorted(os.sched_getaffinity(0)))'"
    cores = sorted(os.sched_getaffinity(0))
    exclusive = output(sandbox, "whole", show, resources=whole).strip()
    assert exclusive == str([cores[-1]]), f"exclusive: {exclusive!r}"
    spread = output(sandbox, "more", show, resources=more).strip()
    assert spread == str(cores), f"more CPUs than the one engine core: {spread!r}"
    shared = output(sandbox, "part", show).strip()
    assert shared == str(cores[:-1] or cores), f"shared: {shared!r}"


@told
def time_limits_and_faults_end_a_pod(sandbox: Sandbox) -> None:
    """activeDeadlineSeconds fails the pod; the memory killer's work shows as OOMKilled and counts as a restart."""
    apply(
        sandbox,
        make_pod("slow", "exec sleep 600", pod__activeDeadlineSeconds=1),
        make_pod("fat", "exec sleep 600", pod__restartPolicy="Always"),
    )
    sandbox.kubectl("wait", "pod/fat", "--for=condition=Ready", "--timeout=30s")
    sandbox.kill_container("fat", "c")
    found = until("it was restarted", lambda: (s := state(get(sandbox, "pod", "fat")))["restartCount"] == 1 and s)
    assert found["lastState"]["terminated"]["reason"] == "OOMKilled"
    assert found["lastState"]["terminated"]["exitCode"] == 137
    assert phase(sandbox, "slow", "Failed")["status"]["reason"] == "DeadlineExceeded"


@told
def a_killed_shim_leaves_no_process(sandbox: Sandbox) -> None:
    """Even when the container's parent is killed before it can clean up, its processes go and it starts again."""
    mark = f"stray-{os.getpid()}"
    script = f"(setsid bash -c 'exec -a {mark} sleep 1000') & exec -a {mark} sleep 1000"
    apply(sandbox, make_pod("stray", script, pod__restartPolicy="Always"))
    until("its processes run", lambda: len(processes(mark)) == 2)
    before = set(processes(mark))
    uid = get(sandbox, "pod", "stray")["metadata"]["uid"]
    assert sandbox.exec_in_namespace(["pkill", "-KILL", "-f", f"shim.py .*{uid}"]).returncode == 0
    until("the old processes are gone", lambda: not before & set(processes(mark)))
    until("it runs again", lambda: state(get(sandbox, "pod", "stray"))["restartCount"] == 1)


@told
def the_agent_may_die_at_any_time(sandbox: Sandbox) -> None:
    """Containers die with it; the next agent starts them again and counts the restart."""
    mark = f"orphan-{os.getpid()}"
    script = f"(exec -a {mark} sleep 1000) & exec -a {mark} sleep 1000"
    apply(sandbox, make_pod("kept", script, pod__restartPolicy="Always"), make_pod("once", "exec sleep 600"))
    for name in ("kept", "once"):
        sandbox.kubectl("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=30s")
    until("its processes run", lambda: len(processes(mark)) == 2)
    sandbox.kill_agent()
    until("its processes are gone", lambda: not processes(mark))
    sandbox.start_agent()
    until("it runs again", lambda: state(get(sandbox, "pod", "kept"))["restartCount"] == 1)
    sandbox.kubectl("wait", "pod/kept", "--for=condition=Ready", "--timeout=30s")
    assert phase(sandbox, "once", "Failed")["status"]["containerStatuses"][0]["restartCount"] == 0


def no_leftovers(state_directory: Path) -> list[str]:
    """Processes that still mention a sandbox's directory."""
    found = subprocess.run(["pgrep", "-af", str(state_directory)], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if "pgrep" not in line]
