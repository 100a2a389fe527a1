"""Probes: one attempt of each kind, and the counting of successes and failures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from tightship.sandbox.agent.runtime import Running

Object = Mapping[str, Any]


class Prober(Protocol):
    """Makes one attempt of a probe; another runtime may script the answers."""

    async def attempt(self, probe: Object, container: Object, address: str, running: Running) -> str | None:
        """Probe once; returns None for success, else what failed."""


@dataclass
class NetworkProber:
    """Probes for real: HTTP, TCP, or a command in the container."""

    session: aiohttp.ClientSession

    async def attempt(self, probe: Object, container: Object, address: str, running: Running) -> str | None:
        """See Prober."""
        timeout = float(probe.get("timeoutSeconds") or 1)
        try:
            if "httpGet" in probe:
                return await self.http(probe["httpGet"], container, address, timeout)
            if "tcpSocket" in probe:
                return await _tcp(probe["tcpSocket"], container, address, timeout)
            if "exec" in probe:
                code, output = await running.execute(list(probe["exec"]["command"]), timeout)
                return None if code == 0 else output.strip() or f"command exited with {code}"
        except asyncio.TimeoutError:
            return f"context deadline exceeded after {timeout:g}s"
        except (OSError, aiohttp.ClientError) as error:
            return str(error)
        return "no handler in this probe that the sandbox knows: httpGet, tcpSocket or exec"

    async def http(self, action: Object, container: Object, address: str, timeout: float) -> str | None:
        """GET an httpGet action's URL; None when the answer is 200 to 399."""
        scheme = str(action.get("scheme") or "HTTP").lower()
        host = action.get("host") or address
        path = "/" + str(action.get("path") or "/").lstrip("/")
        url = f"{scheme}://{host}:{port_number(action['port'], container)}{path}"
        headers = {header["name"]: header["value"] for header in action.get("httpHeaders") or []}
        headers.setdefault("User-Agent", "kube-probe/sandbox")
        verified = scheme != "https"
        limit = aiohttp.ClientTimeout(total=timeout)
        async with self.session.get(url, headers=headers, timeout=limit, ssl=verified) as response:
            if 200 <= response.status < 400:
                return None
            return f"HTTP probe failed with statuscode: {response.status}"


async def _tcp(action: Object, container: Object, address: str, timeout: float) -> str | None:
    target = action.get("host") or address
    opening = asyncio.open_connection(target, port_number(action["port"], container))
    _, writer = await asyncio.wait_for(opening, timeout)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return None


def port_number(port: str | int, container: Object) -> int:
    """The number of a container port given by number or name.

    Raises:
        OSError: the container has no port of that name.
    """
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for entry in container.get("ports") or []:
        if entry.get("name") == port:
            return int(entry["containerPort"])
    raise OSError(f"couldn't find port {port!r} in container {container['name']}")


async def watch(
    probe: Object,
    attempt: Callable[[], Awaitable[str | None]],
    report: Callable[[bool], None],
    unhealthy: Callable[[str], None],
    unit: float = 1.0,
) -> None:
    """Probe for ever; `report(True)` after successThreshold successes in a row, `report(False)` after failureThreshold failures.

    Args:
        probe: the probe's specification.
        attempt: one attempt; None or what failed.
        report: told of every threshold reached (repeatedly, as long as the outcome stays).
        unhealthy: told of every single failure.
        unit: how long one second of the specification lasts, in seconds.
    """
    await asyncio.sleep(float(probe.get("initialDelaySeconds") or 0) * unit)
    good = bad = 0
    while True:
        failure = await attempt()
        if failure is None:
            good, bad = good + 1, 0
            if good >= int(probe.get("successThreshold") or 1):
                report(True)
        else:
            good, bad = 0, bad + 1
            unhealthy(failure)
            if bad >= int(probe.get("failureThreshold") or 3):
                report(False)
        await asyncio.sleep(float(probe.get("periodSeconds") or 10) * unit)
