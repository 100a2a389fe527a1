"""A small Kubernetes client: requests and a list-and-watch reflector over aiohttp.

The agent needs four verbs and one watch, against two control planes of different age. A reflector hands every change to
its handler exactly once and in order; after a lost watch it lists again and reports what vanished meanwhile as DELETED.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

log = logging.getLogger(__name__)

Object = dict[str, Any]
MERGE_PATCH = "application/merge-patch+json"
RELIST_PAUSE = 0.5
REQUEST_TIMEOUT = 30.0


class ApiError(Exception):
    """The API server refused a request: `status` is the HTTP code, `reason` the machine-readable word of its answer."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason


class Api:
    """Requests to one API server. Use as an asynchronous context manager."""

    def __init__(self, server: str, token: str | None = None, ca_file: str | None = None) -> None:
        self.server = server.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._ssl: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca_file) if ca_file else True
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        connector = aiohttp.TCPConnector(ssl=self._ssl, limit=0)
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open HTTP session."""
        assert self._session is not None, "use Api as a context manager"
        return self._session

    async def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """Send one request and return the JSON answer.

        Raises:
            ApiError: the server answered with a status of 400 or more.
            aiohttp.ClientError, asyncio.TimeoutError: the server could not be reached.
        """
        async with self.session.request(
            method,
            self.server + path,
            data=None if body is None else json.dumps(body),
            params=params,
            headers={"Content-Type": content_type},
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
        ) as response:
            text = await response.text()
            if response.status >= 400:
                raise _error(response.status, text)
            return dict(json.loads(text)) if text else {}

    async def get(self, path: str) -> Object:
        """GET one object."""
        return await self.request("GET", path)

    async def create(self, path: str, body: Object) -> Object:
        """POST an object to its collection."""
        return await self.request("POST", path, body)

    async def merge(self, path: str, body: Object) -> Object:
        """PATCH an object by JSON merge patch."""
        return await self.request("PATCH", path, body, content_type=MERGE_PATCH)


def _error(status: int, text: str) -> ApiError:
    try:
        answer = json.loads(text)
    except ValueError:
        return ApiError(status, "Unknown", text[:500])
    return ApiError(status, str(answer.get("reason") or "Unknown"), str(answer.get("message") or ""))


class Reflector:
    """Keeps `store` (namespace/name -> object) equal to a collection and calls `handler(type, object)` on each change."""

    def __init__(self, api: Api, path: str, handler: Callable[[str, Object], None] | None = None) -> None:
        self._api = api
        self._path = path
        self.on_change = handler
        self.store: dict[str, Object] = {}
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """List and watch until cancelled."""
        while True:
            try:
                version: str | None = await self._list()
                while version is not None:
                    version = await self._watch(version)
            except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError) as error:
                log.debug("watch of %s broke: %s", self._path, error)
            await asyncio.sleep(RELIST_PAUSE)

    async def _list(self) -> str:
        answer = await self._api.get(self._path)
        found = {_key(item): item for item in answer.get("items") or []}
        for key in list(self.store):
            if key not in found or _uid(found[key]) != _uid(self.store[key]):
                self._emit("DELETED", self.store.pop(key))
        for key, item in found.items():
            known = key in self.store
            self.store[key] = item
            self._emit("MODIFIED" if known else "ADDED", item)
        self.synced.set()
        return str(answer["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> str | None:
        """Follow changes after `version`; returns where to go on, or None when a new list is due."""
        params = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": "300"}
        async with self._api.session.get(
            self._api.server + self._path,
            params=params,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            read_bufsize=2**22,
        ) as response:
            if response.status >= 400:
                raise _error(response.status, await response.text())
            async for line in response.content:
                event = json.loads(line)
                item = event["object"]
                if event["type"] == "ERROR":
                    return None
                version = str(item["metadata"].get("resourceVersion") or version)
                if event["type"] != "BOOKMARK":
                    self._apply(event["type"], item)
        return version

    def _apply(self, kind: str, item: Object) -> None:
        if kind == "DELETED":
            self.store.pop(_key(item), None)
        else:
            self.store[_key(item)] = item
        self._emit(kind, item)

    def _emit(self, kind: str, item: Object) -> None:
        if self.on_change is None:
            return
        try:
            self.on_change(kind, item)
        except Exception:
            log.exception("handling %s of %s", kind, _key(item))


def _key(item: Object) -> str:
    metadata = item["metadata"]
    return f"{metadata.get('namespace', '')}/{metadata['name']}"


def _uid(item: Object) -> str:
    return str(item["metadata"].get("uid", ""))
