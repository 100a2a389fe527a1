"""What the init container of a pack without a holder tells of its GPU, and what it refuses."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tightship.replica import report
from tightship.replica.locks import is_held
from tightship.replica.outcome import EXIT_STATUS, Reason

SEEN = {"uuid": "GPU-1", "name": "NVIDIA H100", "total": 80 << 30, "free": 79 << 30, "mps": True}


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the container; returns its exit status and termination message."""

    def run(sharing: str, *, pipe: bool = True, daemon: bool = True, **seen: Any) -> tuple[int, str]:
        (tmp_path / "mps").mkdir(exist_ok=True)
        if daemon:
            (tmp_path / "mps" / "control").touch()
        script = f"import json, os; assert os.path.getsize({str(tmp_path / 'start.lock')!r}); print({json.dumps(SEEN | seen)!r})"
        for name, value in {
            "TIGHTSHIP_DEVICE": "cuda",
            "TIGHTSHIP_SHARING": sharing,
            "TIGHTSHIP_PACK_DIR": str(tmp_path),
            "TIGHTSHIP_POD_NAME": "opt-0",
            "TIGHTSHIP_TERMINATION_MESSAGE": str(tmp_path / "message"),
            "TIGHTSHIP_CUDA_PROBE": shlex.join([sys.executable, "-c", script]),
        }.items():
            monkeypatch.setenv(name, value)
        if pipe:
            monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
        status = report.main()
        assert not is_held(tmp_path / "start.lock"), "the next one may start"
        return status, (tmp_path / "message").read_text()

    return run


def test_the_gpu_is_told_under_the_start_lock(tell: Any) -> None:
    assert tell("DRA") == (0, json.dumps(SEEN))


def test_a_share_without_mps_is_refused(tell: Any) -> None:
    status, message = tell("DevicePlugin", pipe=False)
    assert status == EXIT_STATUS[Reason.MPS_NOT_ATTACHED]
    assert "the device plugin has set no CUDA_MPS_PIPE_DIRECTORY" in message


def test_one_that_has_its_gpu_alone_needs_no_mps_and_tells_of_none(tell: Any) -> None:
    status, message = tell("Exclusive", pipe=False, mps=False)
    assert (status, json.loads(message)) == (0, SEEN | {"mps": None})


@pytest.mark.parametrize(
    ("how", "reason", "words"),
    [
        ({"uuid": None}, Reason.GPU_NOT_VISIBLE, "requests a GPU and sees none"),
        ({"pipe": False}, Reason.MPS_NOT_ATTACHED, "has set no CUDA_MPS_PIPE_DIRECTORY"),
        ({"daemon": False}, Reason.MPS_NOT_ATTACHED, "the MPS control daemon of the claim's driver tells why"),
        ({"mps": False}, Reason.MPS_NOT_ATTACHED, "shares no contexts"),
    ],
)
def test_what_would_not_share_is_refused(tell: Any, how: dict[str, Any], reason: Reason, words: str) -> None:
    status, message = tell("DRA", **how)
    assert status == EXIT_STATUS[reason]
    assert message.startswith(f"{reason.value}: ")
    assert words in message


def test_a_mode_that_it_does_not_know_is_refused(tell: Any) -> None:
    assert tell("TimeSlicing")[0] == EXIT_STATUS[Reason.INVALID_SETTINGS]
