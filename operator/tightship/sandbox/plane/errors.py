"""Failures of the API, as the Status objects that Kubernetes clients know.

Invariant: every refusal that leaves the plane is an ``ApiError``; its ``body`` is a complete ``metav1.Status`` whose
``code`` equals the HTTP status. kubectl prints ``message`` as it is, so messages follow the wording of the real server.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

Obj = dict[str, Any]


class ApiError(Exception):
    """A refusal with an HTTP status.

    Attributes:
        code: HTTP status.
        body: the ``metav1.Status`` object.
    """

    def __init__(self, code: int, reason: str, message: str, details: Obj | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.body: Obj = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
        if details:
            self.body["details"] = details


def qualified(plural: str, group: str) -> str:
    """``pods`` or ``statefulsets.apps``: how messages name a resource."""
    return f"{plural}.{group}" if group else plural


def _details(plural: str, group: str, name: str, **extra: Any) -> Obj:
    details: Obj = {"name": name, "kind": plural}
    if group:
        details["group"] = group
    details.update({k: v for k, v in extra.items() if v})
    return details


def not_found(plural: str, group: str, name: str) -> ApiError:
    """404 for a named object."""
    message = f'{qualified(plural, group)} "{name}" not found'
    return ApiError(404, "NotFound", message, _details(plural, group, name))


def no_such_page() -> ApiError:
    """404 for a path that no API serves."""
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(plural: str, group: str, name: str) -> ApiError:
    """409 for a create whose name is taken."""
    message = f'{qualified(plural, group)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, _details(plural, group, name))


def conflict(plural: str, group: str, name: str, why: str = "") -> ApiError:
    """409 for a write that is based on an older version."""
    why = why or ("the object has been modified; please apply your changes to the latest version and try again")
    message = f'Operation cannot be fulfilled on {qualified(plural, group)} "{name}": {why}'
    return ApiError(409, "Conflict", message, _details(plural, group, name))


def bad_request(message: str) -> ApiError:
    """400 for a body or parameter that can't be read."""
    return ApiError(400, "BadRequest", message)


def forbidden(plural: str, group: str, name: str, why: str) -> ApiError:
    """403, as admission refuses."""
    message = f'{qualified(plural, group)} "{name}" is forbidden: {why}'
    return ApiError(403, "Forbidden", message, _details(plural, group, name))


def method_not_allowed(message: str = "the server does not allow this method on the requested resource") -> ApiError:
    """405 for a verb that a resource lacks."""
    return ApiError(405, "MethodNotAllowed", message, {})


def expired(message: str) -> ApiError:
    """410 for a resourceVersion or a continue token that history no longer covers."""
    return ApiError(410, "Expired", message)


def unsupported_media(media: str, allowed: str) -> ApiError:
    """415 for a patch or body of an unknown type."""
    message = f"the body of the request was in an unknown format - accepted media types include: {allowed}"
    return ApiError(415, "UnsupportedMediaType", f"{message} (got {media})" if media else message, {})


class Cause:
    """One field error: the building block of a 422.

    ``kind`` is one of ``required``, ``invalid``, ``unsupported``, ``duplicate``, ``forbidden``, ``toolong``,
    ``toomany``, ``notfound``, ``type``.
    """

    _REASONS: ClassVar[dict[str, tuple[str, str]]] = {
        "required": ("FieldValueRequired", "Required value"),
        "invalid": ("FieldValueInvalid", "Invalid value"),
        "unsupported": ("FieldValueNotSupported", "Unsupported value"),
        "duplicate": ("FieldValueDuplicate", "Duplicate value"),
        "forbidden": ("FieldValueForbidden", "Forbidden"),
        "toolong": ("FieldValueTooLong", "Too long"),
        "toomany": ("FieldValueTooMany", "Too many"),
        "notfound": ("FieldValueNotFound", "Not found"),
        "type": ("FieldValueTypeInvalid", "Invalid value"),
    }

    def __init__(self, kind: str, field: str, detail: str = "", value: Any = None) -> None:
        self.kind, self.field, self.detail, self.value = kind, field, detail, value

    def text(self) -> str:
        """The error without its field, e.g. ``Invalid value: -1: must be ...``."""
        title = self._REASONS[self.kind][1]
        if self.kind in ("required", "forbidden", "toolong", "toomany"):
            return f"{title}: {self.detail}" if self.detail else title
        shown = _shown(self.value)
        return f"{title}: {shown}: {self.detail}" if self.detail else f"{title}: {shown}"

    def cause(self) -> Obj:
        """The entry in ``details.causes``."""
        return {"reason": self._REASONS[self.kind][0], "message": self.text(), "field": self.field}

    def __str__(self) -> str:
        return f"{self.field}: {self.text()}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace('"', '\\"') + '"'
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return str(value)


def invalid(kind: str, group: str, name: str, causes: list[Cause]) -> ApiError:
    """422 with all field errors of one object."""
    texts = list(dict.fromkeys(str(cause) for cause in causes))
    joined = texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"
    message = f'{qualified(kind, group)} "{name}" is invalid: {joined}'
    details = _details(kind, group, name, causes=[cause.cause() for cause in causes])
    return ApiError(422, "Invalid", message, details)
