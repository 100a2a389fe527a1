"""`tightship node watch`: says on the holder's own pod which GPU it has, how MPS is, which pods are its clients, and what they saw.

A client's PID is mapped to its pod by the pod UID in the path of its cgroup, which every kubelet puts there. That a replica's
pod appears among the clients is the proof that it runs under MPS: CUDA itself gives no error when it doesn't. What each replica saw of
the GPU before its engine started it leaves in the pack's directory, since it has no access to the API.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tightship.node import control
from tightship.node.pods import pod_uid, preflights

ANNOTATION_GPU = "tightship.dev/gpu"
ANNOTATION_MPS = "tightship.dev/mps"
ANNOTATION_PREFLIGHT = "tightship.dev/preflight"
DEFAULT_TOKEN_FILE = "/var/run/secrets/tightship/token"


Annotations = dict[str, str | None]
"""Values by name; None: there shouldn't be one."""


def observe(directory: Path, proc: Path) -> Annotations:
    """The annotations as they should be now; the GPU's is None while the other container has not said which it is."""
    health = control.health()
    clients = [{"pid": pid, "podUID": pod_uid(pid, proc)} for pid in health.clients]
    annotations: Annotations = {
        ANNOTATION_GPU: None,
        ANNOTATION_MPS: _json({"state": health.state, "server": health.server, "clients": clients}),
    }
    annotations[ANNOTATION_PREFLIGHT] = _json(preflights(directory))
    with contextlib.suppress(OSError, ValueError):
        annotations[ANNOTATION_GPU] = _json(json.loads((directory / "gpu.json").read_text(encoding="utf-8")))
    return annotations


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass
class Look:
    """What a watcher sees, from when there is something to see: a daemon that is just starting is not one that is down.

    `start_seconds` is the time a daemon gets until its silence is published as DOWN, and that no GPU is known as such; once it has
    answered, every silence is.
    """

    directory: Path
    proc: Path
    start_seconds: float = 20.0
    clock: Callable[[], float] = time.monotonic
    _began: float | None = None
    _answered: bool = False

    def __call__(self) -> Annotations:
        """The annotations to publish now."""
        annotations = observe(self.directory, self.proc)
        self._began = self.clock() if self._began is None else self._began
        self._answered = self._answered or json.loads(annotations[ANNOTATION_MPS] or "{}")["state"] != "DOWN"
        if not self._answered and self.clock() - self._began < self.start_seconds:
            del annotations[ANNOTATION_MPS], annotations[ANNOTATION_PREFLIGHT]
            if annotations[ANNOTATION_GPU] is None:
                del annotations[ANNOTATION_GPU]
        return annotations


class OwnPod:
    """The one object this container may write."""

    def __init__(self, env: Mapping[str, str], transport: httpx.BaseTransport | None = None) -> None:
        host, port = env["KUBERNETES_SERVICE_HOST"], env.get("KUBERNETES_SERVICE_PORT", "443")
        self._token_file = Path(env.get("TIGHTSHIP_TOKEN_FILE") or DEFAULT_TOKEN_FILE)
        self._path = f"/api/v1/namespaces/{env['TIGHTSHIP_POD_NAMESPACE']}/pods/{env['TIGHTSHIP_POD_NAME']}"
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._client = httpx.Client(
            base_url=f"https://{authority}",
            verify=_trust(self._token_file.with_name("ca.crt")),
            timeout=10,
            trust_env=False,
            transport=transport,
        )

    def annotate(self, annotations: Mapping[str, str | None]) -> None:
        """Set these annotations (None: take it away), and leave all else.

        Raises:
            httpx.HTTPError, OSError: it didn't work; try again later.
        """
        # Read each time: the kubelet renews the token in place.
        token = self._token_file.read_text(encoding="utf-8").strip()
        self._client.patch(
            self._path,
            content=json.dumps({"metadata": {"annotations": dict(annotations)}}),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"},
        ).raise_for_status()


def _trust(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate) if certificate.exists() else None)


@dataclass
class Watcher:
    """Looks every `interval` seconds and writes what changed; after failed writes ever more slowly, at most `slowest` seconds apart."""

    look: Callable[[], Mapping[str, str | None]]
    write: Callable[[Mapping[str, str | None]], Any]
    interval: float = 3.0
    slowest: float = 30.0
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stopped`."""
        # What an earlier watcher left is not known, so at first even that something is not there is written.
        published: dict[str, str | None] = {}
        pause, failures = 0.0, 0
        while not self.stopped.wait(pause):
            changed = {name: value for name, value in self.look().items() if published.get(name, "") != value}
            try:
                if changed:
                    self.write(changed)
                published |= changed
                failures = 0
            except (httpx.HTTPError, OSError) as error:
                failures += 1
                print(f"tightship: publishing failed, will try again: {error}", file=sys.stderr, flush=True)
            pause = min(self.interval * 2**failures, self.slowest)


def run(directory: Path, interval: float) -> int:
    """Watch until SIGTERM; returns the exit status."""
    proc = Path(os.environ.get("TIGHTSHIP_PROC_ROOT") or "/proc")
    try:
        pod = OwnPod(os.environ)
    except KeyError as missing:
        print(
            f"tightship: environment variable {missing.args[0]} is not set: run this in a holder pod", file=sys.stderr
        )
        return 2
    watcher = Watcher(Look(directory, proc), pod.annotate, interval)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: watcher.stopped.set())
    watcher.run()
    return 0
