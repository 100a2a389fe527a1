"""The HTTP face of the plane: Kubernetes paths, verbs, media types and streams over :class:`~.api.Api`.

Nothing is decided here. A request becomes a call of the API, and the result (or an ``ApiError``) a response in the form
that the Accept header asks for: the object, a Table, or its metadata.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from aiohttp import web

from tightship.sandbox.plane import discovery, errors, patches, protobuf, tables
from tightship.sandbox.plane.api import Api, DeleteOptions, Options
from tightship.sandbox.plane.errors import ApiError, Obj
from tightship.sandbox.plane.openapi import EMPTY_V2, PROTOBUF_V2, OpenApi
from tightship.sandbox.plane.proxy import Proxy
from tightship.sandbox.plane.registry import Resource
from tightship.sandbox.plane.selectors import matches, parse_fields, parse_labels
from tightship.sandbox.plane.store import Change
from tightship.sandbox.plane.tokens import ADMIN, ISSUER, Tokens, User
from tightship.sandbox.plane.values import dig, set_condition, stamp

log = logging.getLogger(__name__)

VERSION = {
    "major": "1",
    "minor": "36",
    "emulationMajor": "1",
    "emulationMinor": "36",
    "minCompatibilityMajor": "1",
    "minCompatibilityMinor": "35",
    "gitVersion": "v1.36.0+tightship",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2026-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}
_PATCH_KINDS = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
    "application/apply-patch+json": "apply",
}
_BOOKMARK_PERIOD = 45.0
_MAX_BODY = 32 * 2**20


class _PlainLoader(yaml.SafeLoader):
    """YAML without timestamps: a time in a manifest is a string."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class _Target:
    """What a path names."""

    resource: Resource
    namespace: str
    name: str
    subresource: str
    rest: str


class Server:
    """Serves one API over HTTP."""

    def __init__(self, api: Api, tokens: Tokens, proxy: Proxy) -> None:
        self.api, self.tokens, self.proxy = api, tokens, proxy
        self.openapi = OpenApi(api.registry)
        self._streams: set[asyncio.Task[Any]] = set()
        self.address = ""

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    def end_streams(self) -> None:
        """Ends all watches: a server that stops must not wait for them."""
        for task in list(self._streams):
            task.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        warnings: list[str] = []
        try:
            response = await self._route(request, warnings)
        except ApiError as error:
            response = _json(error.body, error.code)
            if error.code == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
            failure = errors.bad_request(f"the body of the request can't be read: {error}")
            response = _json(failure.body, failure.code)
        except Exception as error:
            if isinstance(error, (ConnectionError, web.HTTPException)):
                raise
            log.exception("%s %s failed", request.method, request.path_qs)
            failure = ApiError(500, "InternalError", f"Internal error occurred: {type(error).__name__}: {error}")
            response = _json(failure.body, failure.code)
        if not response.prepared:
            for text in dict.fromkeys(warnings):
                response.headers.add("Warning", '299 - "' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
        return response

    async def _route(self, request: web.Request, warnings: list[str]) -> web.StreamResponse:
        user = self._user(request)
        parts = [part for part in request.path.split("/") if part]
        if not parts:
            return _json(
                {"paths": ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"]}
            )
        head = parts[0]
        if head in ("healthz", "livez", "readyz"):
            return web.Response(text="ok")
        if head == "version":
            return _json(VERSION)
        if head == "openapi":
            return self._openapi(request, parts)
        if head == "api" and len(parts) <= 2:
            return self._discover(request, parts)
        if head == "apis" and len(parts) <= 3:
            return self._discover(request, parts)
        target = self._target(parts)
        return await self._serve(request, target, user, warnings)

    def _user(self, request: web.Request) -> User:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            return ADMIN
        user = self.tokens.verify(token.strip())
        if user is None:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return user

    # Discovery

    def _discover(self, request: web.Request, parts: list[str]) -> web.Response:
        registry = self.api.registry
        if len(parts) == 1:
            accept = request.headers.get("Accept", "")
            for version in ("v2", "v2beta1"):
                media = discovery.AGGREGATED.format(version=version)
                if any(media in option.replace(" ", "") for option in accept.split(",")):
                    response = _json(discovery.aggregated(registry, parts[0] == "api", version))
                    response.headers["Content-Type"] = media
                    return response
            if parts[0] == "api":
                return _json(discovery.core_versions(self.address))
            return _json(discovery.group_list(registry))
        if parts[0] == "api":
            return _json(discovery.resource_list(registry, "", parts[1]))
        if len(parts) == 2:
            return _json(discovery.group(registry, parts[1]))
        return _json(discovery.resource_list(registry, parts[1], parts[2]))

    def _openapi(self, request: web.Request, parts: list[str]) -> web.Response:
        if parts[1:] == ["v3"]:
            return _json(self.openapi.index())
        if parts[1:] == ["v2"] and PROTOBUF_V2 in request.headers.get("Accept", ""):
            return web.Response(body=EMPTY_V2, headers={"Content-Type": PROTOBUF_V2.replace("@", ".")})
        if parts[1:] == ["v2"]:
            return web.Response(body=self.openapi.version2(), content_type="application/json")
        if len(parts) > 2 and parts[1] == "v3":
            return web.Response(body=self.openapi.document("/".join(parts[2:])), content_type="application/json")
        raise errors.no_such_page()

    # Objects

    def _target(self, parts: list[str]) -> _Target:
        group, rest = ("", parts[1:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[2:])
        if parts[0] not in ("api", "apis") or len(rest) < 2:
            raise errors.no_such_page()
        version, rest = rest[0], rest[1:]
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and self.api.registry.find(group, version, rest[2]) is not None:
            namespace, rest = rest[1], rest[2:]
        resource = self.api.registry.find(group, version, rest[0])
        if resource is None or (namespace and not resource.namespaced):
            raise errors.no_such_page()
        name = rest[1] if len(rest) > 1 else ""
        if name and resource.namespaced and not namespace:
            raise errors.no_such_page()
        return _Target(resource, namespace, name, rest[2] if len(rest) > 2 else "", "/".join(rest[3:]))

    async def _serve(
        self, request: web.Request, target: _Target, user: User, warnings: list[str]
    ) -> web.StreamResponse:
        if target.resource.virtual:
            return self._review(target.resource, await _body(request), user)
        options = self._options(request, target, warnings)
        if target.subresource not in ("", "status"):
            return await self._subresource(request, target, options)
        if target.subresource == "status" and not target.resource.status:
            raise errors.no_such_page()
        method = request.method
        if not target.name:
            if method == "GET":
                return await self._collection(request, target)
            if method == "POST":
                made = self.api.create(target.resource, target.namespace, await _body(request), options)
                return self._present(request, target.resource, made, 201)
            if method == "DELETE":
                return await self._delete_collection(request, target)
            raise errors.method_not_allowed()
        where = (target.resource, target.namespace, target.name)
        if method == "GET":
            if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, target)
            return self._present(request, target.resource, self.api.get(*where))
        if method == "PUT":
            return self._present(request, target.resource, self.api.update(*where, await _body(request), options))
        if method == "PATCH":
            kind, body = await self._patch_body(request, options)
            changed, created = self.api.patch(*where, kind, body, options=options)
            return self._present(request, target.resource, changed, 201 if created else 200)
        if method == "DELETE" and not target.subresource:
            return await self._delete(request, target)
        raise errors.method_not_allowed()

    def _options(self, request: web.Request, target: _Target, warnings: list[str]) -> Options:
        query = request.query
        dry = query.getall("dryRun", [])
        if any(value not in ("", "All") for value in dry):
            raise errors.bad_request(f'dryRun: Unsupported value: {dry}: supported values: "All"')
        agent = request.headers.get("User-Agent", "unknown").split("/")[0].split(" ")[0]
        validation = query.get("fieldValidation") or "Warn"
        if validation not in ("Ignore", "Warn", "Strict"):
            raise errors.bad_request(f'fieldValidation: Unsupported value: "{validation}"')
        return Options(
            manager=query.get("fieldManager") or agent,
            dry_run="All" in dry,
            validation=validation,
            force=query.get("force") in ("1", "true"),
            subresource=target.subresource,
            warn=warnings.append,
        )

    async def _patch_body(self, request: web.Request, options: Options) -> tuple[str, Any]:
        kind = _PATCH_KINDS.get(request.content_type)
        if kind is None:
            raise errors.unsupported_media(request.content_type, ", ".join(_PATCH_KINDS))
        if kind == "apply" and not request.query.get("fieldManager"):
            cause = errors.Cause("required", "fieldManager", "is required for apply patch")
            raise errors.invalid("PatchOptions", "meta.k8s.io", "", [cause])
        return kind, await _body(request)

    def _present(self, request: web.Request, resource: Resource, obj: Obj, code: int = 200) -> web.Response:
        form = _form(request)
        if form == "Table":
            include = request.query.get("includeObject", "Metadata")
            meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            return _json(tables.table(resource, [obj], meta, include), code)
        if form == "PartialObjectMetadata":
            return _json(tables.partial(obj), code)
        return _json(obj, code)

    async def _collection(self, request: web.Request, target: _Target) -> web.StreamResponse:
        if request.query.get("watch") in ("1", "true"):
            return await self._watch(request, target)
        resource, query = target.resource, request.query
        page = self.api.page(
            resource,
            target.namespace,
            parse_labels(query.get("labelSelector", "")),
            parse_fields(query.get("fieldSelector", ""), resource.kind, resource.selectable),
            limit=int(query.get("limit") or 0),
            token=query.get("continue", ""),
        )
        meta: Obj = {"resourceVersion": page.version}
        if page.token:
            meta["continue"] = page.token
            meta["remainingItemCount"] = page.remaining
        form = _form(request)
        if form == "Table":
            return _json(tables.table(resource, page.items, meta, query.get("includeObject", "Metadata")))
        if form == "PartialObjectMetadataList":
            items = [tables.partial(item) for item in page.items]
            return _json({"kind": form, "apiVersion": "meta.k8s.io/v1", "metadata": meta, "items": items})
        body = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": meta}
        return _json({**body, "items": page.items})

    # Watching

    async def _watch(self, request: web.Request, target: _Target) -> web.StreamResponse:
        stream = _Watch(self.api, request, target)
        # Raises before the response begins, so a stale version is an ordinary 410.
        stream.begin()
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        )
        response.enable_chunked_encoding()
        task = asyncio.current_task()
        if task is not None:
            self._streams.add(task)
        try:
            await response.prepare(request)
            await stream.run(response)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            stream.end()
            if task is not None:
                self._streams.discard(task)
        return response

    # Deleting

    async def _delete_options(self, request: web.Request) -> DeleteOptions:
        body = await _body(request) if request.can_read_body else {}
        body = body if isinstance(body, dict) else {}
        query = request.query
        grace = query.get("gracePeriodSeconds", body.get("gracePeriodSeconds"))
        policy = query.get("propagationPolicy") or body.get("propagationPolicy")
        orphan = query.get("orphanDependents", body.get("orphanDependents"))
        if policy is None and orphan is not None:
            policy = "Orphan" if orphan in (True, "true", "1") else "Background"
        if policy not in (None, "Background", "Foreground", "Orphan"):
            raise errors.bad_request(f'propagationPolicy: Unsupported value: "{policy}"')
        conditions = body.get("preconditions") or {}
        return DeleteOptions(
            grace=None if grace is None else int(grace),
            policy=policy,
            uid=conditions.get("uid"),
            version=conditions.get("resourceVersion"),
            dry_run="All" in [*query.getall("dryRun", []), *(body.get("dryRun") or [])],
        )

    async def _delete(self, request: web.Request, target: _Target) -> web.Response:
        options = await self._delete_options(request)
        resource = target.resource
        obj, gone = self.api.delete(resource, target.namespace, target.name, options)
        if not gone or resource.kind == "Pod":
            return self._present(request, resource, obj)
        details: Obj = {"name": target.name, "kind": resource.plural, "uid": obj["metadata"]["uid"]}
        if resource.group:
            details["group"] = resource.group
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})

    async def _delete_collection(self, request: web.Request, target: _Target) -> web.Response:
        options = await self._delete_options(request)
        resource = target.resource
        page = self.api.page(
            resource,
            target.namespace,
            parse_labels(request.query.get("labelSelector", "")),
            parse_fields(request.query.get("fieldSelector", ""), resource.kind, resource.selectable),
        )
        items = []
        for obj in page.items:
            meta = obj["metadata"]
            if self.api.find(resource, meta.get("namespace") or "", meta["name"]) is not None:
                items.append(self.api.delete(resource, meta.get("namespace") or "", meta["name"], options)[0])
        body = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return _json({**body, "metadata": {"resourceVersion": str(self.api.store.version)}, "items": items})

    # Subresources

    async def _subresource(self, request: web.Request, target: _Target, options: Options) -> web.StreamResponse:
        resource, sub = target.resource, target.subresource
        where = (resource, target.namespace, target.name)
        if sub == "scale" and resource.scale:
            return await self._scale(request, target, options)
        core = not resource.group
        if core and resource.kind == "Pod" and sub in ("log", "exec", "attach", "portforward"):
            return await self.proxy.pod(request, self.api.get(*where), sub)
        if core and resource.kind == "Pod" and sub == "binding" and request.method == "POST":
            self._bind(target, await _body(request))
            return _json(_success(), 201)
        if core and resource.kind == "Pod" and sub == "eviction" and request.method == "POST":
            self._evict(target, await _body(request))
            return _json(_success(), 201)
        if core and resource.kind == "ServiceAccount" and sub == "token" and request.method == "POST":
            return _json(self._token(target, await _body(request)), 201)
        if core and resource.kind == "Service" and sub == "proxy":
            return await self.proxy.service(request, target.namespace, target.name, target.rest)
        if core and resource.kind == "Namespace" and sub == "finalize" and request.method == "PUT":
            return _json(self.api.update(*where, await _body(request), options))
        raise errors.no_such_page()

    async def _scale(self, request: web.Request, target: _Target, options: Options) -> web.Response:
        where = (target.resource, target.namespace, target.name)
        scale = self.api.scale_of(target.resource, self.api.get(*where))
        if request.method == "GET":
            return self._present_scale(request, scale)
        if request.method == "PUT":
            changed = await _body(request)
        elif request.method == "PATCH":
            kind, body = await self._patch_body(request, options)
            changed = patches.json_patch(scale, body) if kind == "json" else patches.merge_patch(scale, body)
        else:
            raise errors.method_not_allowed()
        return self._present_scale(request, self.api.set_scale(*where, changed, options))

    def _present_scale(self, request: web.Request, scale: Obj) -> web.Response:
        if _form(request) != "Table":
            return _json(scale)
        row = {
            "cells": [scale["metadata"]["name"], scale["spec"]["replicas"], scale["status"]["replicas"]],
            "object": scale,
        }
        names = [
            {"name": name, "type": "string", "format": "", "priority": 0} for name in ("Name", "Desired", "Available")
        ]
        return _json({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "columnDefinitions": names, "rows": [row]})

    def _bind(self, target: _Target, binding: Obj) -> None:
        node = dig(binding, "target", "name", default="")

        def change(pod: Obj) -> None:
            if pod["spec"].get("nodeName"):
                why = f'pod {target.name} is already assigned to node "{pod["spec"]["nodeName"]}"'
                raise errors.conflict("pods/binding", "", target.name, why)
            pod["spec"]["nodeName"] = node
            set_condition(pod["status"], "PodScheduled", "True")

        self.api.modify(
            target.resource, target.namespace, target.name, change, Options("kube-scheduler", subresource="binding")
        )

    def _evict(self, target: _Target, eviction: Any) -> None:
        options = eviction.get("deleteOptions") or {} if isinstance(eviction, dict) else {}
        pod = self.api.get(target.resource, target.namespace, target.name)
        self._respect_budgets(pod)
        self.api.delete(
            target.resource, target.namespace, target.name, DeleteOptions(grace=options.get("gracePeriodSeconds"))
        )

    def _respect_budgets(self, pod: Obj) -> None:
        """Raises ApiError 429 where a budget doesn't let a pod go; else takes it off the budget, before the next one asks."""
        meta = pod["metadata"]
        if meta.get("deletionTimestamp") or dig(pod, "status", "phase") in ("Pending", "Succeeded", "Failed"):
            return
        storage = ("policy", "poddisruptionbudgets")
        budgets = [
            budget
            for budget in self.api.store.all(storage, meta["namespace"])
            if matches(budget["spec"].get("selector"), meta.get("labels"))
        ]
        if len(budgets) > 1:
            text = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
            raise ApiError(500, "InternalError", text)
        for budget in budgets:
            allowed, name = dig(budget, "status", "disruptionsAllowed", default=0), budget["metadata"]["name"]
            if allowed < 1:
                text = f"The disruption budget {name} allows no disruption now"
                raise ApiError(
                    429,
                    "TooManyRequests",
                    "Cannot evict pod as it would violate the pod's disruption budget.",
                    {"causes": [{"reason": "DisruptionBudget", "message": text}]},
                )
            self.api.modify(
                self.api.registry.get(*storage),
                meta["namespace"],
                name,
                lambda target: target["status"].update(disruptionsAllowed=target["status"]["disruptionsAllowed"] - 1),
                Options("kube-apiserver", subresource="status"),
            )

    # Identities

    def _token(self, target: _Target, body: Obj) -> Obj:
        account = self.api.get(target.resource, target.namespace, target.name)
        spec = body.get("spec") or {}
        seconds = max(600, int(spec.get("expirationSeconds") or 3600))
        reference = spec.get("boundObjectRef")
        bound = reference if reference and reference.get("kind") == "Pod" else None
        audiences = list(spec.get("audiences") or [ISSUER])
        token, end = self.tokens.issue(account, seconds, audiences, bound)
        ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))
        return {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": target.name, "namespace": target.namespace, "creationTimestamp": stamp()},
            "spec": {"audiences": audiences, "expirationSeconds": seconds, "boundObjectRef": reference},
            "status": {"token": token, "expirationTimestamp": ends},
        }

    def _review(self, resource: Resource, body: Obj, user: User) -> web.Response:
        review = {**body, "apiVersion": resource.api_version, "kind": resource.kind}
        review.setdefault("metadata", {})
        if resource.kind == "TokenReview":
            found = self.tokens.verify(dig(body, "spec", "token", default="."))
            review["status"] = (
                {"authenticated": False, "error": "the token is not valid"}
                if found is None
                else {
                    "authenticated": True,
                    "user": {"username": found.name, "uid": found.uid, "groups": list(found.groups)},
                    "audiences": [ISSUER],
                }
            )
        elif resource.kind == "SelfSubjectReview":
            review["status"] = {"userInfo": {"username": user.name, "groups": list(user.groups)}}
        elif resource.kind == "SelfSubjectRulesReview":
            everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
            review["status"] = {"resourceRules": [everything], "nonResourceRules": [], "incomplete": False}
        else:
            review["status"] = {"allowed": True, "reason": "this plane enforces no RBAC"}
        return _json(review, 201)


class _Watch:
    """One watch: what happened since a version, then what happens, as selected objects see it."""

    def __init__(self, api: Api, request: web.Request, target: _Target) -> None:
        self.api, self.target = api, target
        self.resource = target.resource
        query = request.query
        self.form = _form(request)
        self.include = query.get("includeObject", "Metadata")
        self.bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
        self.initial = query.get("sendInitialEvents") in ("1", "true")
        self.version = query.get("resourceVersion", "")
        self.timeout = float(query.get("timeoutSeconds") or 0) or 1800.0
        self.labels = parse_labels(query.get("labelSelector", ""))
        self.fields = parse_fields(query.get("fieldSelector", ""), self.resource.kind, self.resource.selectable)
        self.queue: asyncio.Queue[Change] = asyncio.Queue()
        self.end: Callable[[], None] = lambda: None
        self.header = True

    def begin(self) -> None:
        """Collects what is to be sent first, and subscribes. Raises ApiError 410."""
        storage = self.resource.storage
        if self.version in ("", "0") or self.initial:
            for stored in self.api.store.all(storage, self.target.namespace):
                self.queue.put_nowait(
                    Change(int(stored["metadata"]["resourceVersion"]), "ADDED", storage, stored, None)
                )
        else:
            try:
                since = int(self.version)
            except ValueError as error:
                raise errors.bad_request(f'invalid resource version "{self.version}"') from error
            for change in self.api.store.since(storage, since):
                self.queue.put_nowait(change)
        self.reached = self.api.store.version
        self.end = self.api.store.subscribe(storage, self.queue.put_nowait)

    async def run(self, response: web.StreamResponse) -> None:
        """Sends events until the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout
        initial_left = self.queue.qsize() if self.initial else -1
        while (left := deadline - loop.time()) > 0:
            if initial_left == 0:
                initial_left = -1
                await self._bookmark(response, {"k8s.io/initial-events-end": "true"})
            try:
                change = await asyncio.wait_for(self.queue.get(), min(left, _BOOKMARK_PERIOD))
            except asyncio.TimeoutError:
                if self.bookmarks and left > _BOOKMARK_PERIOD:
                    self.reached = self.api.store.version
                    await self._bookmark(response, {})
                continue
            initial_left -= 1 if initial_left > 0 else 0
            event = self._event(change)
            if event is not None:
                await _send(response, event)

    def _event(self, change: Change) -> Obj | None:
        now = self._selected(change.object) if change.type != "DELETED" else None
        before = self._selected(change.old) if change.old is not None else None
        if now is None and before is None:
            return None
        if now is None:
            # What left the selection is shown as it was when it was last selected, at the version of its leaving.
            shown = change.object if change.type == "DELETED" or change.old is None else change.old
            meta = {**shown["metadata"], "resourceVersion": change.object["metadata"]["resourceVersion"]}
            return self._frame("DELETED", self.api.present(self.resource, {**shown, "metadata": meta}))
        return self._frame("MODIFIED" if before is not None else "ADDED", now)

    def _selected(self, stored: Obj) -> Obj | None:
        meta = stored["metadata"]
        if self.target.namespace and meta.get("namespace") != self.target.namespace:
            return None
        if self.target.name and meta["name"] != self.target.name:
            return None
        if not self.labels(meta.get("labels") or {}):
            return None
        obj = self.api.present(self.resource, stored)
        return obj if self.fields(obj) else None

    def _frame(self, kind: str, obj: Obj) -> Obj:
        if self.form == "Table":
            meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            shown = tables.table(self.resource, [obj], meta, self.include, self.header)
            self.header = False
            return {"type": kind, "object": shown}
        if self.form.startswith("PartialObjectMetadata"):
            return {"type": kind, "object": tables.partial(obj)}
        return {"type": kind, "object": obj}

    async def _bookmark(self, response: web.StreamResponse, annotations: dict[str, str]) -> None:
        meta: Obj = {"resourceVersion": str(self.reached), "creationTimestamp": None}
        if annotations:
            meta["annotations"] = annotations
        obj: Obj = {"kind": self.resource.kind, "apiVersion": self.resource.api_version, "metadata": meta}
        if self.form == "Table":
            obj = {
                "kind": "Table",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": meta,
                "columnDefinitions": [],
                "rows": [{"cells": [], "object": tables.partial(obj)}],
            }
        elif self.form.startswith("PartialObjectMetadata"):
            obj = tables.partial(obj)
        await _send(response, {"type": "BOOKMARK", "object": obj})


async def _send(response: web.StreamResponse, event: Obj) -> None:
    await response.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")


def _success() -> Obj:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}


def _form(request: web.Request) -> str:
    for option in request.headers.get("Accept", "").split(","):
        words = [word.strip() for word in option.split(";")]
        if words[0] != "application/json":
            continue
        parameters = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        if parameters.get("g") == "meta.k8s.io" and parameters.get("v", "v1") == "v1":
            return parameters.get("as", "")
        return ""
    return ""


async def _body(request: web.Request) -> Any:
    raw = await request.read()
    if not raw:
        return {}
    if request.content_type == protobuf.MEDIA:
        return protobuf.decode(raw)
    if "yaml" not in request.content_type:
        return json.loads(raw)
    try:
        return json.loads(raw)
    except json.JSONDecodeError:
        return yaml.load(raw, Loader=_PlainLoader)


def _json(value: Any, code: int = 200) -> web.Response:
    body = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    return web.Response(body=body, status=code, content_type="application/json")
