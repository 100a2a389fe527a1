"""The pack's directory on its node, and the mounts by which holder and replicas share it.

Everything that pods of one pack share lies in `/run/tightship/<pack UID>`: the locks, the GPU's identity, MPS's pipes and the
shared memory that MPS clients need. The UID in the path keeps two packs apart, also when one is made anew under the old name.
"""

from __future__ import annotations

from typing import Any

from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.manifests.podparts import OperatorImage

ROOT = "/run/tightship"
PATH = "/run/tightship/pack"
MPS_PATH = "/mps"
SHM_PATH = "/dev/shm"


def volumes(pack: GPUPack, *, create: bool) -> list[dict[str, Any]]:
    """The hostPath volumes of a pack.

    With `create` a missing directory is made. Replicas of a held GPU must not make it: without its holder they have no business there.
    A replica that has its GPU alone meets nobody, and gets a directory of its own.
    """
    if pack.spec.mode == "Exclusive":
        return [{"name": "pack", "emptyDir": {}}]
    kind = "DirectoryOrCreate" if create else "Directory"
    places = [("pack", ""), ("mps", "/mps"), ("shm", "/shm")] if pack.spec.has_holder else [("pack", "")]
    return [
        {"name": name, "hostPath": {"path": f"{ROOT}/{pack.metadata.uid}{path}", "type": kind}} for name, path in places
    ]


def mounts(*, mps: bool) -> list[dict[str, Any]]:
    """The pack's directory, and with `mps` the pipes and the shared memory."""
    paths = [("pack", PATH), ("mps", MPS_PATH), ("shm", SHM_PATH)] if mps else [("pack", PATH)]
    return [{"name": name, "mountPath": path} for name, path in paths]


def mps_env() -> list[dict[str, Any]]:
    """Where MPS's daemon and clients meet: a path that no other software of the node uses."""
    return [
        {"name": "CUDA_MPS_PIPE_DIRECTORY", "value": f"{MPS_PATH}/pipe"},
        {"name": "CUDA_MPS_LOG_DIRECTORY", "value": f"{MPS_PATH}/log"},
    ]


def prepare_container(image: OperatorImage, user: int) -> dict[str, Any]:
    """An init container, as root, that gives the pack's directory to the replicas' user."""
    return {
        "name": "prepare",
        **image.fields(),
        "command": ["tightship", "node", "prepare", "--dir", PATH, "--uid", str(user)],
        "securityContext": {"runAsUser": 0, "allowPrivilegeEscalation": False},
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "volumeMounts": mounts(mps=False),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
