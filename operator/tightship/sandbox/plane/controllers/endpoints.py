"""Endpoints and EndpointSlices: where a Service's pods are, and which of them are ready."""

from __future__ import annotations

import json

from tightship.sandbox.plane.controllers.base import Controller, Mapper, own_key
from tightship.sandbox.plane.controllers.pods import is_finished, is_going, is_ready, template_hash
from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Change, Key, Storage
from tightship.sandbox.plane.values import copy, dig, is_controlled_by, key_of, owner_reference

_SERVICE = "kubernetes.io/service-name"
_MANAGED = "endpointslice.kubernetes.io/managed-by"


class Endpoints(Controller):
    """Reconciles the endpoints of Services that have a selector."""

    name = "endpoint-controller"

    def watches(self) -> dict[Storage, Mapper]:
        """Services, and the services whose selector a changed pod matches or matched."""

        def services(change: Change) -> list[Key]:
            states = [obj for obj in (change.object, change.old) if obj is not None]
            found = []
            for service in self.all("", "services", states[0]["metadata"]["namespace"]):
                if any(_selects(service, pod) for pod in states):
                    found.append(key_of(service))
            return found

        return {("", "services"): own_key, ("", "pods"): services}

    def reconcile(self, key: Key) -> float | None:
        """Writes both forms of a service's endpoints."""
        service = self.find("", "services", key)
        if service is None:
            endpoints = self.find("", "endpoints", key)
            if endpoints is not None:
                self.delete("", "endpoints", endpoints)
            return None
        if not service["spec"].get("selector") or service["metadata"].get("deletionTimestamp"):
            return None
        pods = [
            pod
            for pod in self.all("", "pods", key[0])
            if _selects(service, pod) and dig(pod, "status", "podIP") and not is_finished(pod)
        ]
        self._write_endpoints(service, pods)
        self._write_slices(service, pods)
        return None

    def _ports(self, service: Obj, pod: Obj) -> list[Obj]:
        found = []
        for port in service["spec"].get("ports") or []:
            target = port["targetPort"]
            number = target if isinstance(target, int) else _named_port(pod, target, port["protocol"])
            if number:
                entry = {"port": number, "protocol": port["protocol"]}
                if port.get("name"):
                    entry["name"] = port["name"]
                if port.get("appProtocol"):
                    entry["appProtocol"] = port["appProtocol"]
                found.append(entry)
        return found

    def _write_endpoints(self, service: Obj, pods: list[Obj]) -> None:
        always = bool(service["spec"].get("publishNotReadyAddresses"))
        groups: dict[str, Obj] = {}
        for pod in pods:
            if is_going(pod) and not always:
                continue
            ports = self._ports(service, pod)
            subset = groups.setdefault(json.dumps(ports), {"ports": ports})
            address = {"ip": pod["status"]["podIP"], "targetRef": _target(pod)}
            if pod["spec"].get("nodeName"):
                address["nodeName"] = pod["spec"]["nodeName"]
            subset.setdefault("addresses" if always or is_ready(pod) else "notReadyAddresses", []).append(address)
        subsets = [subset for _, subset in sorted(groups.items())]
        meta = service["metadata"]
        old = self.find("", "endpoints", key_of(service))
        labels = dict(meta.get("labels") or {})
        if old is None:
            named = {"name": meta["name"], "namespace": meta["namespace"], "labels": labels}
            self.create("", "endpoints", {"metadata": named, "subsets": subsets})
        elif (old.get("subsets") or []) != subsets or (old["metadata"].get("labels") or {}) != labels:

            def change(target: Obj) -> None:
                target["subsets"] = subsets
                target["metadata"]["labels"] = labels

            self.modify("", "endpoints", old, change)

    def _write_slices(self, service: Obj, pods: list[Obj]) -> None:
        meta = service["metadata"]
        old = {
            entry["metadata"]["name"]: entry
            for entry in self.all("discovery.k8s.io", "endpointslices", meta["namespace"])
            if is_controlled_by(entry, meta["uid"])
        }
        groups: dict[str, tuple[list[Obj], list[Obj]]] = {}
        for pod in pods:
            ports = self._ports(service, pod)
            groups.setdefault(json.dumps(ports), (ports, []))[1].append(self._endpoint(service, pod))
        if not groups:
            groups["[]"] = ([], [])
        for text, (ports, endpoints) in groups.items():
            name = f"{meta['name']}-{template_hash({'uid': meta['uid'], 'ports': text})[:5]}"
            self._write_slice(service, name, old.pop(name, None), [{"name": "", **port} for port in ports], endpoints)
        for left in old.values():
            self.delete("discovery.k8s.io", "endpointslices", left)

    def _endpoint(self, service: Obj, pod: Obj) -> Obj:
        ready, going = is_ready(pod), is_going(pod)
        shown = (ready and not going) or bool(service["spec"].get("publishNotReadyAddresses"))
        entry: Obj = {
            "addresses": [pod["status"]["podIP"]],
            "conditions": {"ready": shown, "serving": ready, "terminating": going},
            "targetRef": _target(pod),
        }
        if pod["spec"].get("nodeName"):
            entry["nodeName"] = pod["spec"]["nodeName"]
        if pod["spec"].get("hostname") and pod["spec"].get("subdomain") == service["metadata"]["name"]:
            entry["hostname"] = pod["spec"]["hostname"]
        return entry

    def _write_slice(self, service: Obj, name: str, old: Obj | None, ports: list[Obj], endpoints: list[Obj]) -> None:
        meta = service["metadata"]
        labels = {**(meta.get("labels") or {}), _SERVICE: meta["name"], _MANAGED: "endpointslice-controller.k8s.io"}
        body = {
            "metadata": {
                "name": name,
                "namespace": meta["namespace"],
                "labels": labels,
                "ownerReferences": [owner_reference(service)],
            },
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": endpoints,
        }
        if old is None:
            self.create("discovery.k8s.io", "endpointslices", body)
        elif (old.get("ports"), old.get("endpoints"), old["metadata"].get("labels")) != (ports, endpoints, labels):

            def change(target: Obj) -> None:
                target["ports"], target["endpoints"] = copy(ports), copy(endpoints)
                target["metadata"]["labels"] = labels

            self.modify("discovery.k8s.io", "endpointslices", old, change)


def _selects(service: Obj, pod: Obj) -> bool:
    selector, labels = service["spec"].get("selector"), pod["metadata"].get("labels") or {}
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _named_port(pod: Obj, name: str, protocol: str) -> int | None:
    for container in pod["spec"].get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == name and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _target(pod: Obj) -> Obj:
    meta = pod["metadata"]
    return {"kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]}
