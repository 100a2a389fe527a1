"""The real control plane: etcd, API server, controller manager and scheduler from KUBEBUILDER_ASSETS.

The flags differ from a cluster's where a sandbox on one machine must: addresses of its private network, one ServiceAccount
key, no leader election, and shorter time constants, each with its reason beside it. Written for Kubernetes 1.20.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from tightship.sandbox.agent.netns import GATEWAY, SERVICE_RANGE
from tightship.sandbox.certificates import Certificates
from tightship.sandbox.kubeconfig import write_kubeconfig
from tightship.sandbox.processes import Command

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
API_PORT = 6443
_ETCD = "http://127.0.0.1:2379"


class AssetsError(Exception):
    """The control plane's binaries are not there; the text says what to do."""


def assets() -> Path:
    """The folder that KUBEBUILDER_ASSETS names.

    Raises:
        AssetsError: it is not set, or lacks a binary.
    """
    named = os.environ.get("KUBEBUILDER_ASSETS")
    if not named:
        raise AssetsError(
            "the real control plane needs KUBEBUILDER_ASSETS to name a folder with "
            + ", ".join(BINARIES)
            + "; set it, or use the embedded plane"
        )
    missing = [name for name in BINARIES if not os.access(os.path.join(named, name), os.X_OK)]
    if missing:
        raise AssetsError(f"KUBEBUILDER_ASSETS={named} lacks {', '.join(missing)}")
    return Path(named)


@dataclass(frozen=True)
class RealPlane:
    """Commands and credentials of one control plane whose data lie in `directory`; `node_grace` and `eviction` as in Settings."""

    binaries: Path
    directory: Path
    certificates: Certificates
    token: str
    node_grace: int
    eviction: int

    @classmethod
    def create(cls, directory: Path, certificates: Certificates, node_grace: int, eviction: int) -> RealPlane:
        """Write tokens and the component's kubeconfig. Raises AssetsError."""
        directory.mkdir(parents=True, exist_ok=True)
        plane = cls(assets(), directory, certificates, secrets.token_hex(16), node_grace, eviction)
        tokens = directory / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text(f'{plane.token},admin,admin,"system:masters"\n')
        write_kubeconfig(plane.kubeconfig, f"https://{GATEWAY}:{API_PORT}", plane.token, certificates.ca)
        return plane

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig of the components, for use inside."""
        return self.directory / "kubeconfig"

    def etcd(self) -> Command:
        """The store."""
        return Command(
            "etcd",
            [
                str(self.binaries / "etcd"),
                f"--data-dir={self.directory / 'etcd'}",
                f"--listen-client-urls={_ETCD}",
                f"--advertise-client-urls={_ETCD}",
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--initial-advertise-peer-urls=http://127.0.0.1:2380",
                "--initial-cluster=default=http://127.0.0.1:2380",
                # one member elects itself: waiting for others only delays the start
                "--heartbeat-interval=50",
                "--election-timeout=500",
            ],
        )

    def apiserver(self) -> Command:
        """The API server."""
        keys = self.certificates
        return Command(
            "kube-apiserver",
            [
                str(self.binaries / "kube-apiserver"),
                f"--etcd-servers={_ETCD}",
                "--bind-address=0.0.0.0",
                # not loopback: the Service kubernetes would have no endpoints
                f"--advertise-address={GATEWAY}",
                f"--secure-port={API_PORT}",
                "--insecure-port=0",
                f"--tls-cert-file={keys.certificate}",
                f"--tls-private-key-file={keys.key}",
                f"--token-auth-file={self.directory / 'tokens.csv'}",
                f"--client-ca-file={keys.ca}",
                f"--service-cluster-ip-range={SERVICE_RANGE}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={keys.accounts_public}",
                f"--service-account-signing-key-file={keys.accounts_key}",
                "--authorization-mode=RBAC",
                "--allow-privileged=true",
                # nodes are reached by address: their names resolve nowhere
                "--kubelet-preferred-address-types=InternalIP",
                # a pod of a node that vanished is evicted within seconds, not after five minutes
                f"--default-not-ready-toleration-seconds={self.eviction}",
                f"--default-unreachable-toleration-seconds={self.eviction}",
                "--profiling=false",
            ],
        )

    def controllers(self) -> Command:
        """The controller manager."""
        return Command(
            "kube-controller-manager",
            [
                str(self.binaries / "kube-controller-manager"),
                f"--kubeconfig={self.kubeconfig}",
                f"--root-ca-file={self.certificates.ca}",
                f"--service-account-private-key-file={self.certificates.accounts_key}",
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                "--allocate-node-cidrs=false",
                # a dead agent is noticed after 20 s, if nothing else is asked for, instead of 40
                "--node-monitor-period=2s",
                f"--node-monitor-grace-period={self.node_grace}s",
                # a claim that waits for its volume is looked at again after 1 s instead of 15
                "--pvclaimbinder-sync-period=1s",
                "--profiling=false",
            ],
        )

    def scheduler(self) -> Command:
        """The scheduler."""
        return Command(
            "kube-scheduler",
            [
                str(self.binaries / "kube-scheduler"),
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                "--profiling=false",
            ],
        )
