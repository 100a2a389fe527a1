"""Conditions: times move on flips only, Ready copies the first failing gate."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from tightship.core.conditions import MESSAGE_LIMIT, Condition, find, first_failing, is_true, merge, ready, transitions

THEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
NOW = THEN + timedelta(minutes=5)


def test_a_flip_moves_the_time_and_anything_else_does_not() -> None:
    before = merge([], [Condition("Ready", "False", "Waiting", "for a GPU")], generation=1, now=THEN)
    reworded = merge(before, [Condition("Ready", "False", "Measuring", "3 of 9")], generation=2, now=NOW)
    flipped = merge(reworded, [Condition("Ready", "True", "FullyRealised")], generation=2, now=NOW)

    assert before[0]["lastTransitionTime"] == reworded[0]["lastTransitionTime"] == "2026-01-02T03:04:05Z"
    assert (reworded[0]["reason"], reworded[0]["observedGeneration"]) == ("Measuring", 2)
    assert flipped[0]["lastTransitionTime"] == "2026-01-02T03:09:05Z"


def test_merging_the_same_facts_again_changes_nothing() -> None:
    facts = [Condition("A", "True", "Yes"), Condition("B", "Unknown", "Pending")]
    once = merge([], facts, generation=3, now=THEN)
    assert merge(once, reversed(facts), generation=3, now=NOW) == once


def test_conditions_not_observed_stay_and_absent_ones_go() -> None:
    before = merge([], [Condition(t, "True", "Yes") for t in ("A", "B", "C")], generation=1, now=THEN)
    after = merge(before, [Condition("C", "False", "No")], generation=2, now=NOW, absent={"B"})
    assert [(c["type"], c["status"], c["observedGeneration"]) for c in after] == [("A", "True", 1), ("C", "False", 2)]


def test_times_are_written_in_utc() -> None:
    elsewhere = THEN.astimezone(timezone(timedelta(hours=2)))
    assert merge([], [Condition("A", "True", "Yes")], generation=1, now=elsewhere)[0]["lastTransitionTime"].endswith(
        "03:04:05Z"
    )


def test_a_message_too_long_for_the_api_is_cut() -> None:
    long = merge([], [Condition("A", "True", "Yes", "x" * (MESSAGE_LIMIT + 1))], generation=1, now=NOW)
    assert len(long[0]["message"]) == MESSAGE_LIMIT


def test_ready_copies_the_first_gate_that_does_not_hold() -> None:
    good, unknown = Condition("Accepted", "True", "Valid"), Condition("Profiled", "Unknown", "Waiting", "no Job yet")
    bad = Condition("Packed", "False", "InsufficientGPUs", "needs 2, 1 free")

    assert ready([good], reason="FullyRealised", message="4 of 4") == Condition(
        "Ready", "True", "FullyRealised", "4 of 4"
    )
    assert ready([good, bad, unknown], reason="x") == Condition("Ready", "False", bad.reason, bad.message)
    assert ready([good, unknown, bad], reason="x") == Condition("Ready", "Unknown", unknown.reason, unknown.message)
    assert first_failing([good]) is None


def test_lookups_and_transitions() -> None:
    before = merge([], [Condition("A", "True", "Yes"), Condition("B", "True", "Yes", "1")], generation=1, now=THEN)
    after = merge(
        before,
        [Condition("A", "False", "No"), Condition("B", "True", "Yes", "2"), Condition("C", "True", "New")],
        generation=1,
        now=NOW,
    )
    assert [c["type"] for c in transitions(before, after)] == ["A", "C"]
    assert is_true(after, "B")
    assert not is_true(after, "A")
    assert find(after, "D") is None
