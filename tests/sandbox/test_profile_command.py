"""`tightship profile` from beginning to end, as a process: the simulated vLLM on a simulated GPU, stopped, gone on with, and failed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import tightship.sandbox
from simulation_helpers import machine, wait_for
from tightship.api import crds
from tightship.commands import profile

SOURCE = Path(tightship.sandbox.__file__).parents[2]
IMAGE = SOURCE / "tightship" / "sandbox" / "simulation" / "images" / "simulated"
SCHEMA = crds.definitions()["batchprofiles"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
MODEL = ("--model", "facebook/opt-1.3b", "--max-model-len", "2048", "--input-tokens", "16", "--output-tokens", "32")
PATIENCE = 150.0

Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """Starts `tightship profile ...` where a GPU and a vLLM seem to be."""
    with machine(tmp_path, time_scale=2.0) as one:
        environ = {
            **os.environ,
            "PYTHONPATH": f"{IMAGE}{os.pathsep}{SOURCE}",
            "PATH": os.pathsep.join((str(IMAGE / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])),
            "TIGHTSHIP_SIM_SOCKET": str(one.socket),
            "TIGHTSHIP_SIM_NODE": "sandbox-0",
            "TIGHTSHIP_SIM_START_SECONDS": "0.1",
            "NVIDIA_VISIBLE_DEVICES": one.uuid,
        }
        started: list[subprocess.Popen[str]] = []

        def start(*words: str) -> subprocess.Popen[str]:
            popen = subprocess.Popen(
                [sys.executable, "-m", "tightship", "profile", *words],
                env=environ,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(popen)
            return popen

        yield start
        for popen in started:
            popen.kill()
            popen.communicate()


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    jsonschema.validate(document, SCHEMA)
    return document


def batches(path: Path) -> list[int]:
    return [point["batch"] for point in read(path)["spec"]["results"]["points"]] if path.exists() else []


def test_stopped_by_ctrl_c_and_gone_on_with(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "opt.yaml"
    first = command(*MODEL, "--itl", "60ms", "--budget", "2m", "-o", "opt.yaml")
    wait_for("a point is in the file", lambda: batches(file), PATIENCE)
    first.send_signal(signal.SIGINT)
    out, error = first.communicate(timeout=PATIENCE)
    assert (first.returncode, out) == (profile.INTERRUPTED, ""), error
    kept = read(file)
    found = kept["spec"]["results"]["points"]
    assert (
        f"stopped; opt.yaml keeps {len(found)} points. Go on with:\n  tightship profile --resume -o opt.yaml" in error
    )
    assert "stopping the engine" in error
    assert re.search(r"^\[-+\] 0s of 2m  starting, 0 points: starting the sweep's engine$", error, re.MULTILINE)
    assert "Application startup complete" in (tmp_path / "opt.log").read_text()

    # What is left of such a small budget is spent at once: what counts is that nothing is measured again.
    spent = float(kept["spec"]["results"]["gpuSeconds"])
    second = command("--resume", "-o", "opt.yaml", "--budget", f"{spent + 20:.0f}s")
    out, error = second.communicate(timeout=PATIENCE)
    assert second.returncode == profile.MEASURED, error
    after = read(file)["spec"]["results"]
    for point in found:
        assert point in after["points"]
    assert [point["batch"] for point in after["points"]][: len(found)] == [point["batch"] for point in found]
    assert float(after["gpuSeconds"]) > spent
    assert after["memory"]["replica"]
    assert out.startswith("BATCH   LIMIT")
    assert "kubectl apply -f opt.yaml" in error


def test_readers_that_leave_take_nothing_with_them(command: Command, tmp_path: Path) -> None:
    """`2>&1 | head -1`, and a `tee` that Ctrl-C ended first."""
    file = tmp_path / "opt.yaml"
    first = command(*MODEL, "--itl", "60ms", "--budget", "2m", "-o", "opt.yaml")
    for stream in (first.stdout, first.stderr):
        assert stream is not None
        stream.close()
    wait_for("a point is in the file", lambda: batches(file), PATIENCE)
    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE) == profile.INTERRUPTED
    spent = float(read(file)["spec"]["results"]["gpuSeconds"])
    second = command("--resume", "-o", "opt.yaml", "--budget", f"{spent + 10:.0f}s")
    for stream in (second.stdout, second.stderr):
        assert stream is not None
        stream.close()
    assert second.wait(PATIENCE) == profile.MEASURED
    assert "not finished" not in file.read_text().splitlines()[0]


def test_a_finished_profile_is_extended_under_mps(command: Command, tmp_path: Path) -> None:
    """One replica is measured and done with; then the packing that was never tried is, by the engines of a daemon."""
    file = tmp_path / "opt.yaml"
    first = command(
        *MODEL, "--gpu", "0", "--itl", "60ms", "--budget", "1m", "--max-replicas-per-gpu", "1", "-o", "opt.yaml"
    )
    _, error = first.communicate(timeout=PATIENCE)
    assert first.returncode == profile.MEASURED, error
    before = read(file)["spec"]["results"]
    assert "trials" not in before
    more = ("--extend", "-o", "opt.yaml", "--max-replicas-per-gpu", "2", "--budget", "1m")
    second = command(*more)
    _, error = second.communicate(timeout=PATIENCE)
    assert second.returncode == profile.MEASURED, error
    after = read(file)["spec"]["results"]
    (trial,) = after["trials"]
    assert trial["replicas"] == 2
    assert float(trial["totalTokensPerSecond"]) > 0, error
    assert after["points"] == before["points"]


def test_stopped_before_the_first_point(command: Command, tmp_path: Path) -> None:
    popen = command(*MODEL)
    log = tmp_path / "profile.log"
    wait_for("the engine has said something", lambda: log.exists() and log.stat().st_size, PATIENCE)
    popen.send_signal(signal.SIGTERM)
    _, error = popen.communicate(timeout=PATIENCE)
    assert popen.returncode == profile.TERMINATED
    assert "stopped before the first point: nothing was written" in error
    assert not (tmp_path / "profile.yaml").exists()


def test_an_engine_that_cannot_start_leaves_its_last_words_and_no_file(command: Command, tmp_path: Path) -> None:
    popen = command(*MODEL, "--engine-arg=--no-such-flag")
    _, error = popen.communicate(timeout=PATIENCE)
    assert popen.returncode == profile.FAILED
    assert "unrecognized arguments: --no-such-flag" in error
    assert "the engine's output is in profile.log" in error
    assert "--no-such-flag" in (tmp_path / "profile.log").read_text()
    assert not (tmp_path / "profile.yaml").exists()
