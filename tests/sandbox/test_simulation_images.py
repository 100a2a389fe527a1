"""The table of images: which container gets what, and whose Tightship an engine image runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tightship
from tightship.sandbox.images import ImageEnvironment, ImageSettings, resolve


def run(environment: dict[str, str], *command: str) -> str:
    program = shutil.which(command[0], path=environment["PATH"])
    assert program is not None
    done = subprocess.run(
        [program, *command[1:]], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def make_settings(state: Path, **more: object) -> ImageSettings:
    return ImageSettings(state=state, device_socket=Path("/run/device.sock"), node="n", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "known"),
    [
        ("vllm/vllm-openai:v0.33.0", True),
        ("docker.io/vllm/vllm-openai:latest", True),
        ("tightship/operator:0.1.0", True),
        ("registry.example.com/tightship/operator:0.1.0", True),
        ("quay.io/someone/vllm-cpu:0.32.0", True),
        ("vllm/vllm-openai", False),
        ("nginx:1", False),
        ("", False),
    ],
)
def test_only_known_images_can_be_had(tmp_path: Path, image: str, known: bool) -> None:
    assert (resolve(image, make_settings(tmp_path, engine_python=sys.executable)) is not None) is known


def test_without_an_interpreter_there_is_no_cpu_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIGHTSHIP_ENGINE_PYTHON", raising=False)
    assert resolve("vllm-cpu:1", make_settings(tmp_path)) is None
    monkeypatch.setenv("TIGHTSHIP_ENGINE_PYTHON", sys.executable)
    environment = resolve("vllm-cpu:1", make_settings(tmp_path, engine_environment={"VLLM_CPU_KVCACHE_SPACE": "1"}))
    assert environment is not None
    assert environment.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert run(environment.merged({}), "python3", "-c", "import sys; print(sys.prefix)").strip() == sys.prefix


def test_an_engine_image_runs_the_tightship_that_was_injected_and_no_other(tmp_path: Path) -> None:
    environment = resolve("vllm/vllm-openai:v1", make_settings(tmp_path / "state"))
    assert environment is not None
    missing = "import importlib.util as u; print(u.find_spec('tightship'))"
    assert run(environment.merged({}), "python3", "-c", missing) == "None\n"
    package = tmp_path / "lib" / "tightship"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    program = "import json, sys, tightship, httpx, pydantic, prometheus_client, vllm; print(json.dumps([tightship.__file__, vllm.__version__]))"
    found = json.loads(run(environment.merged({"PYTHONPATH": str(tmp_path / "lib")}), "python3", "-c", program))
    assert found == [str(package / "__init__.py"), "0.33.0+simulated"]


def test_the_operator_image_runs_this_very_tightship(tmp_path: Path) -> None:
    environment = resolve("tightship/operator:dev", make_settings(tmp_path))
    assert environment is not None
    program = "import tightship; print(tightship.__file__)"
    assert run(environment.merged({}), "python3", "-c", program).strip() == tightship.__file__
    for tool in ("nvidia-smi", "nvidia-cuda-mps-control", "tightship"):
        assert shutil.which(tool, path=environment.merged({})["PATH"]) is not None


def test_the_image_says_where_the_devices_are(tmp_path: Path) -> None:
    environment = resolve("vllm/vllm-openai:v1", make_settings(tmp_path))
    assert environment is not None
    assert environment.env["TIGHTSHIP_SIM_SOCKET"] == "/run/device.sock"
    assert environment.env["TIGHTSHIP_SIM_NODE"] == "n"
    assert os.access(environment.env["TIGHTSHIP_CUDA_PROBE"], os.X_OK)
    without = resolve("vllm/vllm-openai:v1", ImageSettings(state=tmp_path))
    assert without is not None
    assert "TIGHTSHIP_SIM_SOCKET" not in without.env


def test_the_pod_wins_but_paths_are_joined() -> None:
    image = ImageEnvironment(["/image/bin", "/bin"], {"A": "image", "B": "image", "PYTHONPATH": "/image"})
    merged = image.merged({"A": "pod", "PATH": "/pod/bin", "PYTHONPATH": "/lib", "C": "pod"})
    assert merged == {
        "A": "pod",
        "B": "image",
        "C": "pod",
        "PATH": "/pod/bin:/image/bin:/bin",
        "PYTHONPATH": "/lib:/image",
    }
    assert image.merged({})["PYTHONPATH"] == "/image"


def test_resolving_again_changes_nothing(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    first = resolve("vllm/vllm-openai:v1", settings)
    before = sorted((path.name, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*") if not path.is_dir())
    assert resolve("vllm/vllm-openai:v1", settings) == first
    assert sorted((path.name, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*") if not path.is_dir()) == before
