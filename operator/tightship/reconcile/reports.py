"""What replicas of packs without a holder told of the GPU they got: their init container's termination message. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tightship.api import units
from tightship.api.v1alpha1.gpupack import PackGPU, PackPreflight
from tightship.kube.store import Object
from tightship.manifests.claims import REPORT_CONTAINER, product_of


@dataclass(frozen=True)
class Report:
    """The GPU that CUDA showed a replica: `total` and `free` bytes; `mps` whether its contexts go through MPS (None: not told)."""

    uuid: str
    name: str
    total: int
    free: int
    mps: bool | None

    def as_preflight(self) -> PackPreflight:
        """The same as a replica's line in the pack's status has it."""
        total, free = units.format_quantity(self.total), units.format_quantity(self.free)
        return PackPreflight(uuid=self.uuid, total=total, free=free)

    def as_pack_gpu(self) -> PackGPU:
        """The same as a pack's status has it."""
        return PackGPU(uuid=self.uuid, product=product_of(self.name) or None, memory=units.format_quantity(self.total))


def of(pods: Iterable[Object]) -> dict[str, Report]:
    """The reports of those pods that have made one, by the pod's UID."""
    found = {str(pod["metadata"]["uid"]): _report(pod) for pod in pods}
    return {uid: report for uid, report in found.items() if report is not None}


def strayed(pods: Iterable[Object], uuid: str | None) -> list[tuple[str, str]]:
    """Pods of one pack that see another GPU than `uuid` (None: than the first that has told), each with the UUID that it sees."""
    told = [(str(pod["metadata"]["name"]), report) for pod in pods if (report := _report(pod)) is not None]
    right = uuid or next((report.uuid for _, report in told), "")
    return [(name, report.uuid) for name, report in told if report.uuid.lower() != right.lower()]


def _report(pod: Object) -> Report | None:
    statuses = (pod.get("status") or {}).get("initContainerStatuses") or []
    ended = next(
        ((each.get("state") or {}).get("terminated") for each in statuses if each["name"] == REPORT_CONTAINER), None
    )
    if not ended or ended.get("exitCode"):
        return None
    try:
        said: Any = json.loads(ended.get("message") or "")
        if not isinstance(said, Mapping) or not said.get("uuid"):
            return None
        mps = said.get("mps")
        return Report(
            str(said["uuid"]),
            str(said.get("name") or ""),
            int(said["total"]),
            int(said["free"]),
            None if mps is None else bool(mps),
        )
    except (ValueError, LookupError, TypeError):
        return None
