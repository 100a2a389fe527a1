"""`tightship profile export`: what stays of a profile, from a cluster's answer or from kubectl's output."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tightship.__main__ import main as tightship
from tightship.api import crds
from tightship.api.v1alpha1 import labels

SCHEMA = crds.definitions()["batchprofiles"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
HASH = "2614008e2427e4d2200c1b58d01ddaa1a24b5832d81936b563fa64df727430a0"


def in_cluster(**status: Any) -> dict[str, Any]:
    """A measured profile as an API server returns it."""
    points = [
        {"batch": batch, "totalTokensPerSecond": f"{100 * batch}", "interTokenLatency": {"mean": "9ms"}}
        for batch in (8, 1)
    ]
    return {
        "apiVersion": "tightship.dev/v1alpha1",
        "kind": "BatchProfile",
        "metadata": {
            "name": "opt",
            "namespace": "models",
            "uid": "1",
            "resourceVersion": "7",
            "generation": 2,
            "creationTimestamp": "2026-11-20T10:00:00Z",
            "managedFields": [{"manager": "tightship-profiler"}],
            "labels": {labels.PROFILE_KEY: labels.key_value(HASH), labels.MANAGED_BY: "tightship", "argocd.argoproj.io/instance": "x"},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
        },
        "spec": {
            "key": {
                "hash": HASH,
                "model": {"source": "hf://facebook/opt-1.3b"},
                "engine": {"image": "vllm/vllm-openai:v0.33.0", "args": [], "env": [], "envFrom": []},
                "accelerator": {"device": "cuda", "product": "NVIDIA-H100-80GB-HBM3"},
                "workload": {"inputTokens": 111, "outputTokens": 292},
                "resources": {},
            },
            "measurement": {"budget": "10m", "template": {"spec": {"tolerations": []}}},
        },
        "status": {
            "observedGeneration": 2,
            "phase": "Ready",
            "job": {"name": "opt-1", "attempt": 1},
            "gpu": {"product": "NVIDIA-H100-80GB-HBM3", "memory": "80Gi", "uuid": "GPU-1"},
            "points": points,
            "trials": [{"batch": 8, "replicas": 4, "totalTokensPerSecond": "900"}, {"batch": 8, "replicas": 2, "totalTokensPerSecond": "990"}],
            "memory": {"confirmedBatch": 8, "replica": "9Gi"},
            "gpuSeconds": "300",
            "progress": {"stage": "Done", "points": 2},
            "outcome": {"state": "Completed", "message": "best at 8"},
            "conditions": [{"type": "Complete", "status": "True", "reason": "Measured", "message": ""}],
        }
        | status,
    }  # fmt: skip


def check(document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMA)
    assert document["metadata"] == {
        "name": "opt", "namespace": "models", "labels": {labels.PROFILE_KEY: labels.key_value(HASH)}
    }  # fmt: skip
    assert "status" not in document
    assert document["spec"]["key"] == in_cluster()["spec"]["key"]
    assert document["spec"]["measurement"] == {"budget": "10m"}
    results = document["spec"]["results"]
    assert set(results) == {"gpu", "points", "trials", "memory", "gpuSeconds"}
    assert [point["batch"] for point in results["points"]] == [1, 8]
    assert [trial["replicas"] for trial in results["trials"]] == [2, 4]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A kubeconfig for an API server that has one profile, and the requests it got."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            status = {"opt": 200, "secret": 403, "broken": 500}.get(self.path.rsplit("/", 1)[-1], 404)
            body = json.dumps(in_cluster() if status == 200 else {"message": "no"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "kubeconfig"
    contexts = [
        {"name": name, "context": {"cluster": "c", "user": "u", "namespace": name}} for name in ("models", "other")
    ]
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "models", "contexts": contexts,
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "t0ken"}}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(config))
    yield str(file), asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("words", "namespace"),
    [((), "models"), (("--context", "other"), "other"), (("-n", "elsewhere"), "elsewhere")],
)
def test_from_a_cluster(
    cluster: tuple[str, list[str]], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], namespace: str
) -> None:
    kubeconfig, asked = cluster
    assert tightship(["profile", "export", "opt", "--kubeconfig", kubeconfig, *words]) == 0
    text = capsys.readouterr().out
    check(yaml.safe_load(text))
    assert text.splitlines()[0] == "# Exported from BatchProfile models/opt: 2 points; Completed: best at 8"
    assert asked == [f"/apis/tightship.dev/v1alpha1/namespaces/{namespace}/batchprofiles/opt Bearer t0ken"]


def test_from_kubectls_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump(in_cluster())))
    output = tmp_path / "opt.yaml"
    assert tightship(["profile", "export", "-f", "-", "-o", str(output)]) == 0
    check(yaml.safe_load(output.read_text()))


def test_an_imported_profile_is_exported_as_it_is(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(yaml.safe_dump(in_cluster()))
    assert tightship(["profile", "export", "-f", str(first), "-o", str(second)]) == 0
    assert tightship(["profile", "export", "-f", str(second), "-o", str(first)]) == 0
    assert yaml.safe_load(first.read_text()) == yaml.safe_load(second.read_text())


def test_numbers_in_quotes_come_out_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "1.yaml"
    points = [{"batch": "8", "totalTokensPerSecond": "800"}, {"batch": 1, "totalTokensPerSecond": "100"}]
    file.write_text(yaml.safe_dump(in_cluster(points=points)))
    assert tightship(["profile", "export", "-f", str(file)]) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    jsonschema.validate(document, SCHEMA)
    assert [point["batch"] for point in document["spec"]["results"]["points"]] == [1, 8]


def test_an_unfinished_one_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "1.yaml"
    file.write_text(yaml.safe_dump(in_cluster(outcome=None)))
    assert tightship(["profile", "export", "-f", str(file)]) == 0
    assert "not finished when it was exported: only these points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give either the NAME of a BatchProfile in the cluster, or -f FILE"),
        (("opt", "-f", "x"), "give either the NAME"),
        (("gone", "--kubeconfig", "KUBECONFIG"), "gone: no BatchProfile of this name in namespace models (kubectl get bprof -A)"),
        (("secret", "--kubeconfig", "KUBECONFIG"), "secret: this context may not read BatchProfiles in namespace models"),
        (("broken", "--kubeconfig", "KUBECONFIG"), "broken: the API server answered 500"),
        (("opt", "--kubeconfig", "KUBECONFIG", "--context", "no"), "there is no context no in the kubeconfig"),
        (("opt", "--kubeconfig", "/nowhere"), "no cluster to read from: "),
        (("opt", "--kubeconfig", "DOWN"), "no answer from http://127.0.0.1:9"),
        (("-f", "UNMEASURED"), "the profile holds no points"),
        (("-f", "KEYLESS"), "has no spec.key: not a BatchProfile as a cluster returns it"),
        (("-f", "NAMELESS"), "not a BatchProfile that a cluster would take: metadata: "),
        (("-f", "BARE"), "not a BatchProfile that a cluster would take: status.points.0.totalTokensPerSecond: "),
        (("-f", "TRIALS"), "not a BatchProfile that a cluster would take: status.trials.0: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(
    cluster: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:  # fmt: skip
    kubeconfig, _ = cluster
    down = yaml.safe_load(Path(kubeconfig).read_text())
    down["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    files = {"KUBECONFIG": kubeconfig}
    for name, content in (
        ("DOWN", down),
        ("UNMEASURED", in_cluster(points=[])),
        ("KEYLESS", {"kind": "BatchProfile", "spec": {}}),
        ("NAMELESS", in_cluster() | {"metadata": "opt"}),
        ("BARE", in_cluster(points=[{"batch": 8, "totalTokensPerSecond": 800}])),
        ("TRIALS", in_cluster(trials=["8 x 4"])),
    ):
        files[name] = str(tmp_path / name)
        Path(files[name]).write_text(yaml.safe_dump(content))
    assert tightship(["profile", "export", *(files.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
