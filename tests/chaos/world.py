"""The cluster that the suite torments: 3 hollow nodes of 4 GPUs, 8 services in two namespaces, the operator as a process.

The world knows what was asked for and which disturbances last (a node that is down, a cordon, a dead operator), so that the invariants can
tell a good reason from an excuse.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from chaos.client import Client, Object
from chaos.news import JournalNews, LogNews, News
from story import make_profile, make_service
from tightship.sandbox.cluster import Sandbox, SandboxError

NODES, GPUS, PROCESS_NODES = 3, 4, 2
NAMESPACES = ("default", "team")
IMAGES = ("vllm/vllm-openai:v0.33.0", "vllm/vllm-openai:v0.33.1")
MISSING_IMAGE = "missing/engine:v1"
OBJECTIVES = ("30ms", "20ms", "12ms")
INFEASIBLE = "1ms"
SYSTEM = "tightship-system"
TIMING = {"backoff_first": 0.5, "backoff_max": 2.0, "retry": 0.3, "probe_unit": 0.05}
PROCESS_TIMING = {"backoff_first": 0.5, "backoff_max": 2.0, "retry": 0.3, "probe_unit": 0.2}
HOLLOW: dict[str, Any] = {
    "start_seconds": 0.3,
    "daemon_seconds": 0.1,
    "fence_seconds": 0.8,
    "watch_seconds": 0.2,
    "drain_seconds": 0.1,
    "leave_seconds": 6.0,
    "fenced_seconds": 3.0,
    "memory_seconds": 5.0,
    "missing_images": ["missing/"],
}
NODE_GRACE, EVICTION, HEARTBEAT = 6, 3, 1.0
LEASE = ["--lease-duration=8", "--lease-renew-deadline=6", "--lease-retry=0.5"]
"""Longer than the sandbox's own: on a machine that is busy an operator gets no turn for 3 s now and then, and would end for it."""


@dataclass
class World:
    """What there is to torment. `cordoned`, `away` are nodes out of service, `cut` those that the API server can't hear, with the time
    (monotonic) until when; `down` are processes that were killed and not yet started.
    """

    sandbox: Sandbox
    client: Client
    real: bool
    hollow: bool
    news: News
    services: dict[tuple[str, str], Object] = field(default_factory=dict)
    cordoned: set[str] = field(default_factory=set)
    away: set[str] = field(default_factory=set)
    cut: dict[str, float] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> list[str]:
        """All nodes there could be."""
        return [f"sandbox-{index}" for index in range(NODES if self.hollow else PROCESS_NODES)]

    def apply(self, key: tuple[str, str]) -> None:
        """Bring a service to what was asked for."""
        wanted = self.services[key]
        self.client.create("LLMService", wanted)
        self.client.merge("LLMService", *key, {"spec": wanted["spec"]})

    def ask_node(self, path: str) -> bool:
        """A fault on the nodes, as hollow ones name it; False where its target isn't there any more."""
        with contextlib.suppress(SandboxError, OSError):
            if self.hollow:
                self.sandbox.ask_hollow(path)
            else:
                # of all faults only `pods/NAMESPACE/POD/CONTAINER/kill` has processes that it could strike
                _, namespace, pod, container, _ = path.split("/")
                self.sandbox.kill_container(pod, container, "OOMKilled", namespace)
            return True
        return False

    @property
    def api_process(self) -> str:
        """The process that serves the API."""
        return "kube-apiserver" if self.real else "plane"

    def pause(self, name: str, number: signal.Signals) -> None:
        """Stop or continue a process without ending it."""
        pid = self.sandbox.process_id(name)
        if pid is not None:
            self.sandbox.exec_in_namespace(["kill", f"-{number.value}", str(pid)])

    def mend(self) -> list[str]:
        """End the disturbances that don't outlast a burst of events; says which."""
        ended = []
        for name in sorted(self.down):
            self.sandbox.start_process(name)
            ended.append(f"{name} started")
        self.down.clear()
        for node, until in sorted(self.cut.items()):
            time.sleep(max(0.0, until - time.monotonic()))
            self.ask_node(f"nodes/{node}/join")
            ended.append(f"{node} joined")
        self.cut.clear()
        return ended


def make_world_service(index: int, hollow: bool) -> Object:
    """Service number `index`: two namespaces, a few that share, one that spreads; without hollow nodes all have a replica or two."""
    name, namespace = f"svc-{index}", NAMESPACES[index % 2]
    changes: dict[str, Any] = {"replicas": 1 + index % (3 if hollow else 2), "engine__image": IMAGES[0]}
    if index in (2, 4):
        changes["packing__sharedWith"] = "SameNamespace"
    if index == 5:
        changes["packing__spread"] = True
    service = make_service(name, **changes)
    service["metadata"]["namespace"] = namespace
    return service


def profiles() -> Iterator[Object]:
    """Finished profiles for every key that the services may ever ask for."""
    for namespace in NAMESPACES:
        for number, image in enumerate((*IMAGES, MISSING_IMAGE)):
            profile = make_profile(make_service(engine__image=image), name=f"imported-{number}")
            profile["metadata"]["namespace"] = namespace
            yield profile


@contextlib.contextmanager
def world(plane: str, state: str | None = None, hollow: bool = True) -> Iterator[World]:
    """A world with its services applied, not yet settled.

    With `hollow` nodes 8 services on 12 GPUs; else, with real processes on simulated GPUs, 3 services on 4.
    """
    nodes, gpus, services = (NODES, GPUS, 8) if hollow else (PROCESS_NODES, 2, 3)
    sandbox = Sandbox(
        state,
        plane=plane,
        nodes=nodes,
        gpus_per_node=gpus,
        cpus=64,
        hollow=HOLLOW if hollow else None,
        timing=TIMING if hollow else PROCESS_TIMING,
        node_grace=NODE_GRACE,
        eviction=EVICTION,
        heartbeat=HEARTBEAT,
        operator_arguments=LEASE,
    )
    with sandbox, contextlib.closing(Client(sandbox.kubeconfig)) as client:
        news = JournalNews(sandbox.journal) if hollow else LogNews([sandbox.node_dir(index) for index in range(nodes)])
        made = World(sandbox, client, plane == "real", hollow, news)
        for namespace in NAMESPACES[1:]:
            client.create("Namespace", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        for profile in profiles():
            client.create("BatchProfile", profile)
        for index in range(services):
            service = make_world_service(index, hollow)
            key = service["metadata"]["namespace"], service["metadata"]["name"]
            made.services[key] = service
            made.apply(key)
        yield made


def annotation(obj: Object, name: str) -> Object:
    """A JSON annotation of Tightship; {} where it isn't there."""
    return dict(json.loads((obj["metadata"].get("annotations") or {}).get(f"tightship.dev/{name}", "{}")))


def default_plane() -> str:
    """The real control plane where this machine has one."""
    return "real" if os.environ.get("KUBEBUILDER_ASSETS") else "embedded"
