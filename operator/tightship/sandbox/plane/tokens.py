"""ServiceAccount tokens: issued by TokenRequest, verified by TokenReview and on every request.

Tokens are JWTs signed with a key of this process (HS256): they end with the plane.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from tightship.sandbox.plane.errors import Obj
from tightship.sandbox.plane.store import Store

ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass(frozen=True)
class User:
    """Who makes a request."""

    name: str
    groups: tuple[str, ...]
    uid: str = ""


ADMIN = User("kubernetes-admin", ("system:masters", "system:authenticated"))


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Tokens:
    """Issues and verifies tokens.

    ``admin`` is a token of the administrator, for clients that insist on having one.

    Args:
        store: where the accounts (and bound pods) must still exist for their tokens to be good.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = secrets.token_bytes(32)
        self.admin = secrets.token_urlsafe(24)

    def issue(self, account: Obj, seconds: int, audiences: list[str], bound: Obj | None) -> tuple[str, float]:
        """A token for a ServiceAccount; returns it and when it ends (epoch seconds)."""
        meta = account["metadata"]
        begin = time.time()
        end = begin + seconds
        private: Obj = {
            "namespace": meta["namespace"],
            "serviceaccount": {"name": meta["name"], "uid": meta["uid"]},
        }
        if bound:
            private["pod"] = {"name": bound["name"], "uid": bound.get("uid", "")}
        claims = {
            "iss": ISSUER,
            "sub": f"system:serviceaccount:{meta['namespace']}:{meta['name']}",
            "aud": audiences or [ISSUER],
            "iat": int(begin),
            "nbf": int(begin),
            "exp": int(end),
            "kubernetes.io": private,
        }
        head = _encode(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        body = f"{head}.{_encode(json.dumps(claims).encode())}"
        return f"{body}.{self._sign(body)}", end

    def _sign(self, body: str) -> str:
        return _encode(hmac.new(self._key, body.encode(), hashlib.sha256).digest())

    def verify(self, token: str) -> User | None:
        """The user of a token, or None for one that is forged, over, or of a deleted account or pod."""
        if hmac.compare_digest(token.encode(), self.admin.encode()):
            return ADMIN
        body, _, signature = token.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(body).encode()):
            return None
        claims: dict[str, Any] = json.loads(_decode(body.split(".")[1]))
        if claims["exp"] < time.time():
            return None
        private = claims["kubernetes.io"]
        namespace, account = private["namespace"], private["serviceaccount"]
        stored = self._store.get(("", "serviceaccounts"), namespace, account["name"])
        if stored is None or stored["metadata"]["uid"] != account["uid"]:
            return None
        pod = private.get("pod")
        if pod:
            bound = self._store.get(("", "pods"), namespace, pod["name"])
            if bound is None or (pod["uid"] and bound["metadata"]["uid"] != pod["uid"]):
                return None
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
        return User(claims["sub"], groups, account["uid"])
