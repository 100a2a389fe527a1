"""How long a node that turned out not to fit is left alone."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.core.backoff import FIRST, LONGEST, Avoided, avoid, length

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(minutes: float) -> datetime:
    return BEGIN + timedelta(minutes=minutes)


def test_a_node_is_left_alone_for_ten_minutes_and_then_twice_as_long_each_time() -> None:
    found = avoid((), ["n0"], [], at(0))
    assert found == (Avoided("n0", at(0), at(10), 1),)
    assert avoid(found, ["n0"], [], at(9)) == found
    again = avoid(found, ["n0"], [], at(12))
    assert again == (Avoided("n0", at(12), at(32), 2),)
    assert avoid(again, ["n0"], [], at(40))[0].until == at(80)


def test_it_is_remembered_as_long_again_and_then_forgotten() -> None:
    found = avoid((), ["n0"], [], at(0))
    assert avoid(found, [], [], at(19)) == found
    assert avoid(found, [], [], at(20)) == ()
    assert avoid(avoid(found, [], [], at(20)), ["n0"], [], at(21))[0].times == 1


def test_replicas_that_serve_there_end_it() -> None:
    found = avoid((), ["n0", "n1"], [], at(0))
    assert [each.node for each in avoid(found, [], ["n1"], at(1))] == ["n0"]
    assert [each.node for each in avoid(found, ["n1"], ["n1"], at(1))] == ["n0", "n1"]


nodes = st.sets(st.sampled_from(["n0", "n1", "n2"]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 600), nodes, nodes), max_size=12))
def test_each_wait_is_bounded_and_no_shorter_than_the_one_before(looks: list[tuple[int, set[str], set[str]]]) -> None:
    known: tuple[Avoided, ...] = ()
    now = BEGIN
    for minutes, unfit, serving in looks:
        now += timedelta(minutes=minutes)
        before, known = {each.node: each for each in known}, avoid(known, unfit, serving, now)
        assert avoid(known, unfit, serving, now) == known  # looking again changes nothing
        assert {each.node for each in known} >= unfit
        for each in known:
            assert FIRST <= each.until - each.since == length(each.times) <= LONGEST
            earlier = before.get(each.node)
            assert earlier is None or each.times in (earlier.times, earlier.times + 1)
            assert each.node not in unfit or each.until > now
