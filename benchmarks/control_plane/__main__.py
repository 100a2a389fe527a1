"""How the operator scales: services applied at once, beside the same pods from plain StatefulSets.

Both run on the real control plane (KUBEBUILDER_ASSETS) with hollow nodes, each on a fresh one, with the same client-QPS flags for
controllers and scheduler. First the operator: profiles are imported and complete, then all services are applied and the time runs until
all pods exist, until all are ready, and until every service says Ready; after that nothing changes for a while, and requests are counted.
Then the yardstick: the pods of that cluster, holders included, as StatefulSets of the built-in controller.

Requests are counted in the API server's audit log, by user agent; CPU and memory come from /proc. Everything shares this machine's cores,
so the times are of the whole and the comparison is what counts. Replicas of the yardstick wait for no holder, so its time to ready
pods is that of pods without any order among them.

Prints a table, writes JSON, and ends with status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from audit import Audit, Request, counts
from processes import Usage, usage
from workload import PER_GPU, Object, plain, profile, service

from common import RESULTS, table, write_json
from tightship.core.conditions import is_true
from tightship.sandbox.agent.api import Api
from tightship.sandbox.cluster import Sandbox

OPERATOR = "tightship"
GPUS_PER_NODE = 8
PARALLEL = 8
"""Requests that this benchmark has under way at once."""
SERVICES = "/apis/tightship.dev/v1alpha1/namespaces/default/llmservices"
PROFILES = "/apis/tightship.dev/v1alpha1/namespaces/default/batchprofiles"
SETS = "/apis/apps/v1/namespaces/{}/statefulsets"
PODS = "/api/v1/pods"

PER_SERVICE = frozenset({"llmservices", "llmservices/status", "services", "batchprofiles", "batchprofiles/status"})
OWN = frozenset({"pods", "pods/status", "pods/binding", "events", "leases"})
"""Writes that are the pods' own, the events and the Lease: no goal counts them."""


@dataclass
class Run:
    """What one half found. Times in seconds from the first apply; `requests` of everybody until all was ready, `idle` while nothing changed."""

    created: float = 0.0
    ready: float = 0.0
    done: float = 0.0
    requests: list[Request] = field(default_factory=list)
    idle: list[Request] = field(default_factory=list)
    idle_seconds: float = 0.0
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)
    rested: dict[str, Usage] = field(default_factory=dict)

    def cpu(self, name: str) -> float:
        """CPU seconds of a process from the first apply until all was ready."""
        return self.after[name].cpu - (self.before[name].cpu if name in self.before else 0.0)


def main() -> int:
    """Run both halves, print, write, judge."""
    args = _arguments()
    operator, yardstick = asyncio.run(measure(args))
    results = summary(args, operator, yardstick)
    print(render(results))
    path = write_json(args.output, "control_plane", results, settings=vars(args) | {"output": None})
    print(f"\nwritten to {path}")
    return 0 if all(goal["met"] for goal in results["goals"]) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=500, help="LLMServices")
    parser.add_argument("--gpus", type=int, default=1000, help="simulated GPUs, all of which the services fill")
    parser.add_argument(
        "--client-qps", type=int, default=100, help="of each controller and the scheduler, in both halves"
    )
    parser.add_argument("--idle", type=float, default=120.0, help="seconds to count requests for while nothing changes")
    parser.add_argument(
        "--limit", type=float, default=1200.0, help="seconds that either half may take until all is ready"
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "control_plane.json")
    args = parser.parse_args()
    if args.gpus % args.services:
        parser.error(f"{args.gpus} GPUs are not the same number for each of {args.services} services")
    return args


async def measure(args: argparse.Namespace) -> tuple[Run, Run]:
    """The operator's half, then the yardstick on what it left."""
    with _sandbox(args) as sandbox:
        async with _api(sandbox) as api:
            operator = await with_operator(args, sandbox, api)
            holders, sets = await _left(api)
    with _sandbox(args) as sandbox:
        async with _api(sandbox) as api:
            return operator, await with_statefulsets(args, sandbox, api, plain(holders, sets))


def _sandbox(args: argparse.Namespace) -> Sandbox:
    return Sandbox(
        plane="real",
        nodes=-(-args.gpus // GPUS_PER_NODE),
        gpus_per_node=GPUS_PER_NODE,
        cpus=128,
        memory=1024 * 2**30,
        hollow={},
        operator=False,
        # the operator's own defaults, instead of the sandbox's short ones
        operator_arguments=[
            "--lease-duration=15",
            "--lease-renew-deadline=10",
            "--lease-retry=2",
            "--status-interval=3",
        ],
        # nobody is to be taken for dead because this machine is busy
        node_grace=300,
        heartbeat=60.0,
        audit=True,
        client_qps=args.client_qps,
    )


def _api(sandbox: Sandbox) -> Api:
    config = yaml.safe_load(sandbox.kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    return Api(cluster["server"], user["token"], cluster["certificate-authority"])


async def with_operator(args: argparse.Namespace, sandbox: Sandbox, api: Api) -> Run:
    """Profiles first; then everything at once."""
    run, audit = Run(), Audit(sandbox.state / "plane" / "audit.log")
    services = [service(index, args.gpus // args.services) for index in range(args.services)]
    pods = args.gpus * (1 + PER_GPU)
    await _post(api, PROFILES, [profile(each) for each in services])
    sandbox.start_operator()
    await _until(args, "all profiles are complete", lambda: _all_true(api, PROFILES, "Complete", args.services))
    say(f"{args.services} profiles are complete")
    audit.read()
    run.before, began = usage(sandbox.state), time.monotonic()
    await _post(api, SERVICES, services)
    run.created = await _until(args, f"{pods} pods exist", lambda: _count(api, PODS, pods), began)
    run.ready = await _until(args, "all pods are ready", lambda: _all_true(api, PODS, "Ready", pods), began)
    run.done = await _until(
        args, "all services are Ready", lambda: _all_true(api, SERVICES, "Ready", args.services), began
    )
    run.after = usage(sandbox.state)
    run.requests = audit.read()
    await asyncio.sleep(15)  # what is under way still
    late = audit.read()
    run.requests += late
    begun = time.monotonic()
    await asyncio.sleep(args.idle)
    run.idle, run.idle_seconds = audit.read(), time.monotonic() - begun
    run.rested = usage(sandbox.state)
    return run


async def with_statefulsets(args: argparse.Namespace, sandbox: Sandbox, api: Api, sets: Sequence[Object]) -> Run:
    """The same pods, from the built-in controller alone."""
    run, audit = Run(), Audit(sandbox.state / "plane" / "audit.log")
    pods = sum(each["spec"]["replicas"] for each in sets)
    audit.read()
    run.before, began = usage(sandbox.state), time.monotonic()
    await asyncio.gather(
        *(
            _post(api, SETS.format(namespace), [each for each in sets if each["metadata"]["namespace"] == namespace], 4)
            for namespace in ("default", "tightship-system")
        )
    )
    run.created = await _until(args, f"{pods} pods exist", lambda: _count(api, PODS, pods), began)
    run.ready = run.done = await _until(args, "all pods are ready", lambda: _all_true(api, PODS, "Ready", pods), began)
    run.after = usage(sandbox.state)
    run.requests = audit.read()
    return run


async def _left(api: Api) -> tuple[list[Object], list[Object]]:
    """The holders and the StatefulSets of the operator's half."""
    pods = (await api.get("/api/v1/namespaces/tightship-system/pods"))["items"]
    return pods, (await api.get(SETS.format("default")))["items"]


async def _post(api: Api, path: str, objects: Iterable[Object], parallel: int = PARALLEL) -> None:
    waiting = iter(objects)

    async def send() -> None:
        for each in waiting:
            await api.create(path, each)

    await asyncio.gather(*(send() for _ in range(parallel)))


async def _until(
    args: argparse.Namespace, what: str, reached: Callable[[], Awaitable[bool]], began: float | None = None
) -> float:
    """Wait until something holds; returns when, in seconds after `began`. Raises TimeoutError after the limit."""
    began = time.monotonic() if began is None else began
    while True:
        looked = time.monotonic()
        if await reached():
            say(f"{what} after {looked - began:.1f} s")
            return looked - began
        if looked - began > args.limit:
            raise TimeoutError(f"not after {args.limit:g} s: {what}")
        # What this benchmark asks costs the API server time too.
        await asyncio.sleep(min(2.0, max(0.25, 4 * (time.monotonic() - looked))))


async def _count(api: Api, path: str, wanted: int) -> bool:
    page = await api.request("GET", path, params={"limit": "1"})
    return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0) >= wanted


async def _all_true(api: Api, path: str, kind: str, wanted: int) -> bool:
    items, more = [], ""
    while True:
        page = await api.request("GET", path, params={"limit": "500", **({"continue": more} if more else {})})
        items += page["items"]
        more = page["metadata"].get("continue") or ""
        if any(not is_true((each.get("status") or {}).get("conditions") or (), kind) for each in page["items"]):
            return False
        if not more:
            return len(items) >= wanted


def summary(args: argparse.Namespace, operator: Run, yardstick: Run) -> dict[str, Any]:
    """Figures, and the goals they are held against."""
    mine = [each for each in operator.requests if each.agent == OPERATOR]
    writes = [each for each in mine if each.writes and each.resource not in OWN]
    of_services = [each for each in writes if each.resource in PER_SERVICE]
    of_packs = [each for each in writes if each.resource not in PER_SERVICE]
    idle = [each for each in operator.idle if each.agent == OPERATOR and each.resource != "leases"]
    per_service, per_pack = len(of_services) / args.services, len(of_packs) / args.gpus
    peak = max(operator.after["operator"].peak, operator.rested["operator"].peak)
    goals = [
        ("time to all pods, beside the yardstick's", operator.created / yardstick.created, 2.0),
        ("write requests a service", per_service, 15.0),
        ("write requests a pack", per_pack, 8.0),
        ("memory of the operator (MiB)", peak, 400.0),
        ("writes while nothing changes", float(sum(each.writes for each in idle)), 0.0),
    ]
    return {
        "services": args.services,
        "gpus": args.gpus,
        "pods": args.gpus * (1 + PER_GPU),
        "halves": [_half("operator", operator), _half("StatefulSets", yardstick)],
        "goals": [{"goal": goal, "value": value, "most": most, "met": value <= most} for goal, value, most in goals],
        "requests": {
            "operator": counts(mine),
            "everybody": counts(operator.requests),
            "yardstick": counts(yardstick.requests),
        },
        "idle": {
            "seconds": operator.idle_seconds,
            "requests": counts(idle),
            "perMinute": 60 * len(idle) / operator.idle_seconds,
            "operatorCPU": (operator.rested["operator"].cpu - operator.after["operator"].cpu)
            / (operator.idle_seconds + 15),
        },
        "agents": {
            each: counts(r for r in operator.requests if r.agent == each)
            for each in {r.agent for r in operator.requests}
        },
    }


def _half(name: str, run: Run) -> dict[str, Any]:
    return {
        "half": name,
        "created": run.created,
        "ready": run.ready,
        "done": run.done,
        "requests": len(run.requests),
        "writes": sum(each.writes for each in run.requests),
        "cpu": {process: run.cpu(process) for process in run.after},
        "memory": {process: found.peak for process, found in run.after.items()},
    }


def render(results: dict[str, Any]) -> str:
    """The tables."""
    rows = [half | {f"cpu {name}": seconds for name, seconds in half["cpu"].items()} for half in results["halves"]]
    columns = {
        "half": "half",
        "created": "pods exist, s:",
        "ready": "pods ready, s:",
        "done": "all Ready, s:",
        "requests": "requests:",
    }
    columns |= {
        f"cpu {name}": f"CPU {name}, s:"
        for name in ("operator", "kube-apiserver", "kube-controller-manager", "node agent")
    }
    goals = [goal | {"met": "yes" if goal["met"] else "NO"} for goal in results["goals"]]
    asked = [{"request": each, "count": count} for each, count in results["requests"]["operator"].items()]
    idle = results["idle"]
    return "\n\n".join(
        [
            f"{results['services']} services, {results['gpus']} GPUs, {results['pods']} pods",
            table(columns, rows),
            table({"goal": "goal", "value": "measured:", "most": "at most:", "met": "met"}, goals),
            table({"request": "request of the operator", "count": "count:"}, asked),
            f"nothing changes for {idle['seconds']:.0f} s: {idle['perMinute']:.1f} requests a minute beside the Lease {idle['requests']}, "
            f"{100 * idle['operatorCPU']:.1f} % of a core",
        ]
    )


def say(words: str) -> None:
    """Progress, apart from the results."""
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
