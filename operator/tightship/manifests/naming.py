"""How a replica's pod names the GPU that its pack's holder has, without requesting it. Pure.

Three ways, since the container runtimes of nodes are set up in three ways, and the API shows none of them:

    legacy   NVIDIA_VISIBLE_DEVICES=GPU-...                                    container toolkit in its legacy or auto mode
    cdi      NVIDIA_VISIBLE_DEVICES=k8s.device-plugin.nvidia.com/gpu=GPU-...   container toolkit in CDI mode
    nri      annotation nvidia.cdi.k8s.io/container.<container>: the same      GPU operator with its NRI plugin

What must always hold: exactly one of them is used, and an image's own `NVIDIA_VISIBLE_DEVICES` (often `all`) never counts; the legacy way
adds nothing to a pod but the variable. Which one it is the operator is told (`--gpu-naming`); a replica that then sees no GPU says so.
"""

from __future__ import annotations

LEGACY, CDI, NRI = "legacy", "cdi", "nri"
NAMINGS = (LEGACY, CDI, NRI)
VARIABLE = "TIGHTSHIP_GPU_NAMING"
"""Tells the replica's preflight which way it was, for the words of its refusal; not set for the legacy one."""
_CDI_KIND = "k8s.device-plugin.nvidia.com/gpu"
_NRI_ANNOTATION = "nvidia.cdi.k8s.io/container"
_NOTHING = "void"
"""What the container toolkit takes for a container that wants no GPU from it (an empty value counts as unset, in some versions as `all`)."""


def environment(naming: str, uuid: str) -> dict[str, str]:
    """What names a GPU in a container's environment."""
    if naming == LEGACY:
        return {"NVIDIA_VISIBLE_DEVICES": uuid}
    visible = _cdi_name(uuid) if naming == CDI else _NOTHING
    return {"NVIDIA_VISIBLE_DEVICES": visible, VARIABLE: naming}


def pod_annotations(naming: str, uuid: str, container: str) -> dict[str, str]:
    """What names a GPU for a container in its pod's annotations."""
    return {f"{_NRI_ANNOTATION}.{container}": _cdi_name(uuid)} if naming == NRI else {}


def _cdi_name(uuid: str) -> str:
    return f"{_CDI_KIND}={uuid}"
