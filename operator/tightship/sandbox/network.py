"""The sandbox's namespaces: how to get into them, and the network inside.

One network namespace holds the control plane, the agent and a bridge; `10.244.0.1` (the API server) and each node's address
are on the bridge, every pod has a namespace of its own connected to it, and the service range is local, for the agent
to listen on. There is no way out of it. A PID namespace makes sure that nothing survives the sandbox's first process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

from tightship.sandbox.agent.netns import BRIDGE, GATEWAY, MTU, SERVICE_RANGE

BRIDGE_ADDRESS = "02:00:00:00:00:01"
"""The bridge's hardware address, locally administered."""


class NamespaceError(Exception):
    """This machine does not let us make the namespaces the sandbox needs; the text says what to do."""


def unshare_command() -> list[str]:
    """The command line that runs what follows it as the first process of new namespaces."""
    command = [_tool("unshare"), "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    return [*command, "--"]


def check() -> None:
    """Try the namespaces out.

    Raises:
        NamespaceError: they cannot be made, or iproute2 is missing.
    """
    probe = f"ip link add {BRIDGE} type bridge && ip link add t0 type veth peer name t1"
    _tool("ip")
    result = subprocess.run([*unshare_command(), "sh", "-c", probe], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    said = result.stderr.strip() or f"exit status {result.returncode}"
    if os.geteuid() == 0:
        advice = "in a container, start it with CAP_SYS_ADMIN and CAP_NET_ADMIN (for example --privileged)"
    else:
        advice = (
            "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces=10000, "
            "on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0), or run as root"
        )
    raise NamespaceError(f"the sandbox needs namespaces of its own and cannot make them: {said}; {advice}")


def enter_command(pid: int) -> list[str]:
    """The command line that runs what follows it inside the sandbox whose first process is `pid`."""
    command = [_tool("nsenter"), "-t", str(pid), "-n", "-m", "-p", "-i"]
    if os.geteuid() != 0:
        command += ["-U", "--preserve-credentials"]
    return [*command, "--"]


def set_up(node_addresses: Iterable[str]) -> None:
    """Bring the network up; run inside the namespace.

    Raises:
        NamespaceError: iproute2 refused something.
    """
    lines = [
        "link set lo up",
        # A bridge without an address of its own takes its lowest port's, and pods that come and go change that: those that know the
        # old one from ARP reach nobody for up to a minute.
        f"link add {BRIDGE} address {BRIDGE_ADDRESS} mtu {MTU} type bridge",
        f"addr add {GATEWAY}/16 dev {BRIDGE}",
        *(f"addr add {address}/16 dev {BRIDGE}" for address in node_addresses),
        f"link set {BRIDGE} up",
        f"route add local {SERVICE_RANGE} dev lo",
    ]
    script = "\n".join(lines) + "\n"
    result = subprocess.run([_tool("ip"), "-batch", "-"], input=script, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NamespaceError(f"the sandbox's network: {result.stderr.strip()}")


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        package = {"ip": "iproute2"}.get(name, "util-linux")
        raise NamespaceError(f"the sandbox needs the command {name!r} (package {package}); install it")
    return found
