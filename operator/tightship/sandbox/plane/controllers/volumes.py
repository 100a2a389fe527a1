"""Static binding of PersistentVolumeClaims to PersistentVolumes, and what becomes of a volume whose claim is gone."""

from __future__ import annotations

from tightship.api.units import exact_quantity
from tightship.sandbox.plane.controllers.base import Controller, Mapper
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.selectors import matches
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import copy, dig, key_of

_PASS: list[Key] = [("", "pass")]


class Volumes(Controller):
    """Binds claims to volumes: the smallest that fits."""

    name = "persistentvolume-binder"

    def watches(self) -> dict[Storage, Mapper]:
        """Both kinds: each change may make a pair."""

        def always(change: Change) -> list[Key]:
            return _PASS

        return {("", "persistentvolumeclaims"): always, ("", "persistentvolumes"): always}

    def reconcile(self, key: Key) -> float | None:
        """One pass over all volumes and claims."""
        for volume in self.all("", "persistentvolumes"):
            self._settle(volume)
        for claim in self.all("", "persistentvolumeclaims"):
            if dig(claim, "status", "phase") != "Bound" and not claim["metadata"].get("deletionTimestamp"):
                self._bind(claim)
        return None

    def _settle(self, volume: Obj) -> None:
        reference = volume["spec"].get("claimRef")
        phase = "Available"
        if reference:
            claim = self.find("", "persistentvolumeclaims", (reference["namespace"], reference["name"]))
            gone = claim is None or reference.get("uid") not in (None, claim["metadata"]["uid"])
            bound = claim is not None and claim["spec"].get("volumeName") == volume["metadata"]["name"]
            phase = "Bound" if bound else "Available"
            if gone and reference.get("uid"):
                if volume["spec"]["persistentVolumeReclaimPolicy"] == "Delete":
                    self.delete("", "persistentvolumes", volume)
                    return
                phase = "Released"
        if dig(volume, "status", "phase") != phase:
            self.set_status("", "persistentvolumes", volume, lambda status: status.update(phase=phase))

    def _bind(self, claim: Obj) -> None:
        fitting = [volume for volume in self.all("", "persistentvolumes") if self._fits(volume, claim)]
        if not fitting:
            return
        volume = min(fitting, key=lambda entry: exact_quantity(entry["spec"]["capacity"]["storage"]))
        meta = claim["metadata"]

        def take(target: Obj) -> None:
            target["spec"]["claimRef"] = {
                "kind": "PersistentVolumeClaim",
                "apiVersion": "v1",
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            }

        self.modify("", "persistentvolumes", volume, take)
        self.modify(
            "",
            "persistentvolumeclaims",
            claim,
            lambda target: target["spec"].update(volumeName=volume["metadata"]["name"]),
        )
        self.set_status("", "persistentvolumes", volume, lambda status: status.update(phase="Bound"))
        facts = {"phase": "Bound", "accessModes": copy(volume["spec"]["accessModes"])}
        facts["capacity"] = copy(volume["spec"]["capacity"])
        self.set_status("", "persistentvolumeclaims", claim, lambda status: status.update(facts))

    def _fits(self, volume: Obj, claim: Obj) -> bool:
        spec, wanted = volume["spec"], claim["spec"]
        reference = spec.get("claimRef")
        if reference:
            if (reference.get("namespace"), reference.get("name")) != key_of(claim):
                return False
            if reference.get("uid") not in (None, claim["metadata"]["uid"]):
                return False
        if wanted.get("volumeName") and wanted["volumeName"] != volume["metadata"]["name"]:
            return False
        if (wanted.get("storageClassName") or "") != (spec.get("storageClassName") or ""):
            return False
        if not set(wanted.get("accessModes") or []) <= set(spec.get("accessModes") or []):
            return False
        if wanted.get("selector") and not matches(wanted["selector"], volume["metadata"].get("labels")):
            return False
        asked = dig(wanted, "resources", "requests", "storage", default="0")
        return exact_quantity(spec["capacity"]["storage"]) >= exact_quantity(asked)
