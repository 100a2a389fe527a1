"""A pod's volumes as directories of the node, and its containers' mounts of them.

Everything lies below the node's own directory, a hostPath too (so that two nodes of one machine have different ones);
only a PersistentVolume names a real path of the machine, since that is what brings models in. What is projected is
replaced atomically, as the kubelet does: `..data` is a link that moves, and files are links through it.
"""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tightship.sandbox.agent import env, rootfs
from tightship.sandbox.agent.api import Api, ApiError, Object

TOKEN_SECONDS = 3600


class VolumeError(Exception):
    """A volume cannot be set up now; the kubelet reports FailedMount and tries again."""


@dataclass(frozen=True)
class Source:
    """Where a volume's content lies on the machine."""

    path: Path
    read_only: bool = False
    is_file: bool = False


class Volumes:
    """The volumes of one pod.

    Args:
        api: the API server, for ConfigMaps, Secrets, claims and tokens.
        pod: the pod.
        directory: the pod's directory on the node.
        host: the directory that stands for the node's root, for hostPath.
        allocatable: what the node can give, for downward API items.
    """

    def __init__(self, api: Api, pod: Object, directory: Path, host: Path, allocatable: Mapping[str, str]) -> None:
        self._api = api
        self.pod = pod
        self._directory = directory
        self._host = host
        self._allocatable = allocatable
        self._sources: dict[str, Source] = {}
        self._tokens: dict[tuple[str, str], tuple[str, float]] = {}

    @property
    def namespace(self) -> str:
        """The pod's namespace."""
        return str(self.pod["metadata"]["namespace"])

    async def set_up(self) -> None:
        """Make every volume's content.

        Raises:
            VolumeError: something a volume refers to is missing.
        """
        for volume in self.pod["spec"].get("volumes") or []:
            self._sources[volume["name"]] = await self._set_up(volume)

    async def refresh(self) -> None:
        """Bring projected content up to date; tokens are renewed at four fifths of their life."""
        for volume in self.pod["spec"].get("volumes") or []:
            if any(kind in volume for kind in ("configMap", "secret", "projected", "downwardAPI")):
                await self._set_up(volume)

    def mounts(self, container: Object, variables: Mapping[str, str]) -> list[rootfs.Mount]:
        """A container's mounts, `subPath` and `subPathExpr` applied.

        Raises:
            VolumeError: a mount names a volume that the pod doesn't have.
        """
        found = []
        for mount in container.get("volumeMounts") or []:
            source = self._sources.get(mount["name"])
            if source is None:
                raise VolumeError(f'container {container["name"]} mounts unknown volume "{mount["name"]}"')
            path = source.path
            inner = mount.get("subPath") or env.expand(mount.get("subPathExpr") or "", variables)
            if inner:
                path = path / inner
                if not path.exists():
                    path.mkdir(parents=True)
            found.append(
                rootfs.Mount(
                    mount["mountPath"],
                    os.path.realpath(path) if inner else str(path),
                    read_only=bool(mount.get("readOnly")) or source.read_only,
                    is_file=path.is_file() or (path.exists() and not path.is_dir()),
                )
            )
        return found

    async def read(self, kind: str, name: str) -> dict[str, str] | None:
        """The data of a `configmap` or `secret` of the pod's namespace; None when there is none of that name."""
        try:
            found = await self._api.get(f"/api/v1/namespaces/{self.namespace}/{kind}s/{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        data = found.get("data") or {}
        if kind == "secret":
            return {key: base64.b64decode(value).decode(errors="replace") for key, value in data.items()}
        return dict(data)

    async def _set_up(self, volume: Object) -> Source:
        path = self._directory / "volumes" / volume["name"]
        if "hostPath" in volume:
            return self._host_path(volume["hostPath"])
        if "persistentVolumeClaim" in volume:
            return await self._claim(volume["persistentVolumeClaim"])
        if "configMap" in volume:
            _publish(path, await self._config_map(volume["configMap"]))
        elif "secret" in volume:
            _publish(path, await self._secret(volume["secret"], "secretName"))
        elif "downwardAPI" in volume:
            _publish(path, self._downward(volume["downwardAPI"]))
        elif "projected" in volume:
            files: dict[str, bytes] = {}
            for source in volume["projected"].get("sources") or []:
                files.update(await self._projection(volume["name"], source))
            _publish(path, files)
        elif "emptyDir" in volume or set(volume) == {"name"}:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o777)
            return Source(path)
        else:
            kind = next(key for key in volume if key != "name")
            raise VolumeError(f"volume {volume['name']}: the sandbox has no {kind} volumes")
        return Source(path, read_only=True)

    def _host_path(self, source: Object) -> Source:
        path = self._host / source["path"].lstrip("/")
        kind = source.get("type") or ""
        if kind in ("", "DirectoryOrCreate"):
            path.mkdir(parents=True, exist_ok=True)
        elif kind == "FileOrCreate":
            path.touch()
        elif not (path.is_dir() if kind == "Directory" else path.exists()):
            raise VolumeError(f"hostPath type check failed: {source['path']} is not a {kind} on this node")
        return Source(path, is_file=path.is_file())

    async def _claim(self, source: Object) -> Source:
        try:
            claim = await self._api.get(
                f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims/{source['claimName']}"
            )
            name = claim["spec"].get("volumeName")
            if not name:
                raise VolumeError(f"PersistentVolumeClaim {source['claimName']} is not bound")
            volume = await self._api.get(f"/api/v1/persistentvolumes/{name}")
        except ApiError as error:
            raise VolumeError(str(error)) from error
        place = volume["spec"].get("hostPath") or volume["spec"].get("local")
        if place is None:
            raise VolumeError(f"PersistentVolume {name}: the sandbox mounts hostPath and local volumes only")
        return _machine_path(name, place["path"], bool(source.get("readOnly")))

    async def _projection(self, name: str, source: Object) -> dict[str, bytes]:
        if "configMap" in source:
            return await self._config_map(source["configMap"])
        if "secret" in source:
            return await self._secret(source["secret"], "name")
        if "downwardAPI" in source:
            return self._downward(source["downwardAPI"])
        token = source["serviceAccountToken"]
        return {token["path"]: (await self._token(name, token)).encode()}

    async def _config_map(self, source: Object) -> dict[str, bytes]:
        found = await self._fetch("configmaps", source["name"], bool(source.get("optional")))
        files = {key: value.encode() for key, value in (found.get("data") or {}).items()}
        files |= {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
        return _chosen(files, source, f"configmap {source['name']}")

    async def _secret(self, source: Object, key: str) -> dict[str, bytes]:
        found = await self._fetch("secrets", source[key], bool(source.get("optional")))
        files = {name: base64.b64decode(value) for name, value in (found.get("data") or {}).items()}
        return _chosen(files, source, f"secret {source[key]}")

    async def _fetch(self, kind: str, name: str, optional: bool) -> Object:
        try:
            return await self._api.get(f"/api/v1/namespaces/{self.namespace}/{kind}/{name}")
        except ApiError as error:
            if error.status == 404 and optional:
                return {}
            raise VolumeError(str(error)) from error

    def _downward(self, source: Object) -> dict[str, bytes]:
        files = {}
        for item in source.get("items") or []:
            if "fieldRef" in item:
                value = env.field_value(self.pod, item["fieldRef"]["fieldPath"])
            else:
                reference = item["resourceFieldRef"]
                value = env.resource_value(self.pod, {}, reference, self._allocatable)
            files[item["path"]] = value.encode()
        return files

    async def _token(self, volume: str, source: Object) -> str:
        known = self._tokens.get((volume, source["path"]))
        if known and time.time() < known[1]:
            return known[0]
        account = self.pod["spec"].get("serviceAccountName") or "default"
        seconds = int(source.get("expirationSeconds") or TOKEN_SECONDS)
        metadata = self.pod["metadata"]
        spec: Object = {
            "expirationSeconds": seconds,
            "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": metadata["name"], "uid": metadata["uid"]},
        }
        if source.get("audience"):
            spec["audiences"] = [source["audience"]]
        try:
            answer = await self._api.create(
                f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token",
                {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
            )
        except ApiError as error:
            raise VolumeError(f"no token for ServiceAccount {account}: {error}") from error
        token = str(answer["status"]["token"])
        self._tokens[volume, source["path"]] = (token, time.time() + 0.8 * seconds)
        return token


def _machine_path(volume: str, path: str, read_only: bool) -> Source:
    """The real directory that a PersistentVolume names."""
    if not os.path.isdir(path):
        raise VolumeError(f"PersistentVolume {volume}: {path} is not a directory of this machine")
    return Source(Path(path), read_only)


def _chosen(files: dict[str, bytes], source: Object, what: str) -> dict[str, bytes]:
    """The files of a ConfigMap or Secret under the paths that `items` gives them."""
    if not source.get("items"):
        return files
    chosen = {}
    for item in source["items"]:
        if item["key"] in files:
            chosen[item["path"]] = files[item["key"]]
        elif not source.get("optional"):
            raise VolumeError(f"{what} has no key {item['key']}")
    return chosen


def _publish(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make `directory` show exactly these files, in one step for whoever reads `..data`."""
    data = directory / "..data"
    if data.exists() and _content(data) == dict(files):
        return
    generation = directory / f"..{time.time_ns()}"
    for name, content in files.items():
        target = generation / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    generation.mkdir(parents=True, exist_ok=True)
    old = os.path.realpath(data) if data.exists() else None
    fresh = directory / "..data_tmp"
    fresh.symlink_to(generation.name)
    fresh.replace(data)
    tops = {name.split("/")[0] for name in files}
    for top in tops:
        if not (directory / top).is_symlink():
            (directory / top).symlink_to(f"..data/{top}")
    for entry in directory.iterdir():
        if not entry.name.startswith("..") and entry.name not in tops:
            entry.unlink()
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
