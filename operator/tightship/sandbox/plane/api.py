"""The API's verbs on plain objects: what the HTTP server and the controllers both call.

Every write runs the same steps: decode, keep what this endpoint may not change, default, admit, validate, count the
generation, record owners of fields, store. All of it is synchronous: between two ``await``s of the process the store is
consistent, and no lock is needed.

Invariants: a write that changes nothing leaves ``resourceVersion`` as it is; ``generation`` moves only when something
other than metadata and status changed; the status endpoint changes only the status, and the main one never does.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tightship.sandbox.plane import apply as ssa
from tightship.sandbox.plane import cel, checks, defaults, errors, patches
from tightship.sandbox.plane.admission import Admission
from tightship.sandbox.plane.decode import Decoder, apply_defaults, prune
from tightship.sandbox.plane.errors import ApiError, Cause, Obj
from tightship.sandbox.plane.registry import Registry, Resource
from tightship.sandbox.plane.selectors import Labels, Predicate
from tightship.sandbox.plane.store import Store
from tightship.sandbox.plane.validation import validate
from tightship.sandbox.plane.values import copy, dig, now, random_suffix, stamp

_IDENTITY = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink")
# Whether a create may bring a status along: nodes register with theirs, and these kinds have no status endpoint.
_STATUS_ON_CREATE = {"Node", "PersistentVolume", "PersistentVolumeClaim"}


@dataclass(frozen=True)
class Options:
    """How a write is to be done.

    Attributes:
        manager: the field manager.
        validation: ``Strict``, ``Warn`` or ``Ignore`` unknown fields.
        force: whether a server-side apply takes over conflicting fields.
        subresource: ``""``, ``status``, or what else the write came through.
    """

    manager: str = "tightship-plane"
    dry_run: bool = False
    validation: str = "Ignore"
    force: bool = False
    subresource: str = ""
    warn: Callable[[str], None] = field(default=lambda _text: None)


@dataclass(frozen=True)
class DeleteOptions:
    """How a deletion is to be done; None means the kind's default."""

    grace: int | None = None
    policy: str | None = None
    uid: str | None = None
    version: str | None = None
    dry_run: bool = False


@dataclass
class Page:
    """One page of a list."""

    items: list[Obj]
    version: str
    token: str = ""
    remaining: int | None = None


SYSTEM = Options()


class _Zero:
    """How the server shows a resourceVersion that was not given."""

    def __str__(self) -> str:
        return "0x0"


_ZERO = _Zero()


class Api:
    """All verbs on all resources of one store."""

    def __init__(self, registry: Registry, store: Store, admission: Admission) -> None:
        self.registry, self.store, self.admission = registry, store, admission

    # Reading

    def get(self, resource: Resource, namespace: str, name: str) -> Obj:
        """One object in the resource's version. Raises ApiError 404."""
        return self.present(resource, self._stored(resource, namespace, name))

    def find(self, resource: Resource, namespace: str, name: str) -> Obj | None:
        """One object, or None."""
        stored = self.store.get(resource.storage, namespace, name)
        return None if stored is None else self.present(resource, stored)

    def all(self, resource: Resource, namespace: str = "") -> list[Obj]:
        """All objects of a kind, of one namespace when given."""
        return [self.present(resource, stored) for stored in self.store.all(resource.storage, namespace)]

    def page(
        self,
        resource: Resource,
        namespace: str,
        labels: Callable[[Labels], bool],
        fields: Predicate,
        *,
        limit: int = 0,
        token: str = "",
    ) -> Page:
        """One page of the objects that both selectors select. Raises ApiError 410 for a token that is too old."""
        version, start = self.store.version, ("", "")
        if token:
            version, start = self._read_token(token)
        found = []
        for stored in self.store.all(resource.storage, namespace):
            meta = stored["metadata"]
            if token and (meta.get("namespace") or "", meta["name"]) <= start:
                continue
            obj = self.present(resource, stored)
            if labels(meta.get("labels") or {}) and fields(obj):
                found.append(obj)
        if not limit or len(found) <= limit:
            return Page(found, str(version))
        last = found[limit - 1]["metadata"]
        content = json.dumps({"rv": version, "ns": last.get("namespace") or "", "name": last["name"]})
        return Page(
            found[:limit], str(version), base64.urlsafe_b64encode(content.encode()).decode(), len(found) - limit
        )

    def _read_token(self, token: str) -> tuple[int, tuple[str, str]]:
        try:
            content = json.loads(base64.urlsafe_b64decode(token))
            return int(content["rv"]), (content["ns"], content["name"])
        except (ValueError, KeyError, TypeError) as error:
            raise errors.bad_request(f"continue key is not valid: {error}") from error

    def present(self, resource: Resource, stored: Obj) -> Obj:
        """A stored object as the resource's version shows it."""
        if resource.group == "events.k8s.io":
            return defaults.event_from_core(stored)
        if stored.get("apiVersion") == resource.api_version and stored.get("kind") == resource.kind:
            return stored
        return {**stored, "apiVersion": resource.api_version, "kind": resource.kind}

    def _stored(self, resource: Resource, namespace: str, name: str) -> Obj:
        found = self.store.get(resource.storage, namespace, name)
        if found is None:
            raise errors.not_found(resource.plural, resource.group, name)
        return found

    # Writing

    def create(self, resource: Resource, namespace: str, body: Obj, options: Options = SYSTEM) -> Obj:
        """Creates an object. Raises ApiError 409 where the name is taken, 422 where it is invalid."""
        obj = self._decode(resource, body, options)
        meta = obj.setdefault("metadata", {})
        self._place(resource, meta, namespace)
        if not meta.get("name"):
            if not meta.get("generateName"):
                cause = Cause("required", "metadata.name", "name or generateName is required")
                raise errors.invalid(resource.kind, resource.group, "", [cause])
            meta["name"] = meta["generateName"] + random_suffix()
        for name in ("resourceVersion", "managedFields", *_IDENTITY):
            meta.pop(name, None)
        return self._insert(resource, obj, options)

    def _insert(self, resource: Resource, obj: Obj, options: Options, operation: str = "Update") -> Obj:
        meta = obj["metadata"]
        if self.store.get(resource.storage, meta.get("namespace") or "", meta["name"]) is not None:
            raise errors.already_exists(resource.plural, resource.group, meta["name"])
        meta["uid"], meta["creationTimestamp"] = str(uuid.uuid4()), stamp()
        if resource.generation:
            meta["generation"] = 1
        if resource.status and resource.kind not in _STATUS_ON_CREATE:
            obj.pop("status", None)
        self._complete(resource, obj, None)
        if operation != "Apply":
            self._own_new(resource, obj, options)
        if options.dry_run:
            return obj
        return self.present(resource, self.store.put(resource.storage, self._to_storage(resource, obj)))

    def _own_new(self, resource: Resource, obj: Obj, options: Options) -> None:
        # The first status is the system's; nobody has written it.
        seen = {key: value for key, value in obj.items() if key != "status" or resource.kind in _STATUS_ON_CREATE}
        ssa.track_update(resource.node, None, seen, self._manager(resource, options, "Update"))

    def update(self, resource: Resource, namespace: str, name: str, body: Obj, options: Options = SYSTEM) -> Obj:
        """Replaces an object. Raises ApiError 404, 409 on a stale version, 422."""
        new = self._decode(resource, body, options)
        meta = new.setdefault("metadata", {})
        if meta.get("name", name) != name:
            message = f"the name of the object ({meta.get('name')}) does not match the name on the URL ({name})"
            raise errors.bad_request(message)
        meta["name"] = name
        self._place(resource, meta, namespace)
        old = self.get(resource, namespace, name)
        if resource.custom and not meta.get("resourceVersion"):
            cause = Cause("invalid", "metadata.resourceVersion", "must be specified for an update", _ZERO)
            raise errors.invalid(resource.plural, resource.group, name, [cause])
        return self._replace(resource, old, new, options)

    def modify(
        self, resource: Resource, namespace: str, name: str, change: Callable[[Obj], None], options: Options = SYSTEM
    ) -> Obj:
        """Changes a copy of the object by a function and stores it: how controllers write."""
        old = self.get(resource, namespace, name)
        new = copy(old)
        change(new)
        return self._replace(resource, old, new, options)

    def patch(
        self, resource: Resource, namespace: str, name: str, kind: str, body: Any, *, options: Options = SYSTEM
    ) -> tuple[Obj, bool]:
        """Patches an object; ``kind`` is ``json``, ``merge``, ``strategic`` or ``apply``.

        Returns the object and whether it was created (by a server-side apply).
        """
        if kind == "apply":
            return self._apply(resource, namespace, name, body, options)
        old = self.get(resource, namespace, name)
        if kind == "json":
            new = patches.json_patch(old, body)
        elif not isinstance(body, dict):
            raise errors.bad_request("a merge patch must be an object")
        elif kind == "merge":
            new = patches.merge_patch(old, body)
        elif resource.custom:
            raise errors.unsupported_media(
                "application/strategic-merge-patch+json",
                "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            )
        else:
            new = patches.strategic_patch(resource.node, old, body)
        decoded = self._decode(resource, new, options)
        decoded.setdefault("metadata", {})
        return self._replace(resource, old, decoded, options), False

    def _apply(self, resource: Resource, namespace: str, name: str, body: Any, options: Options) -> tuple[Obj, bool]:
        config = self._read_config(resource, namespace, name, body, options)
        old = self.find(resource, namespace, name)
        if old is None and options.subresource:
            raise errors.not_found(resource.plural, resource.group, name)
        wanted = config["metadata"].get("uid")
        if wanted and (old is None or old["metadata"]["uid"] != wanted):
            why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: "
            raise errors.conflict(resource.plural, resource.group, name, why + dig(old, "metadata", "uid", default=""))
        manager = self._manager(resource, options, "Apply")
        merged = ssa.apply(resource.node, old, config, manager, options.force)
        if old is None:
            return self._insert(resource, merged, options, "Apply"), True
        quiet = Options(options.manager, options.dry_run, "Ignore", options.force, options.subresource)
        return self._replace(resource, old, merged, quiet, tracked=True), False

    def _read_config(self, resource: Resource, namespace: str, name: str, body: Any, options: Options) -> Obj:
        if not isinstance(body, dict):
            raise errors.bad_request("an apply configuration must be an object")
        if dig(body, "metadata", "managedFields"):
            raise errors.bad_request("metadata.managedFields must be nil")
        meta = body.get("metadata") or {}
        if meta.get("name", name) != name:
            raise errors.bad_request(f"metadata.name ({meta['name']}) does not match the name on the URL ({name})")
        unknown: list[str] = []
        config = self._decode(resource, body, Options(), unknown, defaulting=False)
        if unknown:
            where = f"{namespace}/{name}; {resource.api_version}, Kind={resource.kind}"
            listed = ", ".join(f".{path}: field not declared in schema" for path in unknown)
            raise ApiError(500, "InternalError", f"failed to create typed patch object ({where}): {listed}")
        config.setdefault("metadata", {})["name"] = name
        self._place(resource, config["metadata"], namespace)
        if options.subresource == "status":
            config = {key: config[key] for key in ("apiVersion", "kind", "metadata", "status") if key in config}
            config["metadata"] = {
                key: value
                for key, value in config["metadata"].items()
                if key in ("name", "namespace", "uid", "resourceVersion")
            }
        elif resource.status and resource.kind != "Node":
            config.pop("status", None)
        return config

    def _manager(self, resource: Resource, options: Options, operation: str) -> ssa.Manager:
        return ssa.Manager(options.manager, operation, resource.api_version, options.subresource)

    def _place(self, resource: Resource, meta: Obj, namespace: str) -> None:
        if not resource.namespaced:
            meta.pop("namespace", None)
            return
        if meta.setdefault("namespace", namespace) != namespace:
            raise errors.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )

    def _decode(
        self,
        resource: Resource,
        body: Any,
        options: Options,
        unknown: list[str] | None = None,
        defaulting: bool = True,
    ) -> Obj:
        if not isinstance(body, dict):
            raise errors.bad_request(
                f"the object provided is unrecognized: it must be a JSON object of kind {resource.kind}"
            )
        for name, expected, label in (
            ("apiVersion", resource.api_version, "API version"),
            ("kind", resource.kind, "kind"),
        ):
            if body.get(name, expected) != expected:
                raise errors.bad_request(
                    f"the {label} in the data ({body[name]}) does not match the expected {label} ({expected})"
                )
        decoder = Decoder(resource.kind, resource.version)
        if resource.custom:
            obj = copy(body)
            if isinstance(obj.get("metadata"), dict):
                obj["metadata"] = decoder.decode(self.registry.meta, obj["metadata"], "metadata")
            decoder.unknown += prune(resource.node, obj)
            if defaulting:
                apply_defaults(resource.node, obj)
        else:
            obj = decoder.decode(resource.node, body)
        obj["apiVersion"], obj["kind"] = resource.api_version, resource.kind
        if unknown is not None:
            unknown += decoder.unknown
        self._report_unknown(resource, decoder.unknown, options)
        return dict(obj)

    def _report_unknown(self, resource: Resource, unknown: list[str], options: Options) -> None:
        if not unknown or options.validation == "Ignore":
            return
        texts = [f'unknown field "{path}"' for path in unknown]
        if options.validation == "Strict":
            head = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
            raise errors.bad_request(head + "strict decoding error: " + ", ".join(texts))
        for text in texts:
            options.warn(text)

    def _complete(self, resource: Resource, obj: Obj, old: Obj | None) -> None:
        if resource.custom:
            apply_defaults(resource.node, obj)
        elif resource.group == "events.k8s.io":
            pass
        else:
            defaults.fill_in(obj)
        self.admission.admit(resource, obj, old)
        causes = self._causes(resource, obj, old)
        if causes:
            kind, group = resource.kind, resource.group
            raise errors.invalid(kind, group, obj["metadata"].get("name", ""), causes)

    def _causes(self, resource: Resource, obj: Obj, old: Obj | None) -> list[Cause]:
        if not resource.custom:
            found = checks.check(resource.node, obj)
            return found + (checks.check_update(old, obj) if old else [])
        causes = [*checks.check_metadata(obj), *validate(resource.node, obj)]
        # Rules assume the types that the schema promises.
        return causes or cel.check_rules(resource.node, obj, old)

    def _replace(self, resource: Resource, old: Obj, new: Obj, options: Options, tracked: bool = False) -> Obj:
        meta, before = new["metadata"], old["metadata"]
        asked = meta.get("resourceVersion")
        if asked and asked != before["resourceVersion"]:
            raise errors.conflict(resource.plural, resource.group, before["name"])
        if meta.get("uid") and meta["uid"] != before["uid"]:
            why = f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: {before['uid']}"
            raise errors.conflict(resource.plural, resource.group, before["name"], why)
        new = self._isolate(resource, old, new, options.subresource)
        meta = new["metadata"]
        for name in ("name", "namespace", "generateName", *_IDENTITY):
            meta.pop(name, None)
            if name in before:
                meta[name] = before[name]
        meta["resourceVersion"] = before["resourceVersion"]
        self._complete(resource, new, old)
        # A binding is the system's own write: it neither counts as a change of the spec nor owns a field.
        binding = options.subresource == "binding"
        if resource.generation and not binding and self._written(resource, new) != self._written(resource, old):
            meta["generation"] = before.get("generation", 0) + 1
        if not tracked and not binding:
            ssa.track_update(resource.node, old, new, self._manager(resource, options, "Update"))
        if new == old or options.dry_run:
            return new
        stored = self._to_storage(resource, new)
        if meta.get("deletionTimestamp") and not meta.get("finalizers") and not self._waits(resource, stored):
            return self.present(resource, self.store.remove(resource.storage, stored))
        return self.present(resource, self.store.put(resource.storage, stored))

    def _waits(self, resource: Resource, obj: Obj) -> bool:
        if resource.kind == "Namespace":
            return bool(dig(obj, "spec", "finalizers"))
        return resource.kind == "Pod" and bool(obj["metadata"].get("deletionGracePeriodSeconds"))

    def _isolate(self, resource: Resource, old: Obj, new: Obj, subresource: str) -> Obj:
        if not resource.status:
            return new
        if subresource == "status":
            meta = dict(old["metadata"])
            names = ("managedFields",) if resource.custom else ("managedFields", "labels", "annotations", "finalizers")
            for name in names:
                meta.pop(name, None)
                if name in new["metadata"]:
                    meta[name] = new["metadata"][name]
            out = {**old, "metadata": meta}
            out.pop("status", None)
            return {**out, "status": new["status"]} if "status" in new else out
        if subresource:
            return new
        out = {key: value for key, value in new.items() if key != "status"}
        return {**out, "status": old["status"]} if "status" in old else out

    def _written(self, resource: Resource, obj: Obj) -> Obj:
        hidden = {"metadata", "apiVersion", "kind"} | ({"status"} if resource.status else set())
        return {key: value for key, value in obj.items() if key not in hidden}

    def _to_storage(self, resource: Resource, obj: Obj) -> Obj:
        if resource.group == "events.k8s.io":
            obj = defaults.event_to_core(obj)
            defaults.fill_in(obj)
            return obj
        kept = self.registry.stored_as(resource.storage)
        return obj if kept is None else {**obj, "apiVersion": kept.api_version}

    # Deleting

    def delete(
        self, resource: Resource, namespace: str, name: str, options: DeleteOptions | None = None
    ) -> tuple[Obj, bool]:
        """Deletes an object, or begins to: returns it, and whether it is gone.

        Finalizers, a propagation policy that needs the garbage collector, and a pod's grace period keep it for a while.
        """
        options = options or DeleteOptions()
        old = self._stored(resource, namespace, name)
        self._check_preconditions(resource, old, options)
        new = copy(old)
        meta = new["metadata"]
        self._set_policy(resource, meta, options)
        grace = self._grace(resource, old, options)
        already = meta.get("deletionTimestamp")
        if not already or grace < (meta.get("deletionGracePeriodSeconds") or 0):
            meta["deletionTimestamp"] = stamp(now() + timedelta(seconds=grace))
            meta["deletionGracePeriodSeconds"] = grace
            if "generation" in meta and not already:
                meta["generation"] += 1
        if resource.kind == "Namespace":
            new["status"] = {**(new.get("status") or {}), "phase": "Terminating"}
        if options.dry_run:
            return self.present(resource, new), not meta.get("finalizers")
        if meta.get("finalizers") or self._waits(resource, new):
            return self.present(resource, self.store.put(resource.storage, new) if new != old else old), False
        return self.present(resource, self.store.remove(resource.storage, new)), True

    def _check_preconditions(self, resource: Resource, old: Obj, options: DeleteOptions) -> None:
        meta = old["metadata"]
        for label, wanted, found in (
            ("UID", options.uid, meta["uid"]),
            ("ResourceVersion", options.version, meta["resourceVersion"]),
        ):
            if wanted and wanted != found:
                why = f"Precondition failed: {label} in precondition: {wanted}, {label} in object meta: {found}"
                raise errors.conflict(resource.plural, resource.group, meta["name"], why)

    def _set_policy(self, resource: Resource, meta: Obj, options: DeleteOptions) -> None:
        wanted = {"Foreground": "foregroundDeletion", "Orphan": "orphan"}.get(options.policy or "")
        if options.policy is None:
            return
        kept = [name for name in meta.get("finalizers") or [] if name not in ("foregroundDeletion", "orphan")]
        meta["finalizers"] = [*kept, wanted] if wanted else kept
        if not meta["finalizers"]:
            del meta["finalizers"]

    def _grace(self, resource: Resource, old: Obj, options: DeleteOptions) -> int:
        if resource.kind != "Pod" or resource.group:
            return 0
        if not dig(old, "spec", "nodeName") or dig(old, "status", "phase") in ("Succeeded", "Failed"):
            return 0
        if options.grace is not None:
            return max(0, options.grace)
        return int(old["spec"].get("terminationGracePeriodSeconds", 30))

    # Scale

    def scale_of(self, resource: Resource, obj: Obj) -> Obj:
        """The ``autoscaling/v1`` Scale of an object."""
        meta = {
            key: value
            for key, value in obj["metadata"].items()
            if key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        }
        spec_path, status_path = (resource.scale[f"{part}ReplicasPath"].split(".")[1:] for part in ("spec", "status"))
        status: Obj = {"replicas": dig(obj, *status_path, default=0)}
        selector_path = resource.scale.get("labelSelectorPath")
        if selector_path:
            status["selector"] = dig(obj, *selector_path.split(".")[1:], default="")
        elif not resource.custom:
            labels = dig(obj, "spec", "selector", "matchLabels", default={})
            status["selector"] = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        return {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": meta,
            "spec": {"replicas": dig(obj, *spec_path, default=0)},
            "status": status,
        }

    def set_scale(self, resource: Resource, namespace: str, name: str, scale: Obj, options: Options) -> Obj:
        """Writes ``spec.replicas`` of a Scale into its object; returns the new Scale."""
        replicas = dig(scale, "spec", "replicas", default=0)
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 0:
            cause = Cause("invalid", "spec.replicas", "must be greater than or equal to 0", replicas)
            raise errors.invalid("Scale", "autoscaling", name, [cause])
        path = resource.scale["specReplicasPath"].split(".")[1:]

        def change(obj: Obj) -> None:
            version = dig(scale, "metadata", "resourceVersion")
            if version:
                obj["metadata"]["resourceVersion"] = version
            target = obj
            for part in path[:-1]:
                target = target.setdefault(part, {})
            target[path[-1]] = replicas

        old = self.get(resource, namespace, name)
        new = copy(old)
        change(new)
        # The scale endpoint writes the spec, so the main endpoint's isolation of the status applies.
        written = self._replace(resource, old, new, Options(options.manager, options.dry_run))
        return self.scale_of(resource, written)
