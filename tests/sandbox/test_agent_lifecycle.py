"""A sandbox comes up, is used, and ends, whatever ends it: nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import agent_stories
from tightship.sandbox import network
from tightship.sandbox.cluster import Sandbox, SandboxError
from tightship.sandbox.real import AssetsError

pytestmark = pytest.mark.needs("network_namespace", "kubectl")

TIGHTSHIP = [sys.executable, "-m", "tightship", "sandbox"]
SMALL = ["--no-operator", "--nodes", "1", "--gpus-per-node", "0"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(words), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Path]:
    """The directory of a sandbox that `up` started."""
    state = tmp_path / "state"
    started = run(*TIGHTSHIP, "up", *SMALL, "--state", str(state))
    assert started.returncode == 0, started.stderr
    assert f"export KUBECONFIG={state}/kubeconfig" in started.stdout
    yield state
    run(*TIGHTSHIP, "down", "--state", str(state))


def gone(state: Path) -> None:
    agent_stories.until(f"nothing of {state} runs", lambda: not agent_stories.no_leftovers(state), 20)


def test_up_stays_until_down(background: Path) -> None:
    sandbox = Sandbox.attach(background)
    agent_stories.apply(sandbox, agent_stories.make_pod("busy", "exec sleep 1000"))
    sandbox.kubectl("wait", "pod/busy", "--for=condition=Ready", "--timeout=30s")
    again = run(*TIGHTSHIP, "up", *SMALL, "--state", str(background))
    assert again.returncode == 1
    assert "runs in" in again.stderr
    inside = sandbox.exec_in_namespace(["ip", "-brief", "addr", "show", "tightship0"])
    assert "10.244.0.1/16" in inside.stdout
    assert run(*TIGHTSHIP, "down", "--state", str(background)).returncode == 0
    gone(background)
    missing = run(*TIGHTSHIP, "down", "--state", str(background))
    assert missing.returncode == 1
    assert "no sandbox runs" in missing.stderr


def test_pods_that_come_and_go_leave_the_bridge_its_hardware_address() -> None:
    address = "cat /sys/class/net/tightship0/address"
    low = "ip link add low address 00:00:00:00:00:01 type veth peer name other && ip link set low master tightship0 up"
    script = (
        f"{sys.executable} -c 'from tightship.sandbox import network; network.set_up([])' && mount -t sysfs none /sys && "
        f"{address} && {low} && {address}"
    )
    done = run(*network.unshare_command(), "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert before == after


def test_killing_the_supervisor_ends_everything(background: Path) -> None:
    sandbox = Sandbox.attach(background)
    agent_stories.apply(sandbox, agent_stories.make_pod("busy", "sleep 1000 & exec sleep 1000"))
    sandbox.kubectl("wait", "pod/busy", "--for=condition=Ready", "--timeout=30s")
    os.kill(sandbox.supervisor_pid, signal.SIGKILL)
    gone(background)


def test_run_hands_on_the_exit_status_and_ends(tmp_path: Path) -> None:
    state = tmp_path / "state"
    script = "kubectl get nodes -o name --kubeconfig $KUBECONFIG; exit 7"
    done = run(*TIGHTSHIP, "run", *SMALL, "--state", str(state), "--", "sh", "-c", script)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "node/sandbox-0\n"
    gone(state)


def test_the_death_of_its_owner_ends_a_sandbox(tmp_path: Path) -> None:
    state = tmp_path / "state"
    script = (
        "import sys, time; from tightship.sandbox.cluster import Sandbox;"
        "Sandbox(sys.argv[1], operator=False, nodes=1, gpus_per_node=0).start(); print('up', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(state)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        owner.kill()
    gone(state)


def test_models_come_in_by_a_claim(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "config.json").write_text("{}")
    volume = {"name": "m", "persistentVolumeClaim": {"claimName": "models"}}
    with Sandbox(operator=False, nodes=1, gpus_per_node=0, models=str(models)) as sandbox:
        state = sandbox.state
        script = "cat /models/config.json; echo written > /models/new"
        mounts = [agent_stories.mount("m", "/models")]
        text = agent_stories.output(sandbox, "reader", script, volumeMounts=mounts, pod__volumes=[volume])
        assert text == "{}"
        assert yaml.safe_load(sandbox.kubeconfig.read_text())["clusters"][0]["cluster"]["server"].startswith(
            "https://127"
        )
    assert (models / "new").read_text() == "written\n"
    assert not state.exists(), "a temporary directory goes with its sandbox"


def test_a_lost_gpu_is_allocatable_no_more() -> None:
    with Sandbox(operator=False, nodes=1, gpus_per_node=2) as sandbox:

        def allocatable() -> str:
            return str(agent_stories.get(sandbox, "node", "sandbox-0")["status"]["allocatable"]["nvidia.com/gpu"])

        assert allocatable() == "2"
        sandbox.lose_gpu(0, sandbox.gpu_uuids(0)[0])
        agent_stories.until("one GPU is left", lambda: allocatable() == "1")
        sandbox.find_gpu(0, sandbox.gpu_uuids(0)[0])
        agent_stories.until("it is back", lambda: allocatable() == "2")
        labels = agent_stories.get(sandbox, "node", "sandbox-0")["metadata"]["labels"]
        assert labels["nvidia.com/gpu.product"] == "NVIDIA-H100-80GB-HBM3"
        assert labels["nvidia.com/gpu.memory"] == "81920"
        assert labels["nvidia.com/gpu.count"] == "2"


def test_a_user_namespace_is_enough(tmp_path: Path) -> None:
    """As an ordinary user sees it: root in a user namespace, with every mount of the machine locked."""
    script = (
        "import sys, agent_stories as a; from tightship.sandbox.cluster import Sandbox\n"
        "with Sandbox(sys.argv[1], operator=False, nodes=1, gpus_per_node=0) as sandbox:\n"
        "    mounts = [a.mount('e', '/etc/made/up'), a.mount('e', '/ro', readOnly=True)]\n"
        "    script = 'touch /etc/made/up/x && ! touch /ro/y && ls /ro'\n"
        "    volumes = [{'name': 'e', 'emptyDir': {}}]\n"
        "    print(a.output(sandbox, 'p', script, volumeMounts=mounts, pod__volumes=volumes))\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script, str(tmp_path / "state")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "x"
    gone(tmp_path / "state")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"plane": "imaginary"}, SandboxError, "choose one of embedded, real"),
        ({"plane": "real"}, AssetsError, "KUBEBUILDER_ASSETS=/nowhere lacks etcd"),
    ],
)
def test_what_cannot_be_started_says_why(
    settings: dict[str, str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", "/nowhere")
    with pytest.raises(error, match=message):
        Sandbox(tmp_path / "state", **settings).start()


def test_a_machine_without_namespaces_is_told_what_to_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "unshare"
    fake.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(network.NamespaceError, match=r"Operation not permitted.*unprivileged_userns_clone=1"):
        network.check()
