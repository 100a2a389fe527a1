"""The whole way with the real engine: vLLM on the CPU, on the real control plane."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import story
from tightship.sandbox.cluster import Sandbox

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "docs" / "samples" / "llmservice-cpu.yaml"


@pytest.fixture(scope="module")
def sandbox(
    tmp_path_factory: pytest.TempPathFactory,
    kube_assets: Path,
    engine_python: Path,
) -> Iterator[Sandbox]:
    models = tmp_path_factory.mktemp("models")
    subprocess.run([engine_python, ROOT / "scripts" / "make_small_llama.py", models / "small-llama"], check=True)
    with Sandbox(
        plane="real",
        state=tmp_path_factory.mktemp("sandbox"),
        operator=True,
        models=str(models),
        engine_python=str(engine_python),
    ) as running:
        yield running


def generated_tokens(sandbox: Sandbox, pod: str) -> float:
    """What the engine of one replica says it has generated so far."""
    text = sandbox.kubectl("get", "--raw", f"/api/v1/namespaces/default/pods/{pod}:8000/proxy/metrics")
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")
    )


def test_from_apply_to_answers(sandbox: Sandbox) -> None:
    service = yaml.safe_load(SAMPLE.read_text())
    name, model = service["metadata"]["name"], service["spec"]["model"]["servedName"]
    sandbox.kubectl("apply", "--validate=false", "-f", str(SAMPLE))
    sandbox.kubectl("wait", f"llm/{name}", "--for=condition=Profiled", "--timeout=480s")
    for gate in ("Recommended", "Packed"):
        sandbox.kubectl("wait", f"llm/{name}", f"--for=condition={gate}", "--timeout=60s")
    sandbox.kubectl("wait", f"llm/{name}", "--for=condition=Ready", "--timeout=300s")
    ready = story.wait_ready(sandbox, name, 2)

    profile = story.get(sandbox, f"bprof/{ready['status']['profile']['name']}")
    curve = sorted((point["batch"], float(point["totalTokensPerSecond"])) for point in profile["status"]["points"])
    assert len(curve) >= 4
    assert curve[2][1] > 1.3 * curve[0][1], f"the curve doesn't rise: {curve}"
    first, last = curve[1][1] / curve[0][1], curve[-1][1] / curve[-2][1]
    assert last < first, f"the curve doesn't flatten: {curve}"
    assert all(story.condition(pack, "SharingReady")["reason"] == "CPUSet" for pack in story.items(sandbox, "gpupacks"))

    pods = [pod["metadata"]["name"] for pod in story.replica_pods(sandbox, name)]
    before = {pod: generated_tokens(sandbox, pod) for pod in pods}
    for _ in range(12):
        answer = story.complete(
            sandbox, name, model, "/v1/chat/completions", messages=[{"role": "user", "content": "Ahoy"}]
        )
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] > 0
    assert all(generated_tokens(sandbox, pod) > before[pod] for pod in pods), "both replicas answered"

    sandbox.kubectl("scale", f"llm/{name}", "--replicas=1")
    story.wait_ready(sandbox, name, 1)
    assert story.answers(sandbox, name, model)

    sandbox.kubectl("delete", f"llm/{name}")
    story.wait_until(
        sandbox,
        "its pods and packs are gone",
        lambda: not story.packs(sandbox) and not story.replica_pods(sandbox, name),
        120,
    )
    assert not story.items(sandbox, "sts,svc,pods", "-l", f"tightship.dev/service={name}")
    assert story.items(sandbox, "bprof"), "the profile stays"
