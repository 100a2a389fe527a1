"""Which replica goes on which pack: a plan from one snapshot of the cluster, without I/O.

A *pack* is one device that Tightship holds: a GPU, or a set of cores of one node. It is opened for one service, its *owner*; other
services of the namespace, its *tenants*, may have replicas on it where all of them allow it. A *demand* is what one service wants:
a number of replicas of one *shape* (batch, KV cache, memory), at most ``per_device`` of them on a device.

The algorithm; where services are taken in turn, the longest-waiting one comes first, then the first by name:

1. Assignments of services that are gone (or were recreated under a new UID), and all of a lost pack, are dropped.
2. Every pack keeps the replicas it has, as far as its ledger carries them at the shapes wanted now: those whose shape can't change
   first, then the owner's, then the tenants' in turn.
3. Every service gives up what it has too many, from the newest pack first (and before that from packs of others).
4. In turn, what is missing fills the service's own packs in the order of their age; then, as far as that spares it a pack, the free
   memory of packs of others, best fit first (the one that is left with the least free memory); then it opens new packs while
   devices are free, and what is missing still goes to others all the same. For GPUs the scheduler chooses the node; a set of
   cores is put on the fullest node that still has room.
5. Replicas on packs that are no longer wanted (another product or mode, a node on which they do not fit, a neighbour that one of the
   two no longer allows, more than ``spread`` allows on one) stay where they are as long as there is no better place for them: an
   old replica that serves is worth more than none. When only such a pack's own device can make room, the newest one is
   given up, and no second one before its device is in use again.
6. A demand without a shape (being measured, awaiting approval, infeasible) keeps what it has. It may shrink, never grow:
   nobody knows what a new replica of it would need. The same goes for a new shape of which fewer would have a place than have to
   serve (``least``), and than there are now: it waits for devices. So does one, or a lower ``per_device``, that would do so to another
   service on the same device; of several that push it away together the last in turn waits first.

What is given up in 4 and 5 may be what another lacks: they are repeated until nothing changes.

Of the packs on a cordoned node one at a time is no longer wanted, the first one that has somewhere to go, and the next one when that is
gone: whoever drains the node then finds nothing on it.

A replica moves only when its pack can no longer hold it: moving costs serving capacity, so a plan never tidies up for
the sake of it. Scaling down tidies by itself, because the newest pack empties first.

Limits by trials (``per_device``) were measured among a service's own kind. A pack shared with a stranger was not measured by anybody, so
of all replicas on it there are never more than the smallest limit of those on it, and it is never shared unasked.

What always holds, whatever the snapshot:

- A pack's ledger is never exceeded: over all services on it, replicas x memory <= capacity less the largest reserve, where the
  capacity is known; and replicas <= the smallest per_device of those whose decision doesn't wait, and at most as many as MPS takes clients.
- Replicas join those of another service only where both allow it, in one namespace, with the same product and mode (the user that
  MPS's daemon and clients share is part of it), on a node that both may use, and while all others there have a shape.
- No service gets more replicas than it wants; one with ``spread`` never gets more than half of them (rounded up) put on one pack.
- No pack is opened for a service while one of its packs has room, or while packs that it may share have room enough to do without;
  and never more packs than devices are free: the packs of one pass are counted together, in units and in memory.
- The plan depends on the snapshot's content, not on the order of its parts; planning on a plan's own result is empty,
  but for shapes that waited and that fit beside what the others have by then.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from tightship.core.memory import Reserve

MPS_REPLICAS = 48 // 2
"""Replicas that MPS takes on one GPU: 48 clients before CUDA 13.1 (60 since), and a vLLM is two of them, its engine core and its API server
(docs/measurements.md, "On a real GPU").
"""
SERVICES_PER_PACK = 16
"""What a GPUPack lists at most."""

_NAME_LIMIT = 50  # of a pack: names of holders and labels are made from it
_HASH_DIGITS = 8


class Health(Enum):
    """What a pack is good for."""

    SOUND = "Sound"
    UNFIT = "Unfit"  # its node cannot take the replicas (CPU or memory); the device itself is fine
    LOST = "Lost"  # its node is gone, or its device was exchanged: nothing can run there any more
    LEAVING = "Leaving"  # being deleted


@dataclass(frozen=True, order=True)
class ServiceRef:
    """A service's namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Shape:
    """What one replica runs with: the profile key it was decided from, the batch, KV-cache and memory bytes."""

    profile: str
    batch: int
    kv_cache: int
    memory: int


@dataclass(frozen=True)
class Assignment:
    """``replicas`` replicas of one service, all of one shape, on one pack."""

    service: ServiceRef
    uid: str
    replicas: int
    shape: Shape


@dataclass(frozen=True)
class Demand:
    """What one service wants.

    ``shape`` is None while there is no decision to act on; ``per_device`` and ``units`` are then ignored. ``units`` and ``memory``
    are what a pack takes of a node: one GPU and nothing else, or a number of cores and of bytes. ``nodes`` are the nodes its
    packs may be on (None: any); ``since`` orders the services (an RFC 3339 creation time). ``shared`` allows replicas of other
    services of the namespace beside its own, if they have its ``priority`` (the class's name, "" for none): a pack's holder has one
    priority, and who had a higher one could preempt it. ``spread`` asks for two packs or more. ``reserve`` is what it wants left free of every
    device, ``device_memory`` the bytes of a device of this product, as far as known: it counts until the device itself is.
    ``avoids`` are nodes on which its replicas found no room: nothing new is put there for now. ``least`` is how many replicas have
    to serve whatever is changed.
    """

    service: ServiceRef
    uid: str
    replicas: int
    device: str
    product: str
    mode: str
    shape: Shape | None = None
    per_device: int = 0
    units: int = 1
    nodes: frozenset[str] | None = None
    since: str = ""
    memory: int = 0
    shared: bool = False
    priority: str = ""
    spread: bool = False
    reserve: Reserve = field(default_factory=Reserve)
    device_memory: int | None = None
    avoids: frozenset[str] = frozenset()
    least: int = 0

    @property
    def per_pack(self) -> int:
        """Most of its replicas that are put on one pack; with ``spread`` half of them, so that losing one pack leaves the others."""
        return min(self.per_device, -(-self.replicas // 2)) if self.spread and self.replicas > 1 else self.per_device


@dataclass(frozen=True)
class Pack:
    """One held device: ``capacity`` is the bytes of all of it (None until the device is known).

    ``units`` and ``memory`` are what it takes of its node, as in a demand. ``ordinal`` grows with each pack that a service
    opens, so the highest is the newest. ``excluded`` are nodes that this pack must not be on, because the service's replicas
    did not fit there; ``unfit`` are services whose replicas find no room on its node, while those of others do. ``waiting`` says
    that it found no device so far: nobody joins it; ``apart``, that it waits for a node that its topology spread allows, so that it
    takes none of the devices that are free now. ``cordoned``: its node takes no more pods.
    """

    name: str
    owner: ServiceRef
    ordinal: int
    device: str
    product: str
    mode: str
    units: int = 1
    node: str | None = None
    capacity: int | None = None
    health: Health = Health.SOUND
    assignments: tuple[Assignment, ...] = ()
    excluded: frozenset[str] = frozenset()
    memory: int = 0
    unfit: frozenset[ServiceRef] = frozenset()
    waiting: bool = False
    apart: bool = False
    cordoned: bool = False


@dataclass(frozen=True)
class Devices:
    """The devices of one kind on one node: ``units`` GPUs of a product; or cores, and the bytes of ``memory`` beside them."""

    node: str
    device: str
    product: str
    units: int
    memory: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment, as far as placement goes."""

    demands: tuple[Demand, ...] = ()
    packs: tuple[Pack, ...] = ()
    devices: tuple[Devices, ...] = ()


@dataclass(frozen=True)
class Spared:
    """A service that another one's new shape would have left with ``left`` places, where ``least`` have to serve."""

    service: ServiceRef
    left: int
    least: int


@dataclass(frozen=True)
class Shortfall:
    """Replicas without a place. Units are GPUs or cores; ``total`` and ``free`` count those this service may use.

    ``free`` counts only nodes that have ``memory_per_pack`` bytes left; ``memory_free`` is the most that one of its nodes has.
    ``per_pack`` is how many replicas of it go on one pack. ``spared`` is there where its new shape waits for the sake of another service:
    then all of its own may have a place.
    """

    service: ServiceRef
    device: str
    product: str
    wanted: int
    placed: int
    kept: int
    packs_needed: int
    per_pack: int
    units_per_pack: int
    total: int
    free: int
    memory_per_pack: int = 0
    memory_free: int = 0
    spared: Spared | None = None


@dataclass(frozen=True)
class Plan:
    """What to write: packs to create, and the new assignments (empty: give the pack back) of packs that change."""

    create: tuple[Pack, ...] = ()
    update: tuple[tuple[str, tuple[Assignment, ...]], ...] = ()
    shortfalls: tuple[Shortfall, ...] = ()
    stranded: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.create and not self.update

    def shortfall_of(self, service: ServiceRef) -> Shortfall | None:
        """The service's shortfall, if it has one."""
        return next((entry for entry in self.shortfalls if entry.service == service), None)


def pack_name(service: ServiceRef, ordinal: int) -> str:
    """``<namespace>-<service>-<ordinal>``, shortened with a hash where that passes 50 characters."""
    stem, suffix = f"{service.namespace}-{service.name}", f"-{ordinal}"
    if len(stem) + len(suffix) > _NAME_LIMIT:
        digest = hashlib.sha256(str(service).encode()).hexdigest()[:_HASH_DIGITS]
        stem = f"{stem[: _NAME_LIMIT - len(suffix) - _HASH_DIGITS - 1].rstrip('-')}-{digest}"
    return stem + suffix


def ordinal_of(name: str) -> int:
    """The ordinal at the end of a pack's name; 0 where there is none (a pack that somebody made by hand)."""
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else 0


def plan(snapshot: Snapshot) -> Plan:
    """Plan one pass (see the module's docstring for the algorithm and what always holds)."""
    snapshot, stranded = _clear_cordoned(snapshot)
    waiting: dict[ServiceRef, Shortfall] = {}
    while True:
        board, shortfalls = _attempt(snapshot)
        costly = {short.service: short for short in shortfalls if _costs_too_many(board, short)}
        costly |= {short.service: short for short in _costs_others(board, shortfalls) if short.service not in costly}
        if not costly:
            break
        waiting |= costly
        demands = (replace(each, shape=None) if each.service in waiting else each for each in snapshot.demands)
        snapshot = replace(snapshot, demands=tuple(demands))
    for short in waiting.values():
        stay = sum(each.replicas for here in board.pencilled.values() for each in here if each.service == short.service)
        shortfalls.append(replace(short, kept=stay))
    return Plan(
        board.created(),
        board.changed(),
        tuple(sorted(shortfalls, key=lambda short: board.turn[short.service])),
        stranded,
    )


def _attempt(snapshot: Snapshot) -> tuple[_Board, list[Shortfall]]:
    """All steps of a plan, every service at the shape that it wants now."""
    board = _Board(snapshot)
    for pack in snapshot.packs:
        _retain(board, pack)
    for demand in board.order:
        _shrink(board, demand)
    shortfalls: list[Shortfall] = []
    # Each round only adds replicas in good places, so it ends; the bound is a fuse.
    for _ in range(1 + len(snapshot.packs) + sum(demand.replicas for demand in board.order)):
        before = dict(board.pencilled)
        shortfalls = [found for each in board.order if each.shape and (found := _settle(board, each, each.shape))]
        sharing = board.mixed or any(board.demands[short.service].shared for short in shortfalls)
        if not shortfalls or not sharing or board.pencilled == before:
            break
    return board, shortfalls


def _costs_too_many(board: _Board, short: Shortfall) -> bool:
    """Whether a new shape would leave fewer replicas than have to serve, and than there are."""
    demand = board.demands[short.service]
    return short.service in board.squeezed and short.placed + short.kept < _floor(board, demand)


def _floor(board: _Board, demand: Demand) -> int:
    """How many of a service's replicas are to have a place whatever changes: those that have to serve, as far as there are as many."""
    return min(demand.least, demand.replicas, board.had[demand.service])


def _costs_others(board: _Board, shortfalls: Sequence[Shortfall]) -> list[Shortfall]:
    """The new shapes that would leave fewer replicas of another service than have to serve there, and than there are."""
    if not board.mixed:
        return []
    places, found = board.places(), []
    for demand in board.order:
        floor, left = _floor(board, demand), places[demand.service]
        if left >= floor or demand.service in board.squeezed or (cause := _pushed_by(board, demand)) is None:
            continue
        own = next((short for short in shortfalls if short.service == cause.service), None)
        spared = Spared(demand.service, left, floor)
        found.append(replace(own or _shortfall(board, cause, 0, 0), spared=spared))
    return found


def _pushed_by(board: _Board, demand: Demand) -> Demand | None:
    """The service whose new shape took a place from another one; of several the last in turn."""
    found = []
    for pack in board.snapshot.packs:
        mine = next((each.replicas for each in pack.assignments if each.service == demand.service), 0)
        if pack.health in (Health.LOST, Health.LEAVING) or board.count(pack, demand) >= mine:
            continue
        together = sum(each.replicas for each in pack.assignments)
        for each in pack.assignments:
            other = board.demands.get(each.service)
            if other is None or other is demand or other.uid != each.uid or not other.shape or board.fixed(pack, other):
                continue
            if other.shape.memory > each.shape.memory or other.per_device < together:
                found.append(other)
    return max(found, key=lambda each: board.turn[each.service], default=None)


def free_memory(snapshot: Snapshot) -> dict[str, int | None]:
    """Bytes left in the ledger of every pack, beside the largest reserve of those on it; None where the device isn't known."""
    board, left = _Board(snapshot), {}
    for pack in snapshot.packs:
        here = board.pencilled[pack.name]
        capacity = board.capacity(pack, [board.demands[each.service] for each in here])
        taken = sum(each.replicas * each.shape.memory for each in here)
        left[pack.name] = None if capacity is None else max(0, capacity - taken)
    return left


def apply(snapshot: Snapshot, planned: Plan) -> Snapshot:
    """The snapshot as it is once the plan is written: what an "assumed" set holds while the watches lag."""
    updates = dict(planned.update)
    packs = tuple(replace(pack, assignments=updates.get(pack.name, pack.assignments)) for pack in snapshot.packs)
    return replace(snapshot, packs=packs + planned.create)


def _clear_cordoned(snapshot: Snapshot) -> tuple[Snapshot, tuple[str, ...]]:
    """The snapshot with one pack of each cordoned node marked as unfit, the oldest one for which there are devices elsewhere; and those
    for which there are none.
    """
    cordoned = [pack for pack in snapshot.packs if pack.cordoned and pack.health in (Health.SOUND, Health.UNFIT)]
    if not cordoned:
        return snapshot, ()
    board, chosen, stranded = _Board(snapshot), set(), []
    leaving = {pack.node for pack in snapshot.packs if pack.cordoned and not board.pencilled[pack.name]}
    for pack in sorted(cordoned, key=lambda pack: (pack.ordinal, pack.name)):
        here = [board.demands[each.service] for each in board.pencilled[pack.name]]
        if not here:
            continue
        if not all(board.could_move(pack, demand) for demand in here):
            stranded.append(pack.name)
        elif pack.node not in leaving and pack.health is Health.SOUND:
            leaving.add(pack.node)
            chosen.add(pack.name)
    packs = (replace(pack, health=Health.UNFIT) if pack.name in chosen else pack for pack in snapshot.packs)
    return replace(snapshot, packs=tuple(packs)), tuple(stranded)


class _Board:
    """The packs of a snapshot while a plan is made: assignments are pencilled in, nothing else changes."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.order = sorted(snapshot.demands, key=lambda each: (each.since, each.service))
        self.demands = {demand.service: demand for demand in self.order}
        self.turn = {demand.service: turn for turn, demand in enumerate(self.order)}
        self.opened: list[Pack] = []
        self.pencilled: dict[str, tuple[Assignment, ...]] = {}
        self.mixed = False  # whether some pack has, or had, replicas of others than its owner
        self.owned: dict[ServiceRef, list[Pack]] = {}
        self.rented: dict[ServiceRef, dict[str, Pack]] = {}
        self.shareable: dict[str, list[Pack]] = {}
        self._unfit: dict[ServiceRef, list[Pack]] = {}
        self.squeezed: set[ServiceRef] = set()  # who would have fewer on some pack, because its new shape is larger
        alive = {(demand.service, demand.uid) for demand in self.order}
        for pack in sorted(snapshot.packs, key=lambda pack: (pack.ordinal, pack.name)):
            kept = () if pack.health is Health.LOST else pack.assignments
            self._add(pack, tuple(each for each in kept if (each.service, each.uid) in alive and each.replicas > 0))
        self.had = self.places()

    def places(self) -> Counter[ServiceRef]:
        """How many replicas each service has a place for, packs that are going left out."""
        found = Counter({demand.service: 0 for demand in self.order})
        for pack in (*self.snapshot.packs, *self.opened):
            if pack.health is not Health.LEAVING:
                for each in self.pencilled[pack.name]:
                    found[each.service] += each.replicas
        return found

    def _add(self, pack: Pack, assignments: tuple[Assignment, ...]) -> None:
        self.pencilled[pack.name] = tuple(sorted(assignments, key=lambda each: each.service))
        if pack.health in (Health.LOST, Health.LEAVING):
            return
        self.owned.setdefault(pack.owner, []).append(pack)
        if pack.health is Health.SOUND:
            self.shareable.setdefault(pack.owner.namespace, []).append(pack)
        for each in assignments:
            self._rent(pack, each.service)
        for service in pack.unfit:
            self._unfit.setdefault(service, []).append(pack)

    def _rent(self, pack: Pack, service: ServiceRef) -> None:
        if service != pack.owner:
            self.mixed = True
            self.rented.setdefault(service, {})[pack.name] = pack

    def packs_of(self, demand: Demand) -> list[Pack]:
        """The service's packs, oldest first, then those of others that it is on; none that are going anyway."""
        rented = [pack for pack in self.rented.get(demand.service, {}).values() if self.count(pack, demand)]
        return [*self.owned.get(demand.service, ()), *sorted(rented, key=lambda pack: pack.name)]

    def assignment(self, pack: Pack, demand: Demand) -> Assignment | None:
        return next((each for each in self.pencilled[pack.name] if each.service == demand.service), None)

    def others(self, pack: Pack, demand: Demand) -> list[Assignment]:
        """What other services have on the pack."""
        return [each for each in self.pencilled[pack.name] if each.service != demand.service]

    def count(self, pack: Pack, demand: Demand) -> int:
        found = self.assignment(pack, demand)
        return found.replicas if found else 0

    def assign(self, pack: Pack, demand: Demand, replicas: int) -> None:
        """Pencil ``replicas`` in, with the shape wanted now; where that isn't for this pack, with the one they have."""
        found = self.assignment(pack, demand)
        shape = found.shape if found and self.fixed(pack, demand) else demand.shape
        mine = [Assignment(demand.service, demand.uid, replicas, shape)] if replicas and shape else []
        self.pencilled[pack.name] = tuple(sorted([*self.others(pack, demand), *mine], key=lambda each: each.service))
        self._rent(pack, demand.service)

    def rank(self, pack: Pack, service: ServiceRef) -> tuple[bool, int]:
        """Who stays on a pack that can't keep all: its owner, then the others in turn."""
        return service != pack.owner, self.turn[service]

    def fixed(self, pack: Pack, demand: Demand) -> bool:
        """Whether replicas on the pack can only stay as they are."""
        return demand.shape is None or not _compatible(pack, demand)

    def good(self, pack: Pack, demand: Demand) -> bool:
        """Whether replicas of the service are well placed there."""
        rank = self.rank(pack, demand.service)
        before = [each for each in self.others(pack, demand) if self.rank(pack, each.service) < rank]
        return (
            pack.health is Health.SOUND
            and demand.service not in pack.unfit
            and _compatible(pack, demand)
            and (not before or self._agreed(demand, before))
        )

    def _agreed(self, demand: Demand, others: Iterable[Assignment]) -> bool:
        """Whether the service and all of these others allow each other on one pack, and none could be preempted for another."""
        neighbours = [self.demands[each.service] for each in others]
        return demand.shared and all(each.shared and each.priority == demand.priority for each in neighbours)

    def capacity(self, pack: Pack, together: Iterable[Demand]) -> int | None:
        """Bytes that these services may use together; None where nobody knows what the device has."""
        together = list(together)
        total = pack.capacity
        if total is None:
            told = [each.device_memory for each in together if each.device_memory is not None]
            if not told:
                return None
            total = min(told)
        return total - max((each.reserve.of(total) for each in together), default=0)

    def carries(self, pack: Pack, demand: Demand, others: Sequence[Assignment]) -> int:
        """How many replicas of the shape wanted now the pack carries beside these ``others``."""
        if demand.shape is None:
            return 0
        together = [demand, *(self.demands[each.service] for each in others)]
        limits = [each.per_device for each in together if not self.fixed(pack, each)]
        most = min(MPS_REPLICAS, *limits) - sum(each.replicas for each in others)
        capacity = self.capacity(pack, together)
        if capacity is not None:
            taken = sum(each.replicas * each.shape.memory for each in others)
            most = min(most, (capacity - taken) // max(1, demand.shape.memory))
        return max(0, most) if len(together) <= SERVICES_PER_PACK else 0

    def could_move(self, pack: Pack, demand: Demand) -> bool:
        """Whether there may be a place elsewhere for what the service has on the pack."""
        if self.fixed(pack, demand):
            return False
        if any(self.good(each, demand) and self.space(each, demand) for each in self.packs_of(demand)):
            return True
        most = max(self.supply(demand).values(), default=0) if demand.device == "cpu" else self.free(demand)
        return most >= demand.units or bool(self.openings(demand))

    def space(self, pack: Pack, demand: Demand) -> int:
        """How many more replicas of the service may be put on a pack where it is, or would be, well placed."""
        if pack.cordoned:
            return 0
        others = self.others(pack, demand)
        if others and not (self._agreed(demand, others) and self._measured(pack, demand, others)):
            return 0
        most = min(demand.per_pack, self.carries(pack, demand, others))
        return max(0, most - self.count(pack, demand))

    def _measured(self, pack: Pack, demand: Demand, others: Sequence[Assignment]) -> bool:
        """Whether it is known what the device has, and what the others there need."""
        neighbours = [self.demands[each.service] for each in others]
        known = self.capacity(pack, [demand, *neighbours]) is not None
        return known and not any(self.fixed(pack, each) for each in neighbours)

    def openings(self, demand: Demand) -> list[tuple[int, str, int, Pack]]:
        """Packs with replicas of others that can take some of this service: free bytes, name, how many, and the pack."""
        if demand.shape is None or not demand.shared:
            return []
        found = []
        for pack in self.shareable.get(demand.service.namespace, ()):
            others = self.others(pack, demand)
            if not others or pack.waiting or pack.owner == demand.service or not self._reachable(pack, demand, others):
                continue
            space = self.space(pack, demand) if self.good(pack, demand) else 0
            if space:
                capacity = self.capacity(pack, [demand, *(self.demands[each.service] for each in others)]) or 0
                taken = sum(each.replicas * each.shape.memory for each in self.pencilled[pack.name])
                found.append((capacity - taken, pack.name, space, pack))
        return found

    def join(self, demand: Demand, wanted: int) -> int:
        """Pencil up to ``wanted`` replicas in beside those of others, best fit first; returns how many."""
        missing = wanted
        while missing > 0 and demand.shape is not None and (found := self.openings(demand)):
            memory = demand.shape.memory
            _, _, space, pack = min(found, key=lambda each: (each[0] - min(missing, each[2]) * memory, each[1]))
            added = min(missing, space)
            self.assign(pack, demand, self.count(pack, demand) + added)
            missing -= added
        return max(0, wanted) - max(0, missing)

    def _reachable(self, pack: Pack, demand: Demand, others: Iterable[Assignment]) -> bool:
        """Whether the service may be on the pack's node, or on every node that the pack may still get."""
        if self.count(pack, demand):
            return True
        excluded = self.excluded(demand)
        if pack.node is not None:
            return pack.node not in excluded and (demand.nodes is None or pack.node in demand.nodes)
        # The holder goes where its owner may be.
        leads = [pack.owner] if pack.owner in self.demands else [each.service for each in others]
        may = [self.demands[service].nodes for service in leads]
        if demand.nodes is None:
            return not excluded
        return all(nodes is not None and nodes - pack.excluded <= demand.nodes - excluded for nodes in may)

    def excluded(self, demand: Demand) -> frozenset[str]:
        """Nodes on which this service's replicas were seen not to fit."""
        nodes = set(demand.avoids)
        for pack in (*self.packs_of(demand), *self._unfit.get(demand.service, ())):
            if pack.node and (pack.health is Health.UNFIT or demand.service in pack.unfit):
                nodes.add(pack.node)
        return frozenset(nodes)

    def left(self, demand: Demand) -> dict[str, tuple[int, int]]:
        """Units and bytes left on each node that this service may use, before packs that have no node yet."""
        excluded = self.excluded(demand)
        left = {
            each.node: (each.units, each.memory)
            for each in self.snapshot.devices
            if (each.device, each.product) == (demand.device, demand.product)
            and (demand.nodes is None or each.node in demand.nodes)
            and each.node not in excluded
        }
        for pack in (*self.snapshot.packs, *self.opened):
            if pack.device == demand.device and pack.node in left:
                units, memory = left[pack.node]
                left[pack.node] = units - pack.units, memory - pack.memory
        return left

    def supply(self, demand: Demand) -> dict[str, int]:
        """Free units on each of those nodes that has the memory of a pack left."""
        return {node: units for node, (units, memory) in self.left(demand).items() if memory >= demand.memory}

    def unbound(self, demand: Demand) -> int:
        """Units that packs without a node will take somewhere."""
        return sum(
            pack.units
            for pack in (*self.snapshot.packs, *self.opened)
            if pack.node is None
            and (pack.device, pack.product) == (demand.device, demand.product)
            and pack.health is not Health.LOST
            and not (pack.apart and pack.owner != demand.service)
        )

    def free(self, demand: Demand) -> int:
        """Free units, less those that packs still waiting for a node will take."""
        return max(0, sum(max(0, units) for units in self.supply(demand).values()) - self.unbound(demand))

    def open(self, demand: Demand, missing: int, shape: Shape) -> int:
        """Pencil a new pack in; returns how many replicas it got, 0 when no device is free."""
        node = None
        if demand.device == "cpu":
            fitting = [(units, name) for name, units in self.supply(demand).items() if units >= demand.units]
            if not fitting:
                return 0
            node = min(fitting)[1]
        elif self.free(demand) < demand.units:
            return 0
        name, ordinal = self._next_name(demand.service)
        pack = Pack(
            name,
            demand.service,
            ordinal,
            demand.device,
            demand.product,
            demand.mode,
            units=demand.units,
            node=node,
            excluded=self.excluded(demand),
            memory=demand.memory,
        )
        replicas = min(missing, demand.per_pack, self.carries(pack, demand, ()))
        if replicas > 0:
            self.opened.append(pack)
            self._add(pack, (Assignment(demand.service, demand.uid, replicas, shape),))
        return replicas

    def _next_name(self, service: ServiceRef) -> tuple[str, int]:
        packs = (*self.snapshot.packs, *self.opened)
        taken = {pack.name for pack in packs}
        ordinal = max((pack.ordinal for pack in packs if pack.owner == service), default=-1) + 1
        # Namespace "a" with service "b-c" and namespace "a-b" with service "c" would share a name: step over it.
        while pack_name(service, ordinal) in taken:
            ordinal += 1
        return pack_name(service, ordinal), ordinal

    def created(self) -> tuple[Pack, ...]:
        return tuple(replace(pack, assignments=self.pencilled[pack.name]) for pack in self.opened)

    def changed(self) -> tuple[tuple[str, tuple[Assignment, ...]], ...]:
        changes = [
            (pack.name, self.pencilled[pack.name])
            for pack in self.snapshot.packs
            if self.pencilled[pack.name] != tuple(sorted(pack.assignments, key=lambda each: each.service))
        ]
        return tuple(sorted(changes, key=lambda change: change[0]))


def _retain(board: _Board, pack: Pack) -> None:
    """Keep on a pack what its ledger carries at the shapes wanted now."""
    if pack.health in (Health.LOST, Health.LEAVING):
        return
    here = board.pencilled[pack.name]
    kept = [each for each in here if board.fixed(pack, board.demands[each.service])]
    others = [each for each in here if each not in kept]
    for each in sorted(others, key=lambda each: board.rank(pack, each.service)):
        demand = board.demands[each.service]
        replicas = min(each.replicas, board.carries(pack, demand, kept))
        if replicas < each.replicas and each.shape != demand.shape:
            board.squeezed.add(each.service)
        if replicas and demand.shape:
            kept.append(replace(each, replicas=replicas, shape=demand.shape))
    board.pencilled[pack.name] = tuple(sorted(kept, key=lambda each: each.service))


def _shrink(board: _Board, demand: Demand) -> None:
    """Give up what the service has too many; nothing is lost for the wish to have it elsewhere."""
    packs = board.packs_of(demand)
    if demand.shape is None:
        _take(board, demand, packs, sum(board.count(pack, demand) for pack in packs) - demand.replicas)
        return
    good = [pack for pack in packs if board.good(pack, demand)]
    missing = demand.replicas - sum(min(board.count(pack, demand), demand.per_pack) for pack in good)
    if missing < 0:
        for pack in good:
            board.assign(pack, demand, min(board.count(pack, demand), demand.per_pack))
        _take(board, demand, good, -missing)
    _keep_second_best(board, demand, packs, good, max(0, missing))


def _take(board: _Board, demand: Demand, packs: list[Pack], surplus: int) -> None:
    """Take ``surplus`` replicas away, from the last pack first."""
    for pack in reversed(packs):
        less = min(board.count(pack, demand), surplus)
        if less > 0:
            board.assign(pack, demand, board.count(pack, demand) - less)
            surplus -= less


def _settle(board: _Board, demand: Demand, shape: Shape) -> Shortfall | None:
    """Place what a service lacks; returns what found no place."""
    packs = board.packs_of(demand)
    good = [pack for pack in packs if board.good(pack, demand)]
    missing = demand.replicas - sum(min(board.count(pack, demand), demand.per_pack) for pack in good)
    for pack in good:
        if pack.owner == demand.service or not board.others(pack, demand):
            added = min(missing, board.space(pack, demand))
            board.assign(pack, demand, board.count(pack, demand) + added)
            missing -= added
    missing -= board.join(demand, missing - _for_new_packs(board, demand, missing))
    while missing > 0 and (added := board.open(demand, missing, shape)):
        missing -= added
    missing -= board.join(demand, missing)
    if missing > 0 and (blocking := _blocking(board, demand, packs, good)):
        board.assign(blocking, demand, 0)
    kept = _keep_second_best(board, demand, packs, good, missing)
    return _shortfall(board, demand, missing, kept) if missing else None


def _for_new_packs(board: _Board, demand: Demand, missing: int) -> int:
    """How many of the missing replicas had better have packs of their own: nobody measured a mix, so it must spare one."""
    spaces = sum(space for _, _, space, _ in board.openings(demand)) if missing > 0 else 0
    packs = -(-max(0, missing - spaces) // max(1, demand.per_pack))
    return min(missing, packs * demand.per_pack)


def _keep_second_best(board: _Board, demand: Demand, packs: list[Pack], good: list[Pack], missing: int) -> int:
    """Leave in unwanted places what has no better one; returns the replicas that stay there."""
    kept = 0
    for pack in packs:
        count, wanted = board.count(pack, demand), 0
        if pack in good:
            wanted = min(count, demand.per_pack)
        stays = min(count - wanted, missing - kept)
        board.assign(pack, demand, wanted + stays)
        kept += stays
    return kept


def _blocking(board: _Board, demand: Demand, packs: list[Pack], good: list[Pack]) -> Pack | None:
    """The newest pack that holds the very device that is wanted, in another mode: only giving it up can make progress."""
    if _device_coming(board, demand):
        return None
    found = [
        pack
        for pack in packs
        if pack not in good
        and board.count(pack, demand)
        and pack.health is Health.SOUND
        and pack.product == demand.product
        and demand.service not in pack.unfit
        and not board.others(pack, demand)
        and (pack.owner == demand.service or pack.owner not in board.demands)
    ]
    return found[-1] if found else None


def _device_coming(board: _Board, demand: Demand) -> bool:
    """Whether a pack of this service (or of one that is gone) is on its way out and will free a device, or is taking one up."""
    leaving = any(
        pack.product == demand.product
        and not board.pencilled[pack.name]
        and (pack.owner == demand.service or (pack.owner not in board.demands and pack.health is not Health.LOST))
        for pack in board.snapshot.packs
    )
    arriving = any(
        pack.owner == demand.service and pack.node is None and _compatible(pack, demand)
        for pack in (*board.snapshot.packs, *board.opened)
    )
    return leaving or arriving


def _compatible(pack: Pack, demand: Demand) -> bool:
    return (pack.device, pack.product, pack.mode, pack.units) == (
        demand.device,
        demand.product,
        demand.mode,
        demand.units,
    )


def _shortfall(board: _Board, demand: Demand, missing: int, kept: int) -> Shortfall:
    per_pack = max(1, demand.per_pack)
    total = sum(
        each.units
        for each in board.snapshot.devices
        if (each.device, each.product) == (demand.device, demand.product)
        and (demand.nodes is None or each.node in demand.nodes)
    )
    return Shortfall(
        demand.service,
        demand.device,
        demand.product,
        wanted=demand.replicas,
        placed=demand.replicas - missing,
        kept=kept,
        packs_needed=-(-missing // per_pack),
        per_pack=per_pack,
        units_per_pack=demand.units,
        total=total,
        free=board.free(demand),
        memory_per_pack=demand.memory,
        memory_free=max((max(0, memory) for _, memory in board.left(demand).values()), default=0),
    )
