"""The whole way with the real engine: vLLM on the CPU, on the real control plane.

This machine has two cores, so the two engines of a packing trial compute on one of them, and API servers and load on the other: packing can't
pay, and the measurement has to say so. The sandbox's two nodes are the same two cores, so two replicas that serve with a pack each
run exactly as the two engines of the trial did, which lets a separate client check the trial's figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import story
from tightship.api.units import parse_duration
from tightship.sandbox.cluster import Sandbox

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "tests" / "service_client.py"
SAMPLE = ROOT / "docs" / "samples" / "llmservice-cpu.yaml"


@pytest.fixture(scope="module")
def sandbox(
    tmp_path_factory: pytest.TempPathFactory,
    kube_assets: Path,
    engine_python: Path,
    fair_cores: None,
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


def by_a_client(sandbox: Sandbox, service: dict[str, Any], streams: int) -> dict[str, float]:
    """What a separate client measures through the Service."""
    name, workload = service["metadata"]["name"], service["spec"]["workload"]
    address = story.get(sandbox, f"svc/{name}")["spec"]["clusterIP"]
    command = [sys.executable, str(CLIENT), address, "80", service["spec"]["model"]["servedName"]]
    command += ["--streams", str(streams), "--input", str(workload["inputTokens"])]
    command += ["--output", str(workload["outputTokens"]), "--warmup", "15", "--seconds", "60"]
    done = sandbox.exec_in_namespace(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def check_packing(sandbox: Sandbox, ready: dict[str, Any], profile: dict[str, Any]) -> None:
    """Two engines on one core bring nothing and take twice as long between tokens, and a client finds the same."""
    advice, status = ready["status"]["recommendation"], profile["status"]
    assert (advice["replicasPerGPU"], advice["basis"]) == (1, "Measured"), advice
    assert sorted(story.packs(sandbox).values()) == [1, 1]
    assert story.condition(ready, "Packed")["reason"] == "ExclusiveNoGain"
    batch = advice["batch"]
    alone = next(point for point in status["points"] if point["batch"] == batch)
    trials = [trial for trial in status.get("trials") or [] if trial.get("totalTokensPerSecond")]
    trial = next((each for each in trials if (each["batch"], each["replicas"]) == (batch, 2)), None)
    assert trial is not None, (trials, status["outcome"])
    assert float(trial["halfWidth"]) <= 0.2, trial
    total, single = float(trial["totalTokensPerSecond"]), float(alone["totalTokensPerSecond"])
    assert total < 1.25 * single, "no gain"
    packed, apart = (parse_duration(each["interTokenLatency"]["mean"]) for each in (trial, alone))
    assert 1.4 < packed / apart < 3.0, "the time between tokens about doubles"

    found = by_a_client(sandbox, ready, 2 * batch)
    print(f"alone {single:.0f} tokens/s, trial {total:.0f} at {packed:.3f} s, client {found}")
    assert found["totalTokensPerSecond"] == pytest.approx(total, rel=0.20)
    assert found["interTokenLatency"] == pytest.approx(packed, rel=0.20)


def test_from_apply_to_answers(sandbox: Sandbox) -> None:
    service = yaml.safe_load(SAMPLE.read_text())
    name, model = service["metadata"]["name"], service["spec"]["model"]["servedName"]
    sandbox.kubectl("apply", "--validate=false", "-f", str(SAMPLE))
    sandbox.kubectl("wait", f"llm/{name}", "--for=condition=Profiled", "--timeout=1200s", timeout=1300)
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
    arrivals = profile["status"]["confirmation"]["arrivals"]
    assert float(arrivals["offeredRequestsPerSecond"]) > 0
    assert profile["status"]["baseline"]["totalTokensPerSecond"]
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

    check_packing(sandbox, ready, profile)

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
