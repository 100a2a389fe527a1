"""An API server in a dictionary, and a clock that stands still: what unit tests of the operator's I/O stand on.

It knows what these tests need and no more: versions, UIDs, create, update, merge patch, a server-side apply that merges
maps and replaces lists, status apart from the rest, delete. What a real server does beyond that is for the tests on the
control planes.
"""

from __future__ import annotations

import asyncio
import copy
import heapq
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from tightship.kube.errors import Unreachable
from tightship.kube.kinds import KINDS

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)


class FakeClock:
    """Time moves when `advance` is called."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.elapsed)

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.elapsed + max(0.0, seconds), self._count, future))
        await future

    async def advance(self, seconds: float) -> None:
        """Let that much time pass, waking sleepers in order, each of them given the chance to go on."""
        end = self.elapsed + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            self.elapsed = max(self.elapsed, due)
            if not future.done():
                future.set_result(None)
            await settle()
        self.elapsed = end
        await settle()


async def settle() -> None:
    """Give every task that can run the chance to."""
    for _ in range(30):
        await asyncio.sleep(0)


class FakeApi:
    """The transport and the server behind it. `requests` counts (method, kind); `broken` makes it unreachable.

    `refuse` maps (method, kind) to a Status that is answered instead. A dry run counts as "DRYRUN", and stores nothing.
    `lacks` are API versions that it doesn't serve.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.broken = False
        self.refuse: dict[tuple[str, str], dict[str, Any]] = {}
        self.queries: list[Mapping[str, str]] = []
        self.lacks: set[str] = set()
        self._version = 100
        self._uid = 0

    async def close(self) -> None:
        self.broken = True

    def writes(self) -> int:
        """How many requests were to change something."""
        return sum(count for (method, _), count in self.requests.items() if method not in ("GET", "DRYRUN"))

    def put(self, obj: Mapping[str, Any]) -> dict[str, Any]:
        """Make an object without a request, as somebody else would."""
        kind = KINDS[obj["kind"]]
        metadata = obj["metadata"]
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        made = copy.deepcopy(dict(obj))
        made["metadata"].setdefault("uid", self._new_uid())
        made["metadata"].setdefault("generation", 1)
        return copy.deepcopy(self._store(path, made))

    def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.objects.get(KINDS[kind].path(namespace, name))

    async def request(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str
    ) -> tuple[int, dict[str, Any]]:
        kind = _kind_of(path)
        dry_run = query.get("dryRun") == "All"
        self.requests["DRYRUN" if dry_run else method, kind] += 1
        self.queries.append(query)
        if self.broken:
            raise Unreachable(f"{method} {path}: refused")
        if (method, kind) in self.refuse:
            answer = self.refuse[method, kind]
            return answer["code"], answer
        kept = (dict(self.objects), self._version, self._uid)
        answer = getattr(self, "_" + method.lower())(path, query, copy.deepcopy(body), content_type)
        if dry_run:
            self.objects, self._version, self._uid = kept
        return answer[0], copy.deepcopy(answer[1])

    def _get(self, path: str, query: Mapping[str, str], body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        if path in self.objects:
            return 200, self.objects[path]
        version = path.partition("/api")[2].removeprefix("s").lstrip("/")
        served = [{"name": kind.plural} for kind in KINDS.values() if kind.api_version == version]
        if served and version not in self.lacks:
            return 200, {"kind": "APIResourceList", "resources": served}
        if path.rsplit("/", 1)[-1] not in {kind.plural for kind in KINDS.values()}:
            return _failure(404, "NotFound", f"{path} not found")
        plural = path.rsplit("/", 1)[-1]
        found = [obj for each, obj in sorted(self.objects.items()) if each.split("/")[-2] == plural]
        return 200, {"items": found, "metadata": {"resourceVersion": str(self._version)}}

    def _post(self, path: str, query: Mapping[str, str], body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        place = f"{path}/{body['metadata']['name']}"
        if place in self.objects:
            return _failure(409, "AlreadyExists", f"{place} exists")
        body["metadata"] |= {"uid": self._new_uid(), "generation": 1}
        return 201, self._store(place, body)

    def _put(self, path: str, query: Mapping[str, str], body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        if path not in self.objects:
            return _failure(404, "NotFound", f"{path} not found")
        if body["metadata"]["resourceVersion"] != self.objects[path]["metadata"]["resourceVersion"]:
            return _failure(409, "Conflict", "the object has been modified")
        return 200, self._store(path, body)

    def _patch(self, path: str, query: Mapping[str, str], body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        place, status = path.removesuffix("/status"), path.endswith("/status")
        apply = content_type.startswith("application/apply-patch")
        live = self.objects.get(place)
        if live is None and (status or not apply):
            return _failure(404, "NotFound", f"{place} not found")
        if live is None:
            if body["metadata"].get("uid"):
                return _failure(409, "Conflict", "uid mismatch: no existing object was found")
            body["metadata"] |= {"uid": self._new_uid(), "generation": 1}
            return 201, self._store(place, body)
        uid = body.get("metadata", {}).get("uid")
        if uid and uid != live["metadata"]["uid"]:
            causes = {"causes": [{"field": "metadata.uid"}]}
            return _failure(422, "Invalid", "metadata.uid: field is immutable", causes)
        changed = copy.deepcopy(live)
        if status:
            changed["status"] = body.get("status", {}) if apply else _merge(live.get("status", {}), body["status"])
        else:
            changed = _merge(live, body)
        return 200, live if changed == live else self._store(place, changed)

    def _delete(self, path: str, query: Mapping[str, str], body: Any, content_type: str) -> tuple[int, dict[str, Any]]:
        if path not in self.objects:
            return _failure(404, "NotFound", f"{path} not found")
        uid = (body.get("preconditions") or {}).get("uid")
        if uid and uid != self.objects[path]["metadata"]["uid"]:
            return _failure(409, "Conflict", "the UID in the precondition doesn't match")
        del self.objects[path]
        return 200, {"kind": "Status", "status": "Success"}

    def _store(self, path: str, obj: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        self.objects[path] = obj
        return obj

    def _new_uid(self) -> str:
        self._uid += 1
        return f"uid-{self._uid}"


def _kind_of(path: str) -> str:
    parts = path.removesuffix("/status").split("/")
    plurals = {kind.plural: kind.name for kind in KINDS.values()}
    return next((plurals[part] for part in reversed(parts) if part in plurals), path)


def _merge(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    merged = {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def _failure(code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details or {}}
