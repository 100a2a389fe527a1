"""What one reconcile costs in a cluster of a given size, in the operator's memory alone: no API server, no network.

Builds a settled cluster (two GPUs a service, two replicas on each, nodes and a profile of their own) out of the operator's own reconcilers,
puts it into one store, and times reconciles of each kind and the placement pass: first as a new operator makes them, then at rest. Prints a
table and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, table, write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from crowd import Crowd, keys, look, make_crowd

KINDS = ("LLMService", "GPUPack", "BatchProfile", "Placement")
COLUMNS = {"kind": "reconcile", "when": "when", "mean": "mean, ms:", "most": "most, ms:", "count": "of:"}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=500)
    parser.add_argument("--samples", type=int, default=100, help="reconciles of each kind")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "reconcile_cost.json")
    args = parser.parse_args()
    rows = asyncio.run(measure(args.services, args.samples))
    print(f"{args.services} services, {2 * args.services} packs, {6 * args.services} pods, {2 * args.services} nodes\n")
    print(table(COLUMNS, rows))
    print(f"\nwritten to {write_json(args.output, 'reconcile_cost', rows, services=args.services)}")


async def measure(services: int, samples: int) -> list[dict[str, Any]]:
    """Times of each kind, by a new operator and at rest."""
    crowd = await make_crowd(services, settled=False)
    return [await _time(crowd, kind, samples, when) for when in ("at first", "at rest") for kind in KINDS]


async def _time(crowd: Crowd, kind: str, samples: int, when: str) -> dict[str, Any]:
    found = keys(crowd, kind)
    seconds = []
    for key in found[:: max(1, len(found) // samples)][:samples]:
        began = time.perf_counter()
        await look(crowd, key)
        seconds.append(time.perf_counter() - began)
    mean, most = 1000 * statistics.mean(seconds), 1000 * max(seconds)
    return {"kind": kind, "when": when, "mean": round(mean, 3), "most": round(most, 3), "count": len(seconds)}


if __name__ == "__main__":
    main()
