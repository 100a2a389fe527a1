"""Discovery: which groups, versions and resources there are, in the legacy and the aggregated form."""

from __future__ import annotations

from tightship.sandbox.plane.errors import Obj, no_such_page
from tightship.sandbox.plane.registry import VERBS, Registry, Resource

AGGREGATED = "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
_LETTER = {True: "Namespaced", False: "Cluster"}


def _subresources(resource: Resource) -> list[tuple[str, str, str, list[str]]]:
    """(name, group/version, kind, verbs) of each subresource."""
    found = []
    if resource.status:
        found.append(("status", resource.api_version, resource.kind, ["get", "patch", "update"]))
    if resource.scale:
        found.append(("scale", "autoscaling/v1", "Scale", ["get", "patch", "update"]))
    if (resource.group, resource.kind) == ("", "Pod"):
        found += [
            ("binding", "v1", "Binding", ["create"]),
            ("eviction", "policy/v1", "Eviction", ["create"]),
            ("exec", "v1", "PodExecOptions", ["create", "get"]),
            ("log", "v1", "Pod", ["get"]),
        ]
    if (resource.group, resource.kind) == ("", "ServiceAccount"):
        found.append(("token", "authentication.k8s.io/v1", "TokenRequest", ["create"]))
    if (resource.group, resource.kind) == ("", "Service"):
        found.append(("proxy", "v1", "ServiceProxyOptions", ["create", "delete", "get", "patch", "update"]))
    if (resource.group, resource.kind) == ("", "Namespace"):
        found.append(("finalize", "v1", "Namespace", ["update"]))
    return found


def _split(api_version: str) -> Obj:
    group, _, version = api_version.rpartition("/")
    return {"group": group, "version": version}


def _verbs(resource: Resource) -> list[str]:
    return ["create"] if resource.virtual else list(VERBS)


def core_versions(address: str) -> Obj:
    """``/api``."""
    return {
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
    }


def group_list(registry: Registry) -> Obj:
    """``/apis``."""
    groups = [_group(name, versions) for name, versions in registry.groups().items() if name]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def group(registry: Registry, name: str) -> Obj:
    """``/apis/GROUP``. Raises ApiError 404."""
    versions = registry.groups().get(name)
    if not versions or not name:
        raise no_such_page()
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)}


def _group(name: str, versions: list[str]) -> Obj:
    entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": entries, "preferredVersion": entries[0]}


def resource_list(registry: Registry, name: str, version: str) -> Obj:
    """``/api/v1`` or ``/apis/GROUP/VERSION``. Raises ApiError 404."""
    found = [resource for resource in registry if (resource.group, resource.version) == (name, version)]
    if not found:
        raise no_such_page()
    entries = []
    for resource in found:
        entry: Obj = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": _verbs(resource),
        }
        if resource.short:
            entry["shortNames"] = list(resource.short)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        entries.append(entry)
        for sub, api_version, kind, verbs in _subresources(resource):
            extra = _split(api_version) if api_version != resource.api_version else {}
            entries.append(
                {
                    "name": f"{resource.plural}/{sub}",
                    "singularName": "",
                    "namespaced": resource.namespaced,
                    **extra,
                    "kind": kind,
                    "verbs": verbs,
                }
            )
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": found[0].api_version,
        "resources": sorted(entries, key=lambda entry: str(entry["name"])),
    }


def aggregated(registry: Registry, core: bool, version: str) -> Obj:
    """``/api`` or ``/apis`` in the form ``APIGroupDiscoveryList``."""
    items = []
    for name, versions in registry.groups().items():
        if core != (name == ""):
            continue
        entries = [_version(registry, name, entry) for entry in versions]
        items.append({"metadata": {"name": name} if name else {}, "versions": entries})
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{version}",
        "metadata": {},
        "items": items,
    }


def _version(registry: Registry, name: str, version: str) -> Obj:
    found = [resource for resource in registry if (resource.group, resource.version) == (name, version)]
    resources = []
    for resource in sorted(found, key=lambda entry: entry.plural):
        entry: Obj = {
            "resource": resource.plural,
            "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
            "scope": _LETTER[resource.namespaced],
            "singularResource": resource.singular,
            "verbs": _verbs(resource),
        }
        if resource.short:
            entry["shortNames"] = list(resource.short)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        subresources = [
            {"subresource": sub, "responseKind": {**_split(api_version), "kind": kind}, "verbs": verbs}
            for sub, api_version, kind, verbs in _subresources(resource)
        ]
        if subresources:
            entry["subresources"] = subresources
        resources.append(entry)
    return {"version": version, "resources": resources, "freshness": "Current"}
