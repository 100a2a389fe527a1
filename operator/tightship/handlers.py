"""kopf's registrations: every watched kind feeds the store, and nothing else happens here.

Only `on.event` handlers are registered, and kopf's event posting is off: so kopf puts no finalizer, annotation or event on
anybody's objects and writes nothing at all. What to do about a change is decided elsewhere (`reconcile.routing`), when it
is done is up to the work queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from tightship.kube.kinds import KINDS, WATCHED, WATCHED_BY_LABEL
from tightship.kube.transport import authorization

#: Told of each watch event: its type (None for an object of a listing, ADDED, MODIFIED, DELETED) and the object.
Feed = Callable[[str | None, dict[str, Any]], None]


def register(
    registry: kopf.OperatorRegistry, configuration: Configuration, feed: Feed, kinds: Iterable[str] = WATCHED
) -> None:
    """Register the login with `configuration` and one event handler for each of `kinds`, all leading to `feed`."""

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection(configuration)

    async def observed(event: Any, **_: Any) -> None:
        feed(event["type"], event["object"])

    kopf.on.login(registry=registry, id="login")(login)
    for name in kinds:
        kind = KINDS[name]
        selector: dict[str, Any] = {"group": kind.group, "version": kind.version, "plural": kind.plural}
        kopf.on.event(registry=registry, id=f"observe-{kind.plural}", **selector)(observed)


def settings() -> kopf.OperatorSettings:
    """How kopf is to behave: a pure watcher."""
    made = kopf.OperatorSettings()
    made.posting.enabled = False
    made.scanning.disabled = True  # the kinds are checked at the start; watching CRDs would need more rights
    made.peering.standalone = True  # the lease decides who leads
    made.watching.server_timeout = 300  # whole seconds: the API server refuses "300.0"
    made.watching.reconnect_backoff = 1.0
    made.batching.idle_timeout = (
        1.0  # each object that changes has a task for so long: thousands at once in a large cluster
    )
    made.process.ultimate_exiting_timeout = 30.0
    for name, wanted in WATCHED_BY_LABEL.items():
        kind = KINDS[name]
        selector = kopf_selector(kind.group, kind.version, kind.plural)
        made.watching.label_selectors[selector] = wanted
    return made


def kopf_selector(group: str, version: str, plural: str) -> Callable[[Any], bool]:
    """A selector of exactly one resource, for kopf's settings."""

    def matches(resource: Any) -> bool:
        return (resource.group, resource.version, resource.plural) == (group, version, plural)

    return matches


async def connection(configuration: Configuration) -> kopf.ConnectionInfo:
    """The client library's configuration in kopf's terms, with fresh credentials."""
    scheme, credentials = await authorization(configuration) or (None, None)
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme,
        token=credentials,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
    )
