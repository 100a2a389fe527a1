"""`tightship plan`: where the operator would put the replicas of LLMServices, without a cluster.

Manifests are LLMServices, the BatchProfiles that answer them (with `spec.results`, or as `kubectl get bprof -o yaml` prints
them), and the ConfigMaps with lengths that they name. With --nodes the GPUs are those of a cluster; without, there are as many as
it takes, and the plan says how many that is. It is made by the operator's own code and starts from nothing: GPUs that
other pods hold, and packs that exist already, are not known here.

Exit status: 0 when every service has its place (or waits only for its approval); 3 when one has none: no batch meets its
objectives, or GPUs are too few; 2 when a file or a manifest is wrong, or a profile is missing. What can be planned is printed in
each case but a wrong file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from tightship.api.units import format_quantity
from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1.conditions import Reason
from tightship.commands.manifest import InputError, read_objects
from tightship.commands.output import columns, show
from tightship.core.placement import Assignment, Pack, ServiceRef, free_memory
from tightship.reconcile.rehearsal import IMAGINED, Rehearsal, Told, imagine_nodes, rehearse

EXIT_USAGE: Final = 2
EXIT_NO_PLACE: Final = 3
SUFFIXES: Final = (".yaml", ".yml", ".json")
PLANNED: Final = ("LLMService", "BatchProfile", "ConfigMap")

EPILOG = """\
-o json is one object:
  packs       name, node and gpu product (null where not known), and of each: assignments (service, replicas, batch, memoryPerReplica,
              profile), memoryFree beside the reserve, and measured: false where services share it, which nobody measured
  services    replicas wanted and placed, replicasPerGPU; reason and message of what is in the way, else null
  gpus        used; onePerReplica, what the same replicas would take one on each; saved, the difference
  shortfalls  replicas without a place, and the GPUs that they need

examples:
  tightship plan -f services/ profiles/
  kubectl get llm,bprof -n models -o yaml | tightship plan -f - --nodes <(kubectl get nodes -o yaml) -o json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `plan`; its namespace carries `run`."""
    parser = subparsers.add_parser(
        "plan",
        help="where replicas would go, from manifests, without a cluster",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-f",
        "--filename",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="manifests, of several documents each; a folder is read with what is below it, other kinds in it are passed over; - reads stdin",
    )
    parser.add_argument(
        "--nodes", metavar="FILE", help="what `kubectl get nodes -o yaml` prints (default: as many GPUs as it takes)"
    )
    parser.add_argument(
        "-n", "--namespace", default="default", help="of manifests that name none (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="default: %(default)s")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read, plan, print; returns the exit status."""
    try:
        objects = read_manifests(args.filename, args.namespace)
        nodes = read_nodes(args.nodes) if args.nodes is not None else imagine_nodes(objects)
    except InputError as error:
        print(f"tightship plan: {error}", file=sys.stderr)
        return EXIT_USAGE
    answer = rehearse([*objects, *nodes], datetime.now(timezone.utc))
    show([json.dumps(to_json(answer), indent=2)] if args.output == "json" else to_table(answer))
    wrong = [each for each in answer.told if _is_wrong(each)]
    for each in wrong:
        print(f"tightship plan: {each.service}: {each.failing.message if each.failing else ''}", file=sys.stderr)
    if wrong:
        return EXIT_USAGE
    return EXIT_NO_PLACE if any(_is_without_place(each) for each in answer.told) else 0


def _is_wrong(told: Told) -> bool:
    """Whether the manifests don't say enough, or say what can't be, so that nothing could be decided."""
    gate = told.failing
    return gate is not None and (gate.type == names.PROFILED or gate.reason == Reason.INVALID_SPEC)


def _is_without_place(told: Told) -> bool:
    return told.failing is not None and told.failing.reason != Reason.AWAITING_APPROVAL


# reading


def read_manifests(files: Sequence[str], namespace: str) -> list[dict[str, Any]]:
    """The services, profiles and lengths in files and folders; those without a namespace get this one.

    Raises:
        InputError: a file can't be read, a document is no object, two are the same, or there is no service.
    """
    found: dict[tuple[str, str, str], tuple[str, dict[str, Any]]] = {}
    for file, in_folder in _expand(files):
        for obj in _read(file):
            kind, name = str(obj.get("kind")), _name(file, obj)
            if kind not in PLANNED:
                if in_folder:
                    continue
                raise InputError(f"{file}: holds {_article(kind)}: give {', '.join(PLANNED)}{_hint(kind)}")
            own = {**obj, "metadata": {"namespace": namespace, **obj["metadata"]}}
            key = kind, str(own["metadata"]["namespace"]), name
            if key in found:
                raise InputError(f"{file}: {kind} {key[1]}/{name} is in {found[key][0]} too: leave one of the two out")
            found[key] = file, own
    objects = [obj for _, obj in found.values()]
    if not any(obj["kind"] == "LLMService" for obj in objects):
        kinds = ", ".join(sorted({obj["kind"] for obj in objects})) or "nothing that is planned"
        raise InputError(f"{', '.join(files)}: holds {kinds}, no LLMService: there is nothing to place")
    return objects


def read_nodes(file: str) -> list[Mapping[str, Any]]:
    """The nodes in a file. Raises InputError where it can't be read, holds something else, or none."""
    nodes = _read(file)
    for obj in nodes:
        _name(file, obj)
        if obj.get("kind") != "Node":
            raise InputError(
                f"{file}: holds {_article(str(obj.get('kind')))}, no Node: give what `kubectl get nodes -o yaml` prints"
            )
    if not nodes:
        raise InputError(f"{file}: holds no nodes: give what `kubectl get nodes -o yaml` prints, or leave --nodes out")
    return nodes


def _expand(files: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each file, and whether it was found in a folder."""
    for file in files:
        path = Path(file)
        if file == "-" or not path.is_dir():
            yield file, False
            continue
        inside = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
        if not inside:
            raise InputError(f"{file}: no file below it ends in {', '.join(SUFFIXES)}")
        yield from ((str(each), True) for each in inside)


def _read(file: str) -> list[Mapping[str, Any]]:
    try:
        return read_objects(file)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _name(file: str, obj: Mapping[str, Any]) -> str:
    metadata = obj.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InputError(f"{file}: {_article(str(obj.get('kind')))} has no metadata.name")
    return name


def _article(kind: str) -> str:
    return f"a {kind}" if kind != "None" else "an object without a kind"


def _hint(kind: str) -> str:
    return "; nodes go to --nodes" if kind == "Node" else ""


# saying


def to_json(answer: Rehearsal) -> dict[str, Any]:
    """The plan in the API's words; what isn't known is null."""
    free = free_memory(answer.after)
    used, alone = _gpus(answer)
    return {
        "packs": [_pack(pack, free[pack.name]) for pack in answer.after.packs],
        "services": [_service(answer, told) for told in answer.told],
        "gpus": {"used": used, "onePerReplica": alone, "saved": alone - used},
        "shortfalls": [
            {
                "namespace": short.service.namespace,
                "service": short.service.name,
                "product": short.product,
                "replicas": short.wanted - short.placed,
                "unitsNeeded": short.packs_needed * short.units_per_pack,
                "unitsFree": short.free,
                "units": "cores" if short.device == "cpu" else "GPUs",
            }
            for short in answer.plan.shortfalls
        ],
    }


def _pack(pack: Pack, free: int | None) -> dict[str, Any]:
    return {
        "name": pack.name,
        "device": pack.device,
        "node": _node(pack),
        "product": pack.product if pack.device != "cpu" else None,
        "cores": pack.units if pack.device == "cpu" else None,
        "assignments": [
            {
                "namespace": each.service.namespace,
                "service": each.service.name,
                "replicas": each.replicas,
                "batch": each.shape.batch,
                "kvCache": format_quantity(each.shape.kv_cache),
                "memoryPerReplica": format_quantity(each.shape.memory),
                "profile": each.shape.profile,
            }
            for each in pack.assignments
        ],
        "memoryFree": None if free is None else format_quantity(free),
        "measured": len(pack.assignments) == 1,
    }


def _service(answer: Rehearsal, told: Told) -> dict[str, Any]:
    service, failing = told.verdict.service, told.failing
    return {
        "namespace": told.service.namespace,
        "name": told.service.name,
        "replicas": service.spec.replicas if service is not None else None,
        "placed": _placed(answer, told.service),
        "replicasPerGPU": told.verdict.per_device or None,
        "reason": failing.reason if failing is not None else None,
        "message": failing.message if failing is not None else None,
    }


def to_table(answer: Rehearsal) -> Iterator[str]:
    """The plan as lines for a terminal."""
    free = free_memory(answer.after)
    rows = [row for pack in answer.after.packs for row in _rows(pack, free[pack.name])]
    if rows:
        yield from columns([["PACK", "NODE", "DEVICE", "SERVICE", "REPLICAS", "BATCH", "MEMORY", "FREE"], *rows])
        yield ""
    for told in answer.told:
        if told.failing is not None and not _is_wrong(told):
            yield f"{told.service}: {told.failing.reason}: {told.failing.message}"
    yield from _summary(answer)


def _rows(pack: Pack, free: int | None) -> Iterator[list[str]]:
    device = f"{pack.units} cores" if pack.device == "cpu" else pack.product
    head = [pack.name, _node(pack) or "any", device]
    for number, each in enumerate(pack.assignments):
        left = "unknown" if free is None else _gib(free)
        yield [*(["", "", ""] if number else head), *_cells(each), "" if number else left]


def _cells(each: Assignment) -> list[str]:
    memory = f"{each.replicas} x {_gib(each.shape.memory)}"
    return [str(each.service), str(each.replicas), str(each.shape.batch), memory]


def _summary(answer: Rehearsal) -> Iterator[str]:
    used, alone = _gpus(answer)
    products = Counter(pack.product for pack in answer.after.packs if pack.device != "cpu")
    if used:
        what = ", ".join(f"{count} {product}" for product, count in sorted(products.items()))
        yield f"{_count(used, 'GPU')} ({what}) for {_count(alone, 'replica')}: {alone - used} fewer than with one replica on each"
    for pack in answer.after.packs:
        if len(pack.assignments) > 1:
            shared = " and ".join(str(each.service) for each in pack.assignments)
            yield f"note: {pack.name} is shared by {shared}: each was measured without the other, so their latencies there are not known"
    if not answer.after.packs:
        yield "nothing is placed"


def _gpus(answer: Rehearsal) -> tuple[int, int]:
    """GPUs that the plan takes, and those that the same replicas would take one on each."""
    held = [pack for pack in answer.after.packs if pack.device != "cpu"]
    return len(held), sum(each.replicas for pack in held for each in pack.assignments)


def _placed(answer: Rehearsal, service: ServiceRef) -> int:
    return sum(each.replicas for pack in answer.after.packs for each in pack.assignments if each.service == service)


def _node(pack: Pack) -> str | None:
    """The node, where it is known and real: of a GPU the scheduler chooses it."""
    return None if pack.node is None or pack.node.startswith(IMAGINED) else pack.node


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _gib(amount: int) -> str:
    return f"{amount / (1 << 30):.1f}Gi"
