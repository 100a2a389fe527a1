"""What admission does to objects before they are stored.

Cluster IPs, service accounts and priorities of pods, the namespace an object goes into, and the readiness of a namespace's
first objects (``default`` ServiceAccount, ``kube-root-ca.crt``). Pods get no ``kube-api-access`` volume: containers
here carry the tokens they ask for by a projected volume.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from tightship.sandbox.plane.errors import ApiError, Cause, Obj, forbidden, invalid, not_found
from tightship.sandbox.plane.registry import Resource
from tightship.sandbox.plane.store import Store

SYSTEM_PRIORITIES = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}


class Admission:
    """The mutating and refusing steps, over one store.

    Args:
        service_cidr: where cluster IPs come from.
    """

    def __init__(self, store: Store, service_cidr: str) -> None:
        self.store = store
        self.services = ipaddress.ip_network(service_cidr)

    def admit(self, resource: Resource, obj: Obj, old: Obj | None) -> None:
        """Admits an object, changing it in place. Raises ApiError."""
        if old is None and resource.namespaced:
            self._namespace(resource, obj)
        if resource.custom or resource.group:
            return
        if resource.kind == "Pod" and old is None:
            self._pod(obj)
        elif resource.kind == "Service":
            self._service(obj, old)

    def _namespace(self, resource: Resource, obj: Obj) -> None:
        name = obj["metadata"]["namespace"]
        namespace = self.store.get(("", "namespaces"), "", name)
        if namespace is None:
            raise not_found("namespaces", "", name)
        if namespace["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {name} because it is being terminated"
            raise forbidden(resource.plural, resource.group, obj["metadata"]["name"], why)

    def _pod(self, pod: Obj) -> None:
        meta, spec = pod["metadata"], pod["spec"]
        account = spec["serviceAccountName"]
        if self.store.get(("", "serviceaccounts"), meta["namespace"], account) is None:
            why = (
                f'error looking up service account {meta["namespace"]}/{account}: serviceaccount "{account}" not found'
            )
            raise forbidden("pods", "", meta["name"], why)
        name = spec.get("priorityClassName")
        if name:
            spec["priority"] = self._priority(pod, name)

    def _priority(self, pod: Obj, name: str) -> int:
        if name in SYSTEM_PRIORITIES:
            return SYSTEM_PRIORITIES[name]
        found = self.store.get(("scheduling.k8s.io", "priorityclasses"), "", name)
        if found is None:
            raise forbidden("pods", "", pod["metadata"]["name"], f"no PriorityClass with name {name} was found")
        return int(found.get("value", 0))

    def _service(self, service: Obj, old: Obj | None) -> None:
        spec = service["spec"]
        if spec["type"] == "ExternalName":
            return
        if old is not None and not spec.get("clusterIP"):
            spec["clusterIP"] = old["spec"].get("clusterIP", "")
        if not spec.get("clusterIP"):
            spec["clusterIP"] = self._free_address()
        elif old is None and spec["clusterIP"] in self._used():
            cause = Cause(
                "invalid",
                "spec.clusterIPs",
                "failed to allocate IP: provided IP is already allocated",
                [spec["clusterIP"]],
            )
            raise invalid("Service", "", service["metadata"]["name"], [cause])
        spec["clusterIPs"] = [spec["clusterIP"]]

    def first_address(self) -> str:
        """The cluster IP that belongs to the API's own service."""
        return str(next(iter(self.services.hosts())))

    def _used(self) -> set[str]:
        return {service["spec"].get("clusterIP", "") for service in self.store.all(("", "services"))}

    def _free_address(self) -> str:
        used = self._used()
        for address in self._addresses():
            if address not in used:
                return address
        raise ApiError(500, "InternalError", f"no free cluster IP is left in {self.services}: widen the service CIDR")

    def _addresses(self) -> Iterator[str]:
        # The first addresses belong to the API's own service and to DNS, by custom.
        for index, address in enumerate(self.services.hosts()):
            if index >= 10:
                yield str(address)
