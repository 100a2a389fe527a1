"""Which replica goes on which pack: a plan from one snapshot of the cluster, without I/O.

A *pack* is one device that Tightship holds: a GPU, or a set of cores of one node. It serves one service (the service that
opened it, its *owner*); sharing a pack between services is left to a later version. A *demand* is what one service wants:
a number of replicas of one *shape* (batch, KV cache, memory), at most ``per_device`` of them on a device.

The algorithm, for every demand (the longest-waiting service first, then by name):

1. Assignments of services that are gone (or were recreated under a new UID), and all of a lost pack, are dropped.
2. Every sound pack of the right device, product and mode keeps the replicas it has, as far as its ledger carries them at
   the shape wanted now. What is too many is taken from the newest pack first.
3. What is missing fills the packs in the order of their age, then opens new ones while devices are free. For GPUs the
   scheduler chooses the node; a set of cores is put on the fullest node that still has room.
4. Replicas on packs that are no longer wanted (another product or mode, or a node on which they do not fit) stay where
   they are as long as there is no better place for them: an old replica that serves is worth more than none. When only
   such a pack's own device can make room, the newest one is given up, and no second one before its device is in use again.
5. A demand without a shape (being measured, awaiting approval, infeasible) keeps what it has. It may shrink, never grow:
   nobody knows what a new replica of it would need.

A replica moves only when its pack can no longer hold it: moving costs serving capacity, so a plan never tidies up for
the sake of it. Scaling down tidies by itself, because the newest pack empties first.

What always holds, whatever the snapshot:

- A pack's ledger is never exceeded: replicas x memory <= capacity where the capacity is known, and replicas <= per_device.
- No service gets more replicas than it wants.
- No pack is opened for a service while one of its packs has room, and never more packs than devices are free: the packs of
  one pass are counted together, in units and in memory.
- The plan depends on the snapshot's content, not on the order of its parts; planning on a plan's own result is empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

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
    packs may be on (None: any); ``since`` orders the services (an RFC 3339 creation time).
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


@dataclass(frozen=True)
class Pack:
    """One held device: ``capacity`` is the bytes its replicas may use together (None until the device is known).

    ``units`` and ``memory`` are what it takes of its node, as in a demand. ``ordinal`` grows with each pack that a service
    opens, so the highest is the newest. ``excluded`` are nodes that this pack must not be on, because the service's replicas
    did not fit there.
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
class Shortfall:
    """Replicas without a place. Units are GPUs or cores; ``total`` and ``free`` count those this service may use.

    ``free`` counts only nodes that have ``memory_per_pack`` bytes left; ``memory_free`` is the most that one of its nodes has.
    """

    service: ServiceRef
    device: str
    product: str
    wanted: int
    placed: int
    kept: int
    packs_needed: int
    units_per_pack: int
    total: int
    free: int
    memory_per_pack: int = 0
    memory_free: int = 0


@dataclass(frozen=True)
class Plan:
    """What to write: packs to create, and the new assignments (empty: give the pack back) of packs that change."""

    create: tuple[Pack, ...] = ()
    update: tuple[tuple[str, tuple[Assignment, ...]], ...] = ()
    shortfalls: tuple[Shortfall, ...] = ()

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
    board = _Board(snapshot)
    shortfalls = []
    for demand in sorted(snapshot.demands, key=lambda each: (each.since, each.service)):
        if demand.shape is None:
            _keep(board, demand)
        elif shortfall := _settle(board, demand, demand.shape):
            shortfalls.append(shortfall)
    return Plan(board.created(), board.changed(), tuple(shortfalls))


def apply(snapshot: Snapshot, planned: Plan) -> Snapshot:
    """The snapshot as it is once the plan is written: what an "assumed" set holds while the watches lag."""
    updates = dict(planned.update)
    packs = tuple(replace(pack, assignments=updates.get(pack.name, pack.assignments)) for pack in snapshot.packs)
    return replace(snapshot, packs=packs + planned.create)


@dataclass
class _Board:
    """The packs of a snapshot while a plan is made: assignments are pencilled in, nothing else changes."""

    snapshot: Snapshot
    opened: list[Pack] = field(default_factory=list)
    pencilled: dict[str, tuple[Assignment, ...]] = field(init=False)

    def __post_init__(self) -> None:
        alive = {(demand.service, demand.uid) for demand in self.snapshot.demands}
        self.pencilled = {
            pack.name: tuple(
                each
                for each in pack.assignments
                if pack.health is not Health.LOST and (each.service, each.uid) in alive and each.replicas > 0
            )
            for pack in self.snapshot.packs
        }

    def packs_of(self, demand: Demand) -> list[Pack]:
        """The service's packs, oldest first, without those that are going anyway."""
        packs = [
            pack
            for pack in self.snapshot.packs
            if pack.owner == demand.service and pack.health not in (Health.LOST, Health.LEAVING)
        ]
        return sorted(packs, key=lambda pack: (pack.ordinal, pack.name))

    def assignment(self, pack: Pack, demand: Demand) -> Assignment | None:
        return next((each for each in self.pencilled[pack.name] if each.service == demand.service), None)

    def count(self, pack: Pack, demand: Demand) -> int:
        found = self.assignment(pack, demand)
        return found.replicas if found else 0

    def assign(self, pack: Pack, demand: Demand, replicas: int, shape: Shape | None) -> None:
        """Pencil ``replicas`` in; without a shape the assignment keeps the one it has."""
        found = self.assignment(pack, demand)
        others = tuple(each for each in self.pencilled[pack.name] if each.service != demand.service)
        chosen = shape or (found.shape if found else None)
        mine = (Assignment(demand.service, demand.uid, replicas, chosen),) if replicas and chosen else ()
        self.pencilled[pack.name] = tuple(sorted(others + mine, key=lambda each: each.service))

    def room(self, pack: Pack, demand: Demand, shape: Shape) -> int:
        """How many replicas of this shape the pack's ledger carries, beside what others have on it."""
        if pack.capacity is None:
            return demand.per_device
        others = sum(
            each.replicas * each.shape.memory for each in self.pencilled[pack.name] if each.service != demand.service
        )
        return max(0, min(demand.per_device, (pack.capacity - others) // max(1, shape.memory)))

    def excluded(self, demand: Demand) -> frozenset[str]:
        """Nodes on which this service's replicas were seen not to fit."""
        nodes: set[str] = set()
        for pack in self.packs_of(demand):
            nodes |= pack.excluded
            if pack.health is Health.UNFIT and pack.node:
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
        )

    def free(self, demand: Demand) -> int:
        """Free units, less those that packs still waiting for a node will take."""
        return max(0, sum(max(0, units) for units in self.supply(demand).values()) - self.unbound(demand))

    def open(self, demand: Demand, replicas: int, shape: Shape) -> bool:
        """Pencil a new pack in; False when no device is free."""
        node = None
        if demand.device == "cpu":
            fitting = [(units, name) for name, units in self.supply(demand).items() if units >= demand.units]
            if not fitting:
                return False
            node = min(fitting)[1]
        elif self.free(demand) < demand.units:
            return False
        name, ordinal = self._next_name(demand.service)
        self.opened.append(
            Pack(
                name,
                demand.service,
                ordinal,
                demand.device,
                demand.product,
                demand.mode,
                units=demand.units,
                node=node,
                assignments=(Assignment(demand.service, demand.uid, replicas, shape),),
                excluded=self.excluded(demand),
                memory=demand.memory,
            )
        )
        return True

    def _next_name(self, service: ServiceRef) -> tuple[str, int]:
        packs = (*self.snapshot.packs, *self.opened)
        taken = {pack.name for pack in packs}
        ordinal = max((pack.ordinal for pack in packs if pack.owner == service), default=-1) + 1
        # Namespace "a" with service "b-c" and namespace "a-b" with service "c" would share a name: step over it.
        while pack_name(service, ordinal) in taken:
            ordinal += 1
        return pack_name(service, ordinal), ordinal

    def created(self) -> tuple[Pack, ...]:
        return tuple(self.opened)

    def changed(self) -> tuple[tuple[str, tuple[Assignment, ...]], ...]:
        changes = [
            (pack.name, self.pencilled[pack.name])
            for pack in self.snapshot.packs
            if self.pencilled[pack.name] != tuple(sorted(pack.assignments, key=lambda each: each.service))
        ]
        return tuple(sorted(changes, key=lambda change: change[0]))


def _keep(board: _Board, demand: Demand) -> None:
    """Leave a service without a decision where it is; only a lower replica count takes something away."""
    surplus = sum(board.count(pack, demand) for pack in board.packs_of(demand)) - demand.replicas
    _shrink(board, demand, board.packs_of(demand), surplus, None)


def _settle(board: _Board, demand: Demand, shape: Shape) -> Shortfall | None:
    """Place one demand; returns what found no place."""
    packs = board.packs_of(demand)
    good = [pack for pack in packs if pack.health is Health.SOUND and _compatible(pack, demand)]
    second_best = [pack for pack in packs if pack not in good and board.count(pack, demand)]
    for pack in good:
        board.assign(pack, demand, min(board.count(pack, demand), board.room(pack, demand, shape)), shape)
    placed = sum(board.count(pack, demand) for pack in good)
    placed -= _shrink(board, demand, good, placed - demand.replicas, shape)
    for pack in good:
        added = min(demand.replicas - placed, board.room(pack, demand, shape) - board.count(pack, demand))
        if added > 0:
            board.assign(pack, demand, board.count(pack, demand) + added, shape)
            placed += added
    while placed < demand.replicas and demand.per_device > 0:
        batch = min(demand.per_device, demand.replicas - placed)
        if not board.open(demand, batch, shape):
            break
        placed += batch
    kept = _keep_second_best(board, demand, shape, second_best, demand.replicas - placed)
    if placed == demand.replicas:
        return None
    return _shortfall(board, demand, placed, kept)


def _compatible(pack: Pack, demand: Demand) -> bool:
    return (pack.device, pack.product, pack.mode, pack.units) == (
        demand.device,
        demand.product,
        demand.mode,
        demand.units,
    )


def _shrink(board: _Board, demand: Demand, packs: Iterable[Pack], surplus: int, shape: Shape | None) -> int:
    """Take ``surplus`` replicas away, from the newest pack first; returns how many were taken."""
    taken = 0
    for pack in reversed(list(packs)):
        count = board.count(pack, demand)
        less = min(count, surplus - taken)
        if less > 0:
            board.assign(pack, demand, count - less, shape)
            taken += less
    return taken


def _keep_second_best(board: _Board, demand: Demand, shape: Shape, packs: list[Pack], missing: int) -> int:
    """Leave on unwanted packs what has no better place; returns the replicas that stay there."""
    if missing > 0 and packs and not _device_coming(board, demand):
        # A pack of another mode holds the very device that is wanted: only giving it up can make progress.
        blocking = [pack for pack in packs if pack.health is Health.SOUND and pack.product == demand.product]
        if blocking:
            board.assign(blocking[-1], demand, 0, None)
            packs = [pack for pack in packs if pack is not blocking[-1]]
    kept = 0
    for pack in packs:
        stays = min(board.count(pack, demand), missing - kept)
        current = None
        if _compatible(pack, demand):
            stays, current = min(stays, board.room(pack, demand, shape)), shape
        board.assign(pack, demand, max(0, stays), current)
        kept += max(0, stays)
    return kept


def _device_coming(board: _Board, demand: Demand) -> bool:
    """Whether a pack of this service is on its way out and will free a device, or is taking up one that came free."""
    leaving = any(
        pack.owner == demand.service and pack.product == demand.product and not board.pencilled[pack.name]
        for pack in board.snapshot.packs
    )
    arriving = any(
        pack.owner == demand.service and pack.node is None and _compatible(pack, demand)
        for pack in (*board.snapshot.packs, *board.opened)
    )
    return leaving or arriving


def _shortfall(board: _Board, demand: Demand, placed: int, kept: int) -> Shortfall:
    missing = demand.replicas - placed
    per_pack = max(1, demand.per_device)
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
        placed=placed,
        kept=kept,
        packs_needed=-(-missing // per_pack),
        units_per_pack=demand.units,
        total=total,
        free=board.free(demand),
        memory_per_pack=demand.memory,
        memory_free=max((max(0, memory) for _, memory in board.left(demand).values()), default=0),
    )
