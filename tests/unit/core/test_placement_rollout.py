"""How a StatefulSet moves towards its assignment: never past the pack's memory, never two serving replicas at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.core.rollout import Replica, Step, next_to_replace, step


def make_pods(*memory: int, **more: bool) -> list[Replica]:
    return [Replica(ordinal, amount, ready=True, **more) for ordinal, amount in enumerate(memory)]


@pytest.mark.parametrize(
    ("story", "arguments", "expected"),
    [
        ("a new set is made whole", (4, None, [], 10, 40), Step(4, True)),
        ("an unknown capacity holds nothing back", (4, 2, make_pods(10, 10), 10, None), Step(4, True)),
        ("shrink before the template grows", (2, 4, make_pods(10, 10, 10, 10), 20, 40), Step(2, False)),
        ("then the template", (2, 2, make_pods(10, 10), 20, 40), Step(2, True)),
        ("roll before the set grows", (8, 4, make_pods(10, 10, 10, 10), 5, 40), Step(4, True)),
        ("then grow", (8, 4, make_pods(5, 5, 5, 5), 5, 40), Step(8, True)),
        ("pods that are going still count", (4, None, make_pods(10, 10, 10, going=True), 10, 40), Step(4, True)),
        ("a pod of an earlier set leaves less room", (2, None, [Replica(7, 30, going=True)], 10, 40), Step(1, True)),
    ],
)
def test_steps(story, arguments, expected):
    assert step(*arguments) == expected, story


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 8),
    st.integers(0, 8),
    st.lists(st.integers(1, 10), max_size=8),
    st.integers(1, 10),
    st.integers(0, 60),
)
def test_no_step_lets_the_pods_exceed_the_capacity(target, live, held, memory, capacity):
    """Whatever pods OnDelete brings back at the new template: what may exist after a step fits, if what existed did."""
    pods = make_pods(*held[:live])
    if sum(pod.memory for pod in pods) > capacity:
        return
    found = step(target, live, pods, memory, capacity)
    if found.template:
        after = [max(pod.memory, memory) if pod.ordinal < target else pod.memory for pod in pods]
        new = [ordinal for ordinal in range(found.replicas) if ordinal not in {pod.ordinal for pod in pods}]
        assert sum(after) + len(new) * memory <= capacity
    else:
        assert found.replicas <= live


@pytest.mark.parametrize(
    ("story", "pods", "others_down", "expected"),
    [
        ("nothing is outdated", make_pods(1, 1), 0, None),
        ("the last one first", make_pods(1, 1, outdated=True), 0, 1),
        ("not while another is being replaced", [*make_pods(1, outdated=True), Replica(1, 1, going=True)], 0, None),
        ("not while a replaced one is not back", [*make_pods(1, outdated=True), Replica(1, 1)], 0, None),
        ("not while a replica elsewhere is down", make_pods(1, 1, outdated=True), 1, None),
        ("a broken one at any time", [*make_pods(1, outdated=True), Replica(1, 1, outdated=True)], 3, 1),
    ],
)
def test_the_order_of_replacement(story, pods, others_down, expected):
    chosen = next_to_replace(pods, others_down)
    assert (chosen.ordinal if chosen else None) == expected, story
