"""What a pod says of itself: one table of pods as the kubelet reports them."""

from __future__ import annotations

from typing import Any

import pytest

from tightship.reconcile import podstate


def make_pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {}, "status": {"phase": "Running", **status}}


def make_container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "engine", "image": "img:1", "restartCount": 2, **state}]}


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"conditions": [{**condition, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}


@pytest.mark.parametrize(
    ("story", "pod", "reason", "words"),
    [
        ("starting", make_pod(**make_container(state={"running": {}})), None, ""),
        ("ready", make_pod(conditions=[{"type": "Ready", "status": "True"}]), None, ""),
        ("no room", make_pod(**unschedulable("1 Insufficient cpu.")), "Unschedulable", "Insufficient cpu"),
        ("evicted", make_pod(phase="Failed", reason="Evicted", message="disk"), "CrashLoop", "Evicted: disk"),
        (
            "no image",
            make_pod(**make_container(state={"waiting": {"reason": "ErrImagePull", "message": "denied"}})),
            "ImagePullFailed",
            "img:1: denied",
        ),
        (
            "no secret",
            make_pod(
                **make_container(state={"waiting": {"reason": "CreateContainerConfigError", "message": "no secret"}})
            ),
            "CrashLoop",
            "no secret",
        ),
        (
            "killed for memory, and running again",
            make_pod(
                **make_container(
                    state={"running": {}}, lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}}
                )
            ),
            "OOMKilled",
            "restart 2",
        ),
        (
            "a supervisor's verdict",
            make_pod(**make_container(state={"terminated": {"exitCode": 72, "message": "GPUMismatch: sees GPU-2"}})),
            "GPUMismatch",
            "sees GPU-2",
        ),
        (
            "an engine's last words",
            make_pod(**make_container(state={"terminated": {"exitCode": 1, "message": "EngineFailed: no such model"}})),
            "CrashLoop",
            "no such model",
        ),
        (
            "an init container that failed",
            make_pod(initContainerStatuses=[{"name": "inject", "state": {"terminated": {"exitCode": 3}}}]),
            "CrashLoop",
            "container inject ended with exit status 3",
        ),
        (
            "an init container that did its work",
            make_pod(initContainerStatuses=[{"name": "inject", "state": {"terminated": {"exitCode": 0}}}]),
            None,
            "",
        ),
    ],
)
def test_trouble(story: str, pod: dict[str, Any], reason: str | None, words: str) -> None:
    found = podstate.trouble(pod)
    assert (found.reason if found else None) == reason, story
    assert words in (found.message if found else "")


def test_a_pod_that_is_going_has_no_trouble_and_is_not_ready() -> None:
    pod = make_pod(conditions=[{"type": "Ready", "status": "True"}])
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert podstate.trouble(pod) is None
    assert not podstate.is_ready(pod)


@pytest.mark.parametrize(
    ("message", "counts"),
    [
        ("0/2 nodes are available: 1 Insufficient memory.", True),
        ("0/2 nodes are available: 2 Too many pods.", True),
        ('persistentvolumeclaim "models" not found', False),
    ],
)
def test_only_want_of_room_gives_a_node_up(message: str, counts: bool) -> None:
    assert (podstate.short_of_room_since(make_pod(**unschedulable(message))) is not None) == counts


def test_long_last_words_keep_their_beginning_and_their_end() -> None:
    words = "first " + "x" * 5000 + " last"
    found = podstate.trouble(make_pod(**make_container(state={"terminated": {"exitCode": 1, "message": words}})))
    assert found is not None
    assert "first" in found.message
    assert found.message.endswith("last")
    assert len(found.message) < 1000
