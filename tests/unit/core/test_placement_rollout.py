"""How replicas move towards what is assigned: never past a pack's memory, never with fewer serving than have to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.core.rollout import Group, Replica, Step, fitting, may_shrink_to, replacements, step, stopped_by


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


def make_group(pack="a", *, ready=0, old=0, wanted=None, broken=0, failed=0, starting=0, going=0, **more):
    """Pods in this order: `ready` of the newest revision, `old` that serve, `broken` old ones, `failed` and `starting` new ones, going."""
    kinds = [
        *[{"ready": True}] * ready,
        *[{"ready": True, "outdated": True}] * old,
        *[{"outdated": True, "failed": True}] * broken,
        *[{"failed": True}] * failed,
        *[{}] * starting,
        *[{"going": True}] * going,
    ]
    pods = tuple(Replica(ordinal, 1, **kind) for ordinal, kind in enumerate(kinds))
    return Group(pack, len(pods) if wanted is None else wanted, pods, **more)


@pytest.mark.parametrize(
    ("story", "groups", "least", "expected"),
    [
        ("nothing is outdated", [make_group(ready=4)], 3, []),
        ("the last one first, and alone", [make_group(old=4)], 2, [("a", 3)]),
        ("packs in turn", [make_group("b", old=2), make_group("a", old=2)], 3, [("a", 1)]),
        ("the first one goes alone, whatever may be missing", [make_group("a", old=2), make_group("b", old=2)], 1, [("a", 1)]),
        ("nobody else while it starts", [make_group("a", old=1, starting=1), make_group("b", old=2)], 1, []),
        ("once it serves, as many as may be missing", [make_group("a", ready=1, old=1), make_group("b", old=2)], 2, [("a", 1), ("b", 1)]),
        ("but not more", [make_group("a", ready=1, old=1), make_group("b", old=2), make_group("c", old=2)], 5, [("a", 1)]),
        ("and one at a time on a GPU", [make_group("a", ready=1, old=3)], 1, [("a", 3)]),
        ("none where one starts already", [make_group("a", ready=1, old=2, starting=1)], 1, []),
        ("not while one is going", [make_group(ready=1, old=2, going=1)], 1, []),
        ("not while too few serve", [make_group("a", ready=1, old=1), make_group("b", old=1, starting=1)], 3, []),
        ("a broken one at any time", [make_group("a", old=1, broken=1)], 9, [("a", 1)]),
        ("the broken one alone, as long as none is proven", [make_group("a", broken=1), make_group("b", old=2)], 1, [("a", 0), ("b", 1)]),
        ("nobody is touched while a new one is in trouble", [make_group("a", ready=2, failed=1), make_group("b", old=2)], 1, []),
        ("mended: the one in trouble is outdated, and goes first", [make_group("a", old=3, broken=1)], 3, [("a", 3)]),
        ("a service of one replica may be replaced", [make_group(old=1)], 1, [("a", 0)]),
        ("fewer than asked for: one may be missing of those there are", [make_group(old=2)], 5, [("a", 1)]),
        ("not beside another service's that starts", [make_group("a", old=1, crowded=True), make_group("b", old=1)], 1, [("b", 0)]),
        ("what is being scaled away does not serve", [make_group("a", old=2, wanted=1), make_group("b", old=2)], 3, [("a", 0)]),
        ("nor is it replaced", [make_group("a", old=1, wanted=0), make_group("b", ready=2)], 1, []),
        ("who hasn't taken the manifest up proves nothing", [make_group("a", ready=2, taken_up=False), make_group("b", old=2)], 1, [("b", 1)]),
    ],
)  # fmt: skip
def test_which_are_replaced_now(story, groups, least, expected):
    """Of as many as there is a place for."""
    assert list(replacements(groups, least, sum(group.wanted for group in groups))) == expected, story


@pytest.mark.parametrize(
    ("story", "groups", "numbers", "expected"),
    [
        ("the other one's GPU is under repair", [make_group("a", old=1), make_group("b")], (1, 2), []),
        ("or has no set yet", [make_group("a", old=1)], (1, 2), []),
        ("or its holder leaves, and its replica with it", [make_group("a", old=1), make_group("b", going=1, wanted=0)], (1, 2), []),
        ("two that serve of four, and three have to", [make_group("a", old=2), make_group("b")], (3, 4), []),
        ("as many as have to serve do so without it", [make_group("a", old=3), make_group("b")], (2, 4), [("a", 2)]),
        ("there is no place for the other one", [make_group("a", old=1)], (1, 1), [("a", 0)]),
        ("nor for two of four: of the others one may go", [make_group("a", old=2)], (3, 2), [("a", 1)]),
        ("but not while one of those is under repair", [make_group("a", old=1), make_group("b")], (3, 2), []),
        ("what doesn't serve may go, whatever else is away", [make_group("a", broken=2), make_group("b")], (3, 4), [("a", 1)]),
        ("and on every GPU", [make_group("a", broken=2), make_group("b", broken=2)], (3, 4), [("a", 1), ("b", 1)]),
    ],
)  # fmt: skip
def test_what_is_away_for_another_cause_counts_as_missing(story, groups, numbers, expected):
    """The numbers: have to serve, have a place."""
    assert list(replacements(groups, *numbers)) == expected, story


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([make_group(old=2, failed=1)], ("a", 2)),
        ([make_group("a", ready=1, failed=1), make_group("b", old=1)], ("a", 1)),
        ([make_group(old=2, starting=1)], None),
        ([make_group(old=2, broken=1)], None),  # it is replaced next, which may mend it
        ([make_group(ready=2, failed=1)], None),  # no roll-out
        ([make_group(failed=1, taken_up=False), make_group("b", old=1)], None),
    ],
)
def test_what_stops_a_roll_out(groups, expected):
    assert stopped_by(groups) == expected


@pytest.mark.parametrize(
    ("story", "groups", "numbers", "expected"),
    [
        ("nobody is to come for them", [make_group(ready=4)], (1, 1, 1), 1),
        ("scaled to nothing", [make_group(ready=4)], (0, 0, 0), 0),
        ("their next places are not ready: all stay", [make_group(ready=4)], (0, 3, 4), 4),
        ("as others serve, these leave", [make_group(ready=4), make_group("b", ready=2, starting=2)], (0, 3, 4), 2),
        ("and when all do, all leave", [make_group(ready=4), make_group("b", ready=4)], (0, 3, 4), 0),
        ("the only replica stays until the next one serves", [make_group(ready=1), make_group("b", starting=1)], (0, 1, 1), 1),
        ("then it leaves", [make_group(ready=1), make_group("b", ready=1)], (0, 1, 1), 0),
        ("there is no place for as many", [make_group(ready=4)], (2, 3, 2), 2),
        ("nor for any", [make_group(ready=4)], (0, 3, 0), 0),
        ("what doesn't serve leaves at once", [make_group(ready=1, failed=1)], (0, 1, 1), 1),
        ("nobody waits for one that is in trouble", [make_group(ready=2), make_group("b", ready=1, failed=1)], (0, 1, 2), 0),
        ("unless too few would serve", [make_group(ready=2), make_group("b", ready=1, failed=2)], (0, 2, 3), 1),
        ("what is on its way out elsewhere doesn't count", [make_group(ready=2), make_group("b", ready=2, wanted=1)], (0, 3, 4), 2),
    ],
)  # fmt: skip
def test_how_far_a_set_shrinks(story, groups, numbers, expected):
    """The numbers: wanted here, have to serve, have a place."""
    target, least, placed = numbers
    assert may_shrink_to(groups, "a", target, least=least, placed=placed, assigned=placed) == expected, story


@pytest.mark.parametrize(
    ("numbers", "expected"), [((1, 0, 1), 1), ((3, 0, 4), 3), ((3, 2, 4), 3), ((1, 0, 4), 1), ((3, 4, 4), 4)]
)
def test_for_those_that_wait_for_others_memory_nobody_waits_but_for_those_that_have_to_serve(numbers, expected):
    """The numbers: have to serve, have a place with memory, are assigned. Four serve here, and none is wanted here any more."""
    least, placed, assigned = numbers
    groups = [make_group(ready=4), make_group("b")]
    assert may_shrink_to(groups, "a", 0, least=least, placed=placed, assigned=assigned) == expected


# Whole roll-outs: the decisions against a cluster that may let a replica take its time, and look in any order.


class Cluster:
    """One service on packs, moved from an old shape to a new one as the pack's reconciler does it, a look at a time."""

    def __init__(self, change):
        packs, targets, old, new, capacity, least = change
        self.new, self.capacity, self.least = new, capacity, least
        self.targets = dict(zip("abcd", targets, strict=False))
        self.pods = {
            pack: {o: Replica(o, old, ready=True) for o in range(count)}
            for pack, count in zip("abcd", packs, strict=False)
        }
        self.wanted = {pack: len(pods) for pack, pods in self.pods.items()}
        self.template = dict.fromkeys(self.pods, old)
        self.placed = sum(self.targets.values())
        self.writes = 0

    def groups(self):
        return [
            Group(
                pack,
                self.wanted[pack],
                tuple(replace(pod, outdated=pod.memory != self.template[pack]) for pod in pods.values()),
                taken_up=self.template[pack] == self.new,
            )
            for pack, pods in self.pods.items()
        ]

    def look(self, pack):
        """One reconcile of a pack. Returns whether it wrote anything."""
        before, served = (self.wanted[pack], self.template[pack], dict(self.pods[pack])), self.serving
        target = self.targets[pack]
        if self.wanted[pack] > target:
            numbers = {"least": self.least, "placed": self.placed, "assigned": self.placed}
            target = may_shrink_to(self.groups(), pack, target, **numbers)
        found = step(target, self.wanted[pack], list(self.pods[pack].values()), self.new, self.capacity)
        self.wanted[pack] = found.replicas if found.template else min(self.wanted[pack], found.replicas)
        self.template[pack] = self.new if found.template else self.template[pack]
        places = self.fitting
        for name, ordinal in replacements(self.groups(), self.least, self.fitting):
            if name == pack:
                self.pods[pack][ordinal] = replace(self.pods[pack][ordinal], going=True, ready=False)
        self.check()
        # Of the places there are one may always be empty; where fewer than have to serve have a place, no more are waited for.
        assert self.serving >= min(served, self.least, places - 1)
        if self.pods[pack] == before[2]:  # none was replaced: who left had somebody in his stead
            assert self.serving >= min(served, self.placed)
        changed = before != (self.wanted[pack], self.template[pack], self.pods[pack])
        self.writes += changed
        return changed

    def controller(self, pack):
        """The StatefulSet's controller and the nodes: what is not wanted goes, what went comes back, and starts later."""
        pods, changed, served = self.pods[pack], False, self.serving
        for ordinal, pod in list(pods.items()):
            if pod.going or ordinal >= self.wanted[pack]:
                del pods[ordinal]
                changed = True
        for ordinal in range(self.wanted[pack]):
            if ordinal not in pods:
                pods[ordinal] = Replica(ordinal, self.template[pack])
                changed = True
        self.check()
        assert self.serving == served
        return changed

    def start(self, pack):
        """The start lock lets one engine start at a time."""
        waiting = sorted(ordinal for ordinal, pod in self.pods[pack].items() if not pod.ready and not pod.going)
        if waiting:
            self.pods[pack][waiting[0]] = replace(self.pods[pack][waiting[0]], ready=True)
        return bool(waiting)

    @property
    def serving(self):
        return sum(
            pod.ready and not pod.going and pod.ordinal < self.wanted[pack]
            for pack, pods in self.pods.items()
            for pod in pods.values()
        )

    @property
    def fitting(self):
        return sum(
            fitting(self.targets[pack], list(pods.values()), self.new, self.capacity)
            for pack, pods in self.pods.items()
        )

    def check(self):
        for pods in self.pods.values():
            assert sum(pod.memory for pod in pods.values()) <= self.capacity
            assert sum(pod.going for pod in pods.values()) <= 1

    @property
    def done(self):
        return all(
            set(pods) == set(range(self.targets[pack]))
            and all(pod.ready and pod.memory == self.new for pod in pods.values())
            for pack, pods in self.pods.items()
        )


@st.composite
def changes(draw):
    """A service on up to four GPUs, its old and its new shape, and where the planner wants how many of the new one."""
    capacity, old, new = draw(st.integers(6, 24)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    count = draw(st.integers(1, 4))
    packs = [draw(st.integers(0, min(6, capacity // old))) for _ in range(count)]
    targets = [draw(st.integers(0, min(6, capacity // new))) for _ in range(count)]
    asked = max(sum(targets), draw(st.integers(0, 12)))
    least = max(1, asked - draw(st.integers(1, 4))) if asked else 0
    return packs, targets, old, new, capacity, least


@settings(max_examples=200, deadline=None)
@given(changes(), st.randoms(use_true_random=False))
def test_a_change_comes_to_its_end_with_enough_serving_and_no_ledger_exceeded(change, chance):
    """Whatever the order in which packs are looked at and replicas come up; `check` looks after each step."""
    cluster = Cluster(change)
    idle = 0
    while idle < 60:
        pack, act = chance.choice(list(cluster.pods)), chance.choice([cluster.look, cluster.controller, cluster.start])
        idle = 0 if act(pack) else idle + 1
    for _ in range(200):  # chance may have left something undone
        acted = [act(pack) for act in (cluster.look, cluster.controller, cluster.start) for pack in cluster.pods]
        if not any(acted):
            break
    assert cluster.done
    # Each replica is replaced once, and each set written a few times: once for its template, and as it shrinks or grows.
    assert cluster.writes <= sum(change[0]) + 2 * sum(change[0]) + 2 * sum(change[1]) + 2 * len(change[0])


@settings(max_examples=50, deadline=None)
@given(changes(), st.randoms(use_true_random=False))
def test_a_revision_that_never_starts_costs_one_replica(change, chance):
    """However much may be missing: the first one that doesn't come up is the last one that is touched."""
    packs, _, old, *_ = change
    cluster = Cluster((packs, packs, old, old + 1, 10**6, 1))
    before = cluster.serving
    for _ in range(300):
        pack = chance.choice(list(cluster.pods))
        chance.choice([cluster.look, cluster.controller])(pack)
        for ordinal, pod in cluster.pods[pack].items():
            if pod.memory == cluster.new and not pod.going:
                cluster.pods[pack][ordinal] = replace(pod, failed=True)
    assert cluster.serving >= before - 1
    assert before < 2 or stopped_by(cluster.groups())
