"""The placement planner: stories of one service and of several, and what must hold for any snapshot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightship.core import placement
from tightship.core.memory import Reserve
from tightship.core.placement import (
    Assignment,
    Demand,
    Devices,
    Health,
    Pack,
    ServiceRef,
    Shape,
    Snapshot,
    apply,
    ordinal_of,
    pack_name,
    plan,
)

H100 = "NVIDIA-H100-80GB-HBM3"
GIB = 2**30
OPT = ServiceRef("team", "opt")
SHAPE = Shape("opt-1", batch=96, kv_cache=8 * GIB, memory=20 * GIB)


def make_demand(replicas=4, *, service=OPT, uid="u1", per_device=4, shape=SHAPE, **more):
    return Demand(
        service,
        uid,
        replicas,
        "cuda",
        more.pop("product", H100),
        more.pop("mode", "Reservation"),
        shape,
        per_device,
        **more,
    )


def make_pack(ordinal=0, replicas=0, *, service=OPT, uid="u1", shape=SHAPE, node="n0", capacity=80 * GIB, **more):
    assignments = (Assignment(service, uid, replicas, shape),) if replicas else ()
    return Pack(
        pack_name(service, ordinal),
        service,
        ordinal,
        "cuda",
        more.pop("product", H100),
        more.pop("mode", "Reservation"),
        node=node,
        capacity=capacity,
        assignments=assignments,
        **more,
    )


def make_devices(*units, product=H100, device="cuda"):
    return tuple(Devices(f"n{index}", device, product, count) for index, count in enumerate(units))


def counts(snapshot, planned, service=OPT):
    """Replicas of the service by pack ordinal once the plan is written."""
    after = apply(snapshot, planned).packs
    return {
        pack.ordinal: sum(each.replicas for each in pack.assignments if each.service == service)
        for pack in sorted(after, key=lambda pack: pack.ordinal)
        if pack.owner == service
    }


def test_a_new_service_opens_as_many_packs_as_it_needs():
    snapshot = Snapshot((make_demand(6),), (), make_devices(2, 2))
    planned = plan(snapshot)
    assert [(pack.name, pack.assignments[0].replicas) for pack in planned.create] == [
        ("team-opt-0", 4),
        ("team-opt-1", 2),
    ]
    assert planned.shortfalls == ()


def test_a_gpu_takes_no_more_replicas_than_mps_takes_clients():
    """A vLLM is two clients, and 48 are what every driver takes."""
    small = replace(SHAPE, memory=GIB)
    snapshot = Snapshot((make_demand(30, per_device=48, shape=small),), (), make_devices(2))
    assert counts(snapshot, plan(snapshot)) == {0: 24, 1: 6}


def test_scaling_up_fills_the_partly_used_pack_before_opening_another():
    snapshot = Snapshot((make_demand(5),), (make_pack(0, 2),), make_devices(2))
    assert counts(snapshot, plan(snapshot)) == {0: 4, 1: 1}


def test_scaling_down_empties_the_newest_pack_first():
    packs = (make_pack(0, 4), make_pack(1, 3), make_pack(2, 2))
    snapshot = Snapshot((make_demand(3),), packs, make_devices(3))
    assert counts(snapshot, plan(snapshot)) == {0: 3, 1: 0, 2: 0}


@pytest.mark.parametrize("demands", [(), (make_demand(4, uid="another"),)], ids=["deleted", "made anew"])
def test_a_service_that_is_gone_gives_its_packs_back(demands):
    snapshot = Snapshot(demands, (make_pack(0, 4),), make_devices(1))
    assert ("team-opt-0", ()) in plan(snapshot).update or counts(snapshot, plan(snapshot)) == {0: 4}
    after = apply(snapshot, plan(snapshot))
    assert all(each.uid != "u1" for pack in after.packs for each in pack.assignments)


def test_the_ledger_limits_a_pack_below_the_recommendation():
    snapshot = Snapshot((make_demand(4),), (make_pack(0, 0, capacity=50 * GIB),), make_devices(1, 1))
    assert counts(snapshot, plan(snapshot)) == {0: 2, 1: 2}


def test_a_larger_shape_moves_only_what_no_longer_fits():
    larger = replace(SHAPE, profile="opt-2", memory=30 * GIB)
    snapshot = Snapshot((make_demand(4, shape=larger),), (make_pack(0, 4),), make_devices(2))
    planned = plan(snapshot)
    assert counts(snapshot, planned) == {0: 2, 1: 2}
    assert dict(planned.update)["team-opt-0"][0].shape == larger


@pytest.mark.parametrize(
    ("least", "devices", "expected", "kept"),
    [(3, 1, {0: 4}, 4), (2, 1, {0: 2}, 0), (3, 2, {0: 2, 1: 2}, None), (0, 1, {0: 2}, 0)],
)
def test_a_larger_shape_waits_for_devices_where_too_few_would_serve(least, devices, expected, kept):
    larger = replace(SHAPE, profile="opt-2", memory=30 * GIB)
    snapshot = Snapshot((make_demand(4, shape=larger, least=least),), (make_pack(0, 4),), make_devices(devices))
    planned = plan(snapshot)
    assert counts(snapshot, planned) == expected
    shortfall = planned.shortfall_of(OPT)
    assert (shortfall.kept if shortfall else None) == kept
    assert shortfall is None or (shortfall.placed, shortfall.packs_needed) == (2, 1)
    shapes_now = {each.shape for pack in apply(snapshot, planned).packs for each in pack.assignments}
    assert shapes_now == {SHAPE if kept else larger}


def test_too_few_gpus_are_reported_with_numbers():
    snapshot = Snapshot(
        (make_demand(9),), (make_pack(0, 4, service=ServiceRef("other", "x"), uid="u9"),), make_devices(2)
    )
    snapshot = replace(
        snapshot, demands=(*snapshot.demands, make_demand(4, service=ServiceRef("other", "x"), uid="u9"))
    )
    shortfall = plan(snapshot).shortfall_of(OPT)
    assert shortfall is not None
    assert (shortfall.wanted, shortfall.placed, shortfall.packs_needed, shortfall.total, shortfall.free) == (
        9,
        4,
        2,
        2,
        0,
    )


def test_a_pack_that_waits_for_its_node_takes_a_gpu_already():
    snapshot = Snapshot((make_demand(8),), (make_pack(0, 4, node=None, capacity=None),), make_devices(1))
    assert counts(snapshot, plan(snapshot)) == {0: 4}
    assert plan(snapshot).shortfalls[0].placed == 4


def test_a_pack_whose_node_is_gone_is_replaced():
    snapshot = Snapshot((make_demand(4),), (make_pack(0, 4, node="gone", health=Health.LOST),), make_devices(1))
    assert counts(snapshot, plan(snapshot)) == {0: 0, 1: 4}


def test_replicas_that_do_not_fit_a_node_move_and_the_node_is_excluded():
    snapshot = Snapshot((make_demand(4),), (make_pack(0, 4, health=Health.UNFIT),), make_devices(2, 1))
    planned = plan(snapshot)
    assert counts(snapshot, planned) == {0: 0, 1: 4}
    assert planned.create[0].excluded == {"n0"}


def test_replicas_that_do_not_fit_stay_when_there_is_no_other_node():
    snapshot = Snapshot((make_demand(4),), (make_pack(0, 4, health=Health.UNFIT),), make_devices(2))
    planned = plan(snapshot)
    assert planned.empty
    assert planned.shortfalls[0].kept == 4


def test_a_service_without_a_decision_keeps_what_it_has():
    snapshot = Snapshot((make_demand(9, shape=None),), (make_pack(0, 4), make_pack(1, 2)), make_devices(4))
    assert plan(snapshot).empty


def test_a_service_without_a_decision_may_shrink():
    snapshot = Snapshot((make_demand(3, shape=None),), (make_pack(0, 4), make_pack(1, 2)), make_devices(4))
    assert counts(snapshot, plan(snapshot)) == {0: 3, 1: 0}


def test_old_replicas_on_another_product_stay_until_there_is_a_place():
    snapshot = Snapshot((make_demand(4, product="L40S"),), (make_pack(0, 4),), make_devices(1))
    planned = plan(snapshot)
    assert planned.empty
    assert planned.shortfalls[0].kept == 4
    moved = replace(snapshot, devices=(*snapshot.devices, Devices("n9", "cuda", "L40S", 1)))
    assert counts(moved, plan(moved)) == {0: 0, 1: 4}


def test_another_mode_on_a_full_cluster_gives_up_one_pack_at_a_time():
    packs = (make_pack(0, 4, mode="Exclusive"), make_pack(1, 4, mode="Exclusive"))
    snapshot = Snapshot((make_demand(8),), packs, make_devices(2))
    first = apply(snapshot, plan(snapshot))
    assert counts(snapshot, plan(snapshot)) == {0: 4, 1: 0}
    assert plan(first).empty
    freed = replace(first, packs=tuple(pack for pack in first.packs if pack.assignments))
    assert counts(freed, plan(freed)) == {0: 4, 1: 4}
    bound = apply(freed, plan(freed))
    bound = replace(bound, packs=tuple(replace(pack, node="n0") for pack in bound.packs))
    assert counts(bound, plan(bound)) == {0: 0, 1: 4}


def test_the_longest_waiting_service_gets_the_last_gpu():
    early, late = ServiceRef("b", "early"), ServiceRef("a", "late")
    demands = (
        make_demand(1, service=late, since="2026-02-02T00:00:00Z"),
        make_demand(1, service=early, since="2026-01-01T00:00:00Z"),
    )
    planned = plan(Snapshot(demands, (), make_devices(1)))
    assert [pack.owner for pack in planned.create] == [early]
    assert planned.shortfall_of(late) is not None


def test_only_the_nodes_a_service_may_use_count():
    snapshot = Snapshot((make_demand(8, nodes=frozenset({"n1"})),), (), make_devices(4, 1))
    assert counts(snapshot, plan(snapshot)) == {0: 4}
    assert plan(snapshot).shortfalls[0].total == 1


def test_a_core_set_goes_to_the_fullest_node_that_still_has_room():
    demand = Demand(OPT, "u1", 2, "cpu", "cpu", "CPUSet", SHAPE, 2, units=2)
    snapshot = Snapshot((demand,), (), make_devices(8, 3, 1, product="cpu", device="cpu"))
    created = plan(snapshot).create[0]
    assert (created.node, created.units) == ("n1", 2)


def test_core_sets_of_one_pass_share_a_nodes_memory():
    demand = Demand(OPT, "u1", 4, "cpu", "cpu", "CPUSet", SHAPE, 1, units=2, memory=20 * GIB)
    snapshot = Snapshot(
        (demand,), (), (Devices("n0", "cpu", "cpu", 16, 50 * GIB), Devices("n1", "cpu", "cpu", 16, 20 * GIB))
    )
    planned = plan(snapshot)
    assert sorted(pack.node for pack in planned.create) == ["n0", "n0", "n1"]
    shortfall = planned.shortfall_of(OPT)
    assert (shortfall.placed, shortfall.total, shortfall.free) == (3, 32, 0)
    assert (shortfall.memory_per_pack, shortfall.memory_free) == (20 * GIB, 10 * GIB)


BERT = ServiceRef("team", "bert")
SMALL = Shape("bert-1", batch=32, kv_cache=2 * GIB, memory=10 * GIB)


def make_tenant(replicas=1, **more):
    return make_demand(
        replicas, **{"service": BERT, "uid": "u2", "shape": SMALL, "shared": True, "since": "2026-02-02", **more}
    )


def places(snapshot, planned=None):
    """Replicas by pack and service once the plan is written; packs that are given back are left out."""
    after = apply(snapshot, planned or plan(snapshot))
    return {
        pack.name: {each.service.name: each.replicas for each in pack.assignments}
        for pack in after.packs
        if pack.assignments
    }


@pytest.mark.parametrize(
    ("owner", "tenant", "expected"),
    [
        ({}, {}, {"team-opt-0": {"opt": 2, "bert": 1}}),
        ({"shared": False}, {}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"shared": False}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"mode": "Reservation as 1000"}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"shape": replace(SMALL, memory=41 * GIB)}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"reserve": Reserve(31 * GIB)}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"per_device": 2}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({"per_device": 2}, {}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({"shape": None}, {}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"nodes": frozenset({"n1"})}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({}, {"priority": "high"}, {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}),
        ({"priority": "high"}, {"priority": "high"}, {"team-opt-0": {"opt": 2, "bert": 1}}),
    ],
    ids=[
        "all fits",
        "owner no",
        "tenant no",
        "user",
        "memory",
        "reserve",
        "limit",
        "owner's limit",
        "undecided",
        "node",
        "priority",
        "same priority",
    ],
)
def test_a_replica_takes_free_memory_of_another_service_where_everything_agrees(owner, tenant, expected):
    demands = (make_demand(2, **{"shared": True, **owner}), make_tenant(**tenant))
    assert places(Snapshot(demands, (make_pack(0, 2),), make_devices(1, 1))) == expected


def test_nobody_joins_a_pack_that_found_no_device():
    demands = (make_demand(2, shared=True), make_tenant(device_memory=80 * GIB))
    pack = replace(make_pack(0, 2), node=None, capacity=None, waiting=True)
    assert places(Snapshot(demands, (pack,), make_devices(2)))["team-bert-0"] == {"bert": 1}
    found = replace(pack, waiting=False)
    assert places(Snapshot(demands, (found,), make_devices(2))) == {"team-opt-0": {"opt": 2, "bert": 1}}


def test_services_of_different_namespaces_never_share():
    stranger = make_tenant(service=ServiceRef("other", "bert"))
    snapshot = Snapshot((make_demand(2, shared=True), stranger), (make_pack(0, 2),), make_devices(2))
    assert places(snapshot) == {"team-opt-0": {"opt": 2}, "other-bert-0": {"bert": 1}}


def test_the_pack_that_is_left_with_the_least_free_memory_is_taken():
    third, uid = ServiceRef("team", "gpt"), "u3"
    demands = (
        make_demand(2, shared=True),
        make_demand(1, service=third, uid=uid, shared=True, shape=replace(SHAPE, memory=65 * GIB)),
        make_tenant(),
    )
    packs = (
        make_pack(0, 2),
        make_pack(0, 1, service=third, uid=uid, shape=replace(SHAPE, memory=65 * GIB)),
    )
    assert places(Snapshot(demands, packs, make_devices(2))) == {
        "team-opt-0": {"opt": 2},
        "team-gpt-0": {"gpt": 1, "bert": 1},
    }


@pytest.mark.parametrize(
    ("replicas", "devices", "expected"),
    [
        (3, 3, {"team-opt-0": {"opt": 3, "bert": 1}, "team-bert-0": {"bert": 2}}),
        # A pack of its own is needed anyway: no mix that spares none.
        (4, 3, {"team-opt-0": {"opt": 3}, "team-bert-0": {"bert": 2}, "team-bert-1": {"bert": 2}}),
        (7, 3, {"team-opt-0": {"opt": 3, "bert": 1}, "team-bert-0": {"bert": 2}, "team-bert-1": {"bert": 4}}),
        (4, 2, {"team-opt-0": {"opt": 3, "bert": 1}, "team-bert-0": {"bert": 2}}),
    ],
)
def test_its_own_packs_come_first_then_those_of_others_where_that_spares_one(replicas, devices, expected):
    demands = (make_demand(3, shared=True), make_tenant(replicas, per_device=4))
    packs = (make_pack(0, 3), make_pack(0, 1, service=BERT, uid="u2", shape=SMALL, capacity=20 * GIB))
    assert places(Snapshot(demands, packs, make_devices(devices))) == expected


def test_before_the_device_is_known_its_memory_is_what_the_profile_says():
    demands = (make_demand(2, shared=True, device_memory=50 * GIB), make_tenant(device_memory=50 * GIB))
    assert places(Snapshot(demands, (), make_devices(2))) == {"team-opt-0": {"opt": 2, "bert": 1}}
    larger = (demands[0], replace(demands[1], shape=replace(SMALL, memory=11 * GIB)))
    assert places(Snapshot(larger, (), make_devices(2))) == {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}


def test_a_tenant_stays_when_the_owner_goes_and_may_fill_the_pack():
    pack = replace(make_pack(0, 2), assignments=(Assignment(BERT, "u2", 1, SMALL), Assignment(OPT, "u1", 2, SHAPE)))
    snapshot = Snapshot((make_tenant(4),), (pack,), make_devices(1, 1))
    assert places(snapshot) == {"team-opt-0": {"bert": 4}}


def test_who_no_longer_shares_gets_the_tenant_moved_only_to_a_better_place():
    pack = replace(make_pack(0, 2), assignments=(Assignment(BERT, "u2", 1, SMALL), Assignment(OPT, "u1", 2, SHAPE)))
    demands = (make_demand(2, shared=False), make_tenant())
    full = Snapshot(demands, (pack,), make_devices(1))
    assert plan(full).empty
    assert plan(full).shortfall_of(BERT).kept == 1
    assert places(replace(full, devices=make_devices(2))) == {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}


def test_an_owner_s_larger_shape_displaces_the_tenant():
    pack = replace(make_pack(0, 2), assignments=(Assignment(BERT, "u2", 2, SMALL), Assignment(OPT, "u1", 2, SHAPE)))
    demands = (make_demand(2, shared=True, shape=replace(SHAPE, memory=35 * GIB)), make_tenant(2))
    assert places(Snapshot(demands, (pack,), make_devices(1, 1))) == {
        "team-opt-0": {"opt": 2, "bert": 1},
        "team-bert-0": {"bert": 1},
    }


@pytest.mark.parametrize(
    ("story", "least", "devices", "expected", "waits"),
    [
        ("both have to serve, and there is no other GPU", 2, (1,), {"team-opt-0": {"opt": 2, "bert": 2}}, (1, 2)),
        ("one may be missing", 1, (1,), {"team-opt-0": {"opt": 2, "bert": 1}}, None),
        ("with a GPU free nobody is", 2, (1, 1), {"team-opt-0": {"opt": 2, "bert": 1}, "team-bert-0": {"bert": 1}}, None),
    ],
)  # fmt: skip
def test_an_owner_s_larger_shape_waits_where_too_few_of_its_tenant_would_serve(story, least, devices, expected, waits):
    pack = replace(make_pack(0, 2), assignments=(Assignment(BERT, "u2", 2, SMALL), Assignment(OPT, "u1", 2, SHAPE)))
    larger = replace(SHAPE, memory=35 * GIB)
    snapshot = Snapshot(
        (make_demand(2, shared=True, shape=larger, least=1), make_tenant(2, least=least)),
        (pack,),
        make_devices(*devices),
    )
    planned = plan(snapshot)
    assert places(snapshot) == expected, story
    shapes_now = {each.shape for pack in apply(snapshot, planned).packs for each in pack.assignments}
    assert shapes_now == {SHAPE if waits else larger, SMALL}
    shortfall = planned.shortfall_of(OPT)
    assert (shortfall is not None) is (waits is not None)
    if shortfall is not None:
        assert (shortfall.spared.service, shortfall.spared.left, shortfall.spared.least) == (BERT, *waits)
        assert (shortfall.wanted, shortfall.placed, shortfall.kept, shortfall.free) == (2, 2, 2, 0)


def test_so_does_a_tenant_s_and_one_that_packs_fewer():
    """Of two tenants the later one is pushed by the earlier one's memory; a decision for fewer on a GPU takes places away as well."""
    third = ServiceRef("team", "gpt")
    assignments = (Assignment(BERT, "u2", 1, SMALL), Assignment(third, "u3", 1, SMALL), Assignment(OPT, "u1", 1, SHAPE))
    pack = replace(make_pack(0, 1), assignments=assignments)
    owner, last = make_demand(1, shared=True, least=1), make_tenant(1, service=third, uid="u3", least=1, since="2")
    larger = make_tenant(1, shape=replace(SMALL, memory=55 * GIB), least=1, since="1")
    assert plan(Snapshot((owner, larger, last), (pack,), make_devices(1))).empty
    fewer = (replace(owner, per_device=2), make_tenant(1, least=1, since="1"), last)
    assert plan(Snapshot(fewer, (pack,), make_devices(1))).empty


def test_a_tenant_is_kept_off_a_node_on_every_pack_there():
    """Where it found no room, whoever holds the GPU; with nowhere else to go it stays, and what it lacks is told."""
    third = ServiceRef("team", "gpt")
    demands = (
        make_demand(2, shared=True),
        make_demand(2, service=third, uid="u3", shared=True),
        make_tenant(avoids=frozenset({"n0"})),
    )
    packs = (make_pack(0, 2), make_pack(0, 2, service=third, uid="u3", node="n1"))
    assert places(Snapshot(demands, packs, make_devices(1, 1)))["team-gpt-0"] == {"bert": 1, "gpt": 2}
    both = replace(demands[2], avoids=frozenset({"n0", "n1"}))
    there = replace(
        packs[1], assignments=(Assignment(BERT, "u2", 1, SMALL), *packs[1].assignments), unfit=frozenset({BERT})
    )
    stuck = Snapshot((*demands[:2], both), (packs[0], there), make_devices(1, 1))
    assert plan(stuck).empty
    assert plan(stuck).shortfall_of(BERT).kept == 1


def test_a_node_that_is_kept_off_no_longer_is_used_again():
    """What a pack had to keep off when it was opened says nothing later."""
    snapshot = Snapshot(
        (make_demand(8),), (make_pack(0, 4, node="n1", excluded=frozenset({"n0"})),), make_devices(1, 1)
    )
    assert counts(snapshot, plan(snapshot)) == {0: 4, 1: 4}
    kept_off = replace(snapshot, demands=(make_demand(8, avoids=frozenset({"n0"})),))
    assert plan(kept_off).shortfall_of(OPT).placed == 4


def test_a_pack_kept_waiting_by_its_topology_spread_takes_no_gpu_from_others():
    other = ServiceRef("team", "gpt")
    waits = replace(make_pack(1, 4, node=None, capacity=None), waiting=True, apart=True)
    demands = (make_demand(8, since="1"), make_demand(4, service=other, uid="u3", since="2"))
    snapshot = Snapshot(demands, (make_pack(0, 4), waits), make_devices(2))
    assert counts(snapshot, plan(snapshot), other) == {0: 4}
    more = replace(snapshot, demands=(make_demand(12, since="1"),))
    assert plan(more).shortfall_of(OPT).placed == 8  # another one of its own would wait as well
    busy = replace(snapshot, packs=(snapshot.packs[0], replace(waits, apart=False)))
    assert plan(busy).shortfall_of(other).placed == 0


def make_cordoned(*replicas, **more):
    return tuple(make_pack(ordinal, count, cordoned=True, **more) for ordinal, count in enumerate(replicas))


def test_a_cordoned_node_s_packs_move_one_at_a_time():
    snapshot = Snapshot((make_demand(8),), make_cordoned(4, 4), (Devices("n1", "cuda", H100, 2),))
    first = apply(snapshot, plan(snapshot))
    assert counts(snapshot, plan(snapshot)) == {0: 0, 1: 4, 2: 4}
    assert plan(first).empty  # the first one is still there, until its replicas serve elsewhere
    gone = replace(first, packs=tuple(pack for pack in first.packs if pack.assignments))
    gone = replace(gone, packs=tuple(replace(pack, node=pack.node or "n1") for pack in gone.packs))
    assert counts(gone, plan(gone)) == {1: 0, 2: 4, 3: 4}


@pytest.mark.parametrize(
    ("story", "snapshot", "expected"),
    [
        ("nowhere to go", Snapshot((make_demand(4),), make_cordoned(4), ()), {0: 4}),
        ("nothing is added there", Snapshot((make_demand(4),), make_cordoned(3), ()), {0: 3}),
        ("to a pack of its own with room", Snapshot((make_demand(4),), (make_pack(0, 2, node="n1"), *make_cordoned(0, 2)[1:]), ()), {0: 4, 1: 0}),
        ("not while it is being measured", Snapshot((make_demand(4, shape=None),), make_cordoned(4), make_devices(0, 1)), {0: 4}),
    ],
)  # fmt: skip
def test_what_a_cordoned_node_keeps(story, snapshot, expected):
    assert counts(snapshot, plan(snapshot)) == expected, story


def test_of_a_cordoned_node_the_first_pack_that_can_move_does():
    """Packs of a product that is nowhere else are not in the way of others."""
    other = ServiceRef("a", "only")
    stuck = make_pack(0, 1, service=other, uid="u3", product="L40S", cordoned=True)
    demands = (make_demand(4), make_demand(1, service=other, uid="u3", product="L40S"))
    snapshot = Snapshot(demands, (stuck, *make_cordoned(4)), (Devices("n1", "cuda", H100, 1),))
    assert counts(snapshot, plan(snapshot)) == {0: 0, 1: 4}
    assert counts(snapshot, plan(snapshot), other) == {0: 1}


def test_a_tenant_that_finds_no_room_on_the_node_leaves_and_the_owner_stays():
    both = (Assignment(BERT, "u2", 1, SMALL), Assignment(OPT, "u1", 2, SHAPE))
    pack = replace(make_pack(0, 2), assignments=both, unfit=frozenset({BERT}))
    snapshot = Snapshot((make_demand(2, shared=True), make_tenant()), (pack,), make_devices(2, 1))
    planned = plan(snapshot)
    assert places(snapshot, planned) == {"team-opt-0": {"opt": 2}, "team-bert-0": {"bert": 1}}
    assert planned.create[0].excluded == {"n0"}


def test_memory_that_one_gives_up_serves_another_in_the_same_pass():
    demands = (make_tenant(2, since="2026-01-01"), make_demand(1, shared=True, since="2026-02-02"))
    snapshot = Snapshot(demands, (make_pack(0, 4),), make_devices(1))
    assert places(snapshot) == {"team-opt-0": {"opt": 1, "bert": 2}}


@pytest.mark.parametrize(
    ("replicas", "expected"), [(1, [1]), (2, [1, 1]), (3, [2, 1]), (4, [2, 2]), (5, [3, 2]), (9, [4, 4, 1])]
)
def test_spread_puts_at_most_half_on_one_pack(replicas, expected):
    snapshot = Snapshot((make_demand(replicas, spread=True),), (), make_devices(4))
    assert list(counts(snapshot, plan(snapshot)).values()) == expected


def test_spread_moves_serving_replicas_only_to_a_second_gpu():
    one = Snapshot((make_demand(4, spread=True),), (make_pack(0, 4),), make_devices(1))
    assert plan(one).empty
    shortfall = plan(one).shortfall_of(OPT)
    assert (shortfall.placed, shortfall.kept, shortfall.per_pack, shortfall.packs_needed) == (2, 2, 2, 1)
    two = replace(one, devices=make_devices(2))
    assert counts(two, plan(two)) == {0: 2, 1: 2}


def test_spread_and_sharing_use_two_packs_of_others():
    third = ServiceRef("team", "gpt")
    demands = (
        make_demand(2, shared=True),
        make_demand(2, service=third, uid="u3", shared=True),
        make_tenant(2, spread=True),
    )
    packs = (make_pack(0, 2), make_pack(0, 2, service=third, uid="u3"))
    assert places(Snapshot(demands, packs, make_devices(3))) == {
        "team-opt-0": {"opt": 2, "bert": 1},
        "team-gpt-0": {"gpt": 2, "bert": 1},
    }


@pytest.mark.parametrize(
    ("service", "ordinal", "name"),
    [
        (ServiceRef("default", "opt"), 0, "default-opt-0"),
        (ServiceRef("n" * 30, "s" * 17), 3, "n" * 30 + "-" + "s" * 17 + "-3"),
    ],
)
def test_pack_names(service, ordinal, name):
    assert pack_name(service, ordinal) == name


def test_long_pack_names_are_cut_and_stay_apart():
    one, other = (pack_name(ServiceRef("n" * 60, "s" * 39 + letter), 12) for letter in "ab")
    assert one != other
    assert all(len(name) <= 50 and name.endswith("-12") for name in (one, other))
    assert ordinal_of(one) == 12


def test_services_whose_names_would_collide_get_different_packs():
    one, other = ServiceRef("a", "b-c"), ServiceRef("a-b", "c")
    planned = plan(Snapshot((make_demand(1, service=one), make_demand(1, service=other)), (), make_devices(2)))
    assert [pack.name for pack in planned.create] == ["a-b-c-0", "a-b-c-1"]


SERVICES = [ServiceRef("a", "x"), ServiceRef("a", "y"), ServiceRef("a", "z"), ServiceRef("b", "x")]
shapes = st.builds(Shape, st.sampled_from(["p", "q"]), st.integers(1, 3), st.just(1), st.integers(1, 5))


@st.composite
def assigned(draw, owner, capacity):
    """What is on a pack, within its ledger: replicas of its owner, and sometimes of others of the namespace."""
    left, found = 8 if capacity is None else capacity, []
    for service in SERVICES:
        if service.namespace != owner.namespace or (service != owner and draw(st.integers(0, 2))):
            continue
        shape = draw(shapes)
        replicas = draw(st.integers(0, min(4, left // shape.memory)))
        left -= replicas * shape.memory
        if replicas:
            found.append(Assignment(service, draw(st.sampled_from(["u1", "u1", "u2"])), replicas, shape))
    return tuple(draw(st.permutations(found)))


@st.composite
def snapshots(draw):
    """Any mixture of services, packs in every state and devices, with small numbers so that limits are met often."""
    demands = []
    for service in SERVICES:
        if draw(st.booleans()):
            device = draw(st.sampled_from(["cuda", "cpu"]))
            demands.append(
                Demand(
                    service,
                    draw(st.sampled_from(["u1", "u2"])),
                    draw(st.integers(0, 9)),
                    device,
                    draw(st.sampled_from(["H", "L"])) if device == "cuda" else "cpu",
                    draw(st.sampled_from(["R", "E"])),
                    draw(st.none() | shapes),
                    draw(st.integers(1, 4)),
                    units=1 if device == "cuda" else draw(st.integers(1, 3)),
                    nodes=draw(st.none() | st.frozensets(st.sampled_from(["n0", "n1", "n2"]))),
                    since=draw(st.sampled_from(["", "1", "2"])),
                    memory=0 if device == "cuda" else draw(st.integers(0, 3)),
                    shared=draw(st.booleans()),
                    spread=draw(st.booleans()),
                    reserve=Reserve(draw(st.integers(0, 1))),
                    device_memory=draw(st.none() | st.integers(4, 12)),
                    avoids=draw(st.frozensets(st.sampled_from(["n0", "n1"]), max_size=1)),
                    least=draw(st.sampled_from([0, 0, 1, 3, 6])),
                )
            )
    packs = []
    for service in SERVICES:
        for ordinal in range(draw(st.integers(0, 3))):
            capacity, device = draw(st.none() | st.integers(1, 12)), draw(st.sampled_from(["cuda", "cpu"]))
            node = draw(st.none() | st.sampled_from(["n0", "n1", "n2", "gone"]))
            packs.append(
                Pack(
                    pack_name(service, ordinal),
                    service,
                    ordinal,
                    device,
                    draw(st.sampled_from(["H", "L"])) if device == "cuda" else "cpu",
                    draw(st.sampled_from(["R", "E"])),
                    node=node,
                    capacity=capacity,
                    health=draw(st.sampled_from(Health)),
                    assignments=draw(assigned(service, capacity)),
                    excluded=draw(st.frozensets(st.sampled_from(["n0", "n1"]), max_size=1)),
                    memory=0 if device == "cuda" else draw(st.integers(0, 3)),
                    unfit=draw(st.frozensets(st.sampled_from(SERVICES), max_size=1)),
                    # What waits for a place has none that could be cordoned, and what has one doesn't wait for it.
                    apart=node is None and draw(st.booleans()),
                    cordoned=node is not None and draw(st.integers(0, 3)) == 0,
                )
            )
    devices = [
        Devices(node, device, product, draw(st.integers(0, 3)), 0 if device == "cuda" else draw(st.integers(0, 6)))
        for node in ("n0", "n1", "n2")
        for device, product in (("cuda", "H"), ("cuda", "L"), ("cpu", "cpu"))
    ]
    return Snapshot(tuple(demands), tuple(packs), tuple(devices))


@settings(max_examples=300, deadline=None)
@given(snapshots())
def test_no_ledger_is_exceeded_and_nobody_gets_more_than_asked(snapshot):
    demands = {demand.service: demand for demand in snapshot.demands}
    planned = plan(snapshot)
    after, wait = apply(snapshot, planned), {short.service for short in planned.shortfalls if short.spared}
    for pack in after.packs:
        if pack.capacity is not None:
            assert sum(each.replicas * each.shape.memory for each in pack.assignments) <= pack.capacity
        assert {each.service.namespace for each in pack.assignments} <= {pack.owner.namespace}
        if pack.health is Health.LEAVING or not settled(pack, demands):
            continue
        here = [demands[each.service] for each in pack.assignments]
        limits = [each.per_device for each in here if each.service not in wait]
        assert not limits or sum(each.replicas for each in pack.assignments) <= min(limits)
        if pack.capacity is not None and here:
            free = pack.capacity - sum(each.replicas * each.shape.memory for each in pack.assignments)
            assert free >= max(each.reserve.amount for each in here)
    for demand in snapshot.demands:
        mine = [each for pack in after.packs for each in pack.assignments if each.service == demand.service]
        assert all(each.uid == demand.uid for each in mine)
        leaving = sum(
            each.replicas
            for pack in after.packs
            if pack.health is Health.LEAVING
            for each in pack.assignments
            if each.service == demand.service
        )
        assert sum(each.replicas for each in mine) - leaving <= demand.replicas


def settled(pack, demands):
    """Whether all who are on the pack run there as they want to now."""
    here = [(each, demands[each.service]) for each in pack.assignments]
    return all(placement._compatible(pack, demand) and demand.shape == each.shape for each, demand in here)


def on(pack, service):
    return sum(each.replicas for each in pack.assignments if each.service == service)


@settings(max_examples=150, deadline=None)
@given(snapshots())
def test_a_larger_shape_leaves_as_many_as_have_to_serve_or_waits(snapshot):
    """On packs of its own that nothing else is the matter with; who displaces a tenant is the pack's owner."""
    after = {pack.name: pack for pack in apply(snapshot, plan(snapshot)).packs}
    for demand in snapshot.demands:
        mine = [pack for pack in snapshot.packs if on(pack, demand.service)]
        alone = all(
            pack.health is Health.SOUND
            and demand.service not in pack.unfit
            and placement._compatible(pack, demand)
            and {each.service for each in pack.assignments} == {demand.service}
            and all(each.uid == demand.uid and each.shape != demand.shape for each in pack.assignments)
            for pack in mine
        )
        if alone and demand.shape:
            had, has = (sum(on(pack, demand.service) for pack in packs) for packs in (mine, after.values()))
            assert has >= min(demand.least, had, demand.replicas)


@st.composite
def neighbours(draw):
    """Services that share devices as it should be, and then may need more, or less, or pack fewer on one."""
    services = SERVICES[:3]
    before = {service: Shape("p", 1, 1, draw(st.integers(1, 4))) for service in services}
    packs = []
    for owner in services:
        for ordinal in range(draw(st.integers(0, 2))):
            left, found = 12, []
            for service in sorted(services, key=lambda each: each != owner):
                count = draw(st.integers(0, min(3, left // before[service].memory)))
                left -= count * before[service].memory
                found += [Assignment(service, "u1", count, before[service])] if count else []
            packs.append(
                Pack(
                    pack_name(owner, ordinal),
                    owner,
                    ordinal,
                    "cuda",
                    "H",
                    "R",
                    node="n0",
                    capacity=12,
                    assignments=tuple(found),
                )
            )
    demands = []
    for service in services:
        memory, had = before[service].memory, sum(on(pack, service) for pack in packs)
        replicas = max(1, had) + draw(st.integers(0, 2))
        demands.append(
            Demand(
                service,
                "u1",
                replicas,
                "cuda",
                "H",
                "R",
                replace(before[service], memory=draw(st.sampled_from([memory, memory, *range(1, 9)]))),
                draw(st.sampled_from([9, 9, 4])),
                since=draw(st.sampled_from(["1", "2"])),
                shared=draw(st.integers(0, 3)) > 0,
                least=draw(st.integers(1, replicas)),
            )
        )
    return Snapshot(tuple(demands), tuple(packs), (Devices("n0", "cuda", "H", len(packs) + draw(st.integers(0, 1))),))


@settings(max_examples=300, deadline=None)
@given(neighbours())
def test_nobody_s_new_shape_takes_from_another_service_what_has_to_serve(snapshot):
    """Pass after pass: what one shape leaves free by waiting may let the next one be taken up, and that ends."""
    for _ in range(1 + len(snapshot.demands)):
        planned = plan(snapshot)
        after = apply(snapshot, planned)
        for demand in snapshot.demands:
            had, has = (sum(on(pack, demand.service) for pack in each.packs) for each in (snapshot, after))
            steady = demand.per_device == 9 and all(
                each.shape == demand.shape
                for pack in snapshot.packs
                for each in pack.assignments
                if each.service == demand.service
            )
            if steady:
                assert has >= min(demand.least, had, demand.replicas)
        for short in planned.shortfalls:
            if short.spared is not None:
                assert short.spared.left < short.spared.least
                held = [each for pack in after.packs for each in pack.assignments if each.service == short.service]
                assert sum(each.replicas for each in held) == short.kept
        snapshot = after
    assert plan(snapshot).empty


@settings(max_examples=500, deadline=None)
@given(snapshots())
def test_replicas_join_others_only_where_everything_agrees(snapshot):
    demands = {demand.service: demand for demand in snapshot.demands}
    before = {pack.name: pack for pack in snapshot.packs}
    for pack in apply(snapshot, plan(snapshot)).packs:
        for each in pack.assignments:
            demand = demands[each.service]
            if each.replicas <= (on(before[pack.name], each.service) if pack.name in before else 0):
                continue
            assert placement._compatible(pack, demand)
            assert pack.health is Health.SOUND
            assert each.service not in pack.unfit
            assert each.replicas <= demand.per_pack
            others = [demands[other.service] for other in pack.assignments if other.service != each.service]
            assert demand.shared or not others
            assert all(other.shared and other.shape for other in others)
            assert settled(pack, demands)
            joined = pack.owner != each.service and not (pack.name in before and on(before[pack.name], each.service))
            if joined and pack.node is not None and demand.nodes is not None:
                assert pack.node in demand.nodes


@settings(max_examples=300, deadline=None)
@given(snapshots())
def test_nobody_opens_a_pack_who_could_share_one(snapshot):
    planned = plan(snapshot)
    after = apply(snapshot, planned)
    board = placement._Board(after)
    for demand in snapshot.demands:
        opened = [pack for pack in planned.create if pack.owner == demand.service]
        if demand.shape and planned.shortfall_of(demand.service):
            assert not board.openings(demand)
        # A pack of its own with room, beside one that was opened, would have been filled first.
        assert not opened or not any(
            board.space(pack, demand)
            for pack in after.packs
            if pack.owner == demand.service
            and pack not in opened
            and pack.health is Health.SOUND
            and board.good(pack, demand)
        )


@settings(max_examples=300, deadline=None)
@given(snapshots())
def test_planning_on_the_result_changes_nothing(snapshot):
    once = plan(snapshot)
    again = plan(apply(snapshot, once))
    assert again.empty
    assert [(each.service, each.placed) for each in again.shortfalls] == [
        (each.service, each.placed) for each in once.shortfalls
    ]


@settings(max_examples=150, deadline=None)
@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(snapshot, random):
    parts = [list(snapshot.demands), list(snapshot.packs), list(snapshot.devices)]
    for part in parts:
        random.shuffle(part)
    assert plan(Snapshot(*(tuple(part) for part in parts))) == plan(snapshot)


@settings(max_examples=300, deadline=None)
@given(snapshots())
def test_packs_are_opened_only_while_devices_are_free(snapshot):
    planned = plan(snapshot)
    for product in ("H", "L"):
        opened = [pack for pack in planned.create if (pack.device, pack.product) == ("cuda", product)]
        held = [
            pack
            for pack in snapshot.packs
            if (pack.device, pack.product) == ("cuda", product)
            and pack.node in (None, "n0", "n1", "n2")
            and not (pack.node is None and pack.health is Health.LOST)
        ]
        total = sum(each.units for each in snapshot.devices if (each.device, each.product) == ("cuda", product))
        waiting = [pack for pack in held if pack.node is None]
        # One that its topology spread keeps waiting takes a GPU from nobody but its own service.
        firm = sum(not pack.apart for pack in waiting)
        assert not opened or len(opened) + firm <= total
        for owner in {pack.owner for pack in opened}:
            own = [pack for pack in opened if pack.owner == owner]
            kept = [pack for pack in waiting if pack.apart and pack.owner == owner]
            assert len(own) + firm + len(kept) <= total


@settings(max_examples=300, deadline=None)
@given(snapshots())
def test_core_sets_opened_on_a_node_fit_it_together(snapshot):
    planned = plan(snapshot)
    for node in {pack.node for pack in planned.create if pack.device == "cpu"}:
        there = [pack for pack in (*snapshot.packs, *planned.create) if (pack.device, pack.node) == ("cpu", node)]
        (has,) = [each for each in snapshot.devices if (each.device, each.node) == ("cpu", node)]
        assert sum(pack.units for pack in there) <= has.units
        # A pack that takes no memory may go where others have taken more than there is.
        if any(pack.memory for pack in planned.create if pack.node == node):
            assert sum(pack.memory for pack in there) <= has.memory
