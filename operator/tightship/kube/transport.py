"""Finding the API server and speaking to it: kubeconfig or service account in, JSON out.

The client library does what is hard (kubeconfig, exec plug-ins, token refresh, TLS); this module narrows it to one call.
One configuration serves both the operator's own requests and kopf's watches, so there is one answer to "which cluster".
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import load_kube_config
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config

from tightship.kube.errors import NoCluster, Unreachable

_HOME_CONFIG = os.path.expanduser("~/.kube/config")
_ADVICE = "Pass --kubeconfig, set KUBECONFIG, or run in a pod with a service account."


async def load_configuration(kubeconfig: str | None = None, context: str | None = None) -> Configuration:
    """How to reach the cluster.

    `kubeconfig` names a file; without it the pod's service account is used when there is one, else `$KUBECONFIG` or
    `~/.kube/config`. `context` picks a context of the kubeconfig. Raises `NoCluster` with what was tried.
    """
    configuration = Configuration()
    path = kubeconfig or os.environ.get("KUBECONFIG")
    if path is None and context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        try:
            load_incluster_config(configuration)
        except (ConfigException, OSError) as error:
            raise NoCluster(f"this looks like a pod, but its service account can't be used: {error}") from error
        return configuration
    chosen = path or _HOME_CONFIG
    if not _exists(chosen):
        raise NoCluster(f"no cluster to talk to: there is no kubeconfig {chosen}. {_ADVICE}")
    try:
        await load_kube_config(config_file=chosen, context=context, client_configuration=configuration)
    except (ConfigException, OSError) as error:
        raise NoCluster(f"no cluster to talk to: kubeconfig {chosen} can't be used: {error}. {_ADVICE}") from error
    return configuration


def _exists(paths: str) -> bool:
    """Whether at least one file of a kubeconfig list is there."""
    return any(Path(path).is_file() for path in paths.split(os.pathsep))


async def authorization(configuration: Configuration) -> tuple[str, str] | None:
    """Scheme and credentials of the Authorization header, refreshed when they have to be; None when there is none."""
    header: str | None = await configuration.get_api_key_with_prefix("BearerToken")
    if not header:
        return None
    scheme, _, credentials = header.strip().partition(" ")
    return (scheme, credentials.strip()) if credentials else ("Bearer", scheme)


class HTTPTransport:
    """Sends requests through the client library's connection pool. Each request has `timeout` seconds."""

    def __init__(self, configuration: Configuration, *, timeout: float = 30.0) -> None:
        self._client = ApiClient(configuration)
        self._client.user_agent = "tightship"
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def request(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str
    ) -> tuple[int, dict[str, Any]]:
        """See `Transport.request`."""
        try:
            method, url, headers, body, _ = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=self._timeout
            )
            raw = await response.read()
        except (aiohttp.ClientError, ApiException, asyncio.TimeoutError, OSError) as error:
            raise Unreachable(
                f"{method} {path}: no answer from the API server: {str(error) or type(error).__name__}"
            ) from error
        return response.status, _decode(raw)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _decode(raw: bytes) -> dict[str, Any]:
    """A JSON object; for anything else (a proxy's HTML page) its text as a Status's message."""
    try:
        decoded = json.loads(raw) if raw else {}
    except ValueError:
        return {"message": raw.decode(errors="replace")[:500]}
    return decoded if isinstance(decoded, dict) else {"message": str(decoded)[:500]}
