"""What can go wrong between the operator and the Kubernetes API, as one tree.

::

    KubeError
    |-- ApiError                the server answered with a failure (`status`, `reason`, `details`)
    |   |-- NotFound            404: no such object
    |   |-- AlreadyExists       409 on create
    |   |-- Conflict            409 on a write that carried a resourceVersion, a uid or an unforced apply
    |   |-- Invalid             400, 422: the object breaks the schema, or an admission rule; so does an apply's 500 that says so
    |   |-- Forbidden           401, 403: RBAC, or an admission plug-in
    |   |   `-- NamespaceTerminating   nothing new can be made there, and everything in it goes away
    |   `-- Unavailable         429, 5xx: the server is busy or broken; later it may work
    |       `-- NotServed        404 without a Status: the kind isn't installed, or the server has just started and doesn't know it yet
    |-- Unreachable             no answer at all: connection refused, reset, timed out, bad TLS
    |-- MissingKinds            the kinds of tightship.dev aren't installed in this cluster
    |-- NoCluster               neither a kubeconfig nor a service account tells which cluster to use
    |-- OutlivedOwner           an object of the wanted name is left over from an earlier owner of the same name
    `-- NameConflict            an object of the wanted name isn't ours, and is left alone

Whoever catches one of these decides whether it is a state to report (`NameConflict`, `Invalid`), a race that the next
look settles (`Conflict`, `AlreadyExists`, `NotFound`), or trouble to retry with growing delays (everything else, which
the work queue does by itself when a reconciler lets it pass).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class KubeError(Exception):
    """The root: any failure of the operator's Kubernetes I/O."""


class ApiError(KubeError):
    """The API server refused a request.

    Attributes: `status` the HTTP status, `reason` the machine-readable reason of the Status object, `details` its
    details (may be empty). `str()` reads "PATCH Service opt in default: the server's message (HTTP 409)".
    """

    def __init__(self, what: str, status: int, reason: str, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(f"{what}: {message} (HTTP {status})")
        self.status = status
        self.reason = reason
        self.message = message
        self.details = details


class NotFound(ApiError):
    """There is no such object."""


class AlreadyExists(ApiError):
    """A create found an object of that name."""


class Conflict(ApiError):
    """The object changed since it was read, or another field manager owns a field (an unforced apply)."""


class Invalid(ApiError):
    """The server's validation refused the object; `message` names the field."""


class Forbidden(ApiError):
    """The operator's service account may not do this, or admission refuses it."""


class NamespaceTerminating(Forbidden):
    """The namespace is being deleted."""


class Unavailable(ApiError):
    """The server can't answer now."""


class NotServed(Unavailable):
    """The server has nothing at that path. Of an object this says nothing: an API server that starts (1.20) answers so for kinds of CRDs."""


class Unreachable(KubeError):
    """No answer came back."""


class MissingKinds(KubeError):
    """The cluster doesn't serve one of the operator's own kinds."""


class NoCluster(KubeError):
    """Neither a kubeconfig nor a service account tells which cluster to use."""


class OutlivedOwner(KubeError):
    """An object of the wanted name belongs to an owner that is gone; the garbage collector removes it soon."""


class NameConflict(KubeError):
    """An object of the wanted name exists and isn't ours. Nothing was written.

    Attributes: `kind`, `namespace`, `name` of the object in the way, `owner` who controls it ("" when nobody does).
    """

    def __init__(self, kind: str, namespace: str, name: str, owner: str) -> None:
        whose = f"it is controlled by {owner}" if owner else "nothing of Tightship's controls it"
        where = f" in namespace {namespace}" if namespace else ""
        super().__init__(
            f"{kind} {name!r}{where} exists already, and {whose}. "
            f"Delete or rename it, or give your object another name; Tightship doesn't touch it."
        )
        self.kind = kind
        self.namespace = namespace
        self.name = name
        self.owner = owner


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Conflict,
    422: Invalid,
    429: Unavailable,
}

_UNTYPED_PATCH = "failed to create typed patch object"
"""How a server-side apply says that a field is not in the kind's schema; the status is 500, and the next try ends alike."""


def from_response(what: str, status: int, body: Mapping[str, Any]) -> ApiError:
    """The exception for a failed response.

    `what` says which request it was, `status` is the HTTP status, `body` the decoded Status object (may be empty).
    """
    reason = str(body.get("reason") or "")
    message = str(body.get("message") or reason or "no message")
    details = body.get("details") or {}
    causes = details.get("causes") or ()
    kind = _BY_STATUS.get(status, Unavailable if status >= 500 else ApiError)
    if status == 422 and any(cause.get("field") == "metadata.uid" for cause in causes):
        kind = Conflict  # how an apply is told that another object has the name now
    if status == 404 and not reason:
        kind = NotServed
    if status == 500 and message.startswith(_UNTYPED_PATCH):
        kind = Invalid
    if status == 409 and reason == "AlreadyExists":
        kind = AlreadyExists
    if status == 403 and any(cause.get("reason") == "NamespaceTerminating" for cause in causes):
        kind = NamespaceTerminating
    return kind(what, status, reason, message, details)
