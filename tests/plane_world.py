"""What the plane's tests share: a client for raw requests, a stand-in for kubelets, kubectl, and manifests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tightship.sandbox.plane import Plane
from tightship.sandbox.plane.api import DeleteOptions, Options
from tightship.sandbox.plane.values import key_of, set_condition

Obj = dict[str, Any]
HERE = Path(__file__).parent
WIDGETS = yaml.safe_load((HERE / "plane_widgets.yaml").read_text())
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"


class Client:
    """Raw requests to a plane; answers are decoded JSON with the status."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=10, trust_env=False)

    async def __call__(
        self, method: str, path: str, body: Any = None, media: str = "application/json", **query: Any
    ) -> Any:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": media, "User-Agent": "tester/1"}
        response = await self._http.request(method, path, content=content, headers=headers, params=query)
        return response.status_code, response.json()

    async def good(
        self, method: str, path: str, body: Any = None, media: str = "application/json", **query: Any
    ) -> Obj:
        """A request that must succeed; its body."""
        code, answer = await self(method, path, body, media, **query)
        assert code < 300, answer
        return dict(answer)

    async def watch(self, path: str, **query: Any) -> list[Obj]:
        """The events of a watch that ends by its own timeout."""
        response = await self._http.get(path, params={"watch": "1", **query})
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    async def close(self) -> None:
        await self._http.aclose()


class Kubelets:
    """Stands in for every node's kubelet: bound pods run and are ready, deleted ones leave.

    ``hold`` names pods that stay as they are.
    """

    def __init__(self, plane: Plane) -> None:
        self.plane, self.api = plane, plane.api
        self.pods = plane.registry.get("", "pods")
        self.hold: set[str] = set()
        self._next = 2
        self._end = plane.store.subscribe(("", "pods"), lambda change: self._later(change.object))

    def add_node(self, name: str, gpus: int = 2, cpus: int = 8) -> None:
        """Registers a ready node."""
        amounts = {"cpu": str(cpus), "memory": "64Gi", "pods": "110", "nvidia.com/gpu": str(gpus)}
        nodes = self.plane.registry.get("", "nodes")
        labels = {"kubernetes.io/hostname": name}
        status = {"capacity": amounts, "conditions": [{"type": "Ready", "status": "True"}]}
        self.api.create(nodes, "", {"metadata": {"name": name, "labels": labels}, "status": status})

    def _later(self, pod: Obj) -> None:
        asyncio.get_running_loop().call_soon(self._look, key_of(pod))

    def _look(self, key: tuple[str, str]) -> None:
        pod = self.api.find(self.pods, *key)
        if pod is None or key[1] in self.hold or not pod["spec"].get("nodeName"):
            return
        if pod["metadata"].get("deletionTimestamp"):
            self.api.delete(self.pods, *key, DeleteOptions(grace=0))
        elif pod["status"]["phase"] == "Pending":
            self.set_phase(key, "Running")

    def set_phase(self, key: tuple[str, str], phase: str, exit_code: int = 0) -> None:
        """Puts a pod into a phase, with all that follows from it."""
        self._next += 1
        address = f"10.244.1.{self._next}"

        def change(pod: Obj) -> None:
            status = pod.setdefault("status", {})
            status["phase"] = phase
            status.setdefault("podIP", address)
            running = phase == "Running"
            state = {"running": {}} if running else {"terminated": {"exitCode": exit_code}}
            status["containerStatuses"] = [
                {
                    "name": entry["name"],
                    "image": entry["image"],
                    "imageID": "",
                    "ready": running,
                    "restartCount": 0,
                    "state": state,
                }
                for entry in pod["spec"]["containers"]
            ]
            set_condition(status, "Ready", "True" if running else "False")

        self.api.modify(self.pods, *key, change, Options("kubelet", subresource="status"))

    def stop(self) -> None:
        self._end()


async def eventually(check: Callable[[], Any] | Callable[[], Awaitable[Any]], seconds: float = 5.0) -> Any:
    """Waits until ``check`` gives something true; returns it. Fails with its last value."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"still {value!r} after {seconds} s"
        await asyncio.sleep(0.02)


def kubectl_path() -> str | None:
    """Where kubectl is, if this machine has it."""
    return shutil.which("kubectl")


class Kubectl:
    """Runs kubectl against a plane."""

    def __init__(self, plane: Plane, directory: Path) -> None:
        self.config = directory / "kubeconfig"
        self.config.write_text(plane.kubeconfig())
        self.directory = directory

    async def run(self, *words: str, stdin: Any = None, seconds: float = 30) -> tuple[int, str]:
        """The exit status and all output of a command; ``stdin`` is sent as YAML."""
        command = kubectl_path()
        assert command is not None
        environment = {**os.environ, "KUBECONFIG": str(self.config), "HOME": str(self.directory)}
        process = await asyncio.create_subprocess_exec(
            command,
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
        )
        text = (
            None if stdin is None else yaml.safe_dump(stdin) if isinstance(stdin, dict) else yaml.safe_dump_all(stdin)
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(text.encode() if text else b""), seconds)
        except asyncio.TimeoutError:
            process.kill()
            raise
        return process.returncode or 0, out.decode()

    async def __call__(self, *words: str, stdin: Any = None, seconds: float = 30) -> str:
        """The output of a command that must succeed."""
        code, out = await self.run(*words, stdin=stdin, seconds=seconds)
        assert code == 0, f"kubectl {' '.join(words)}: {out}"
        return out


def make_pod(name: str, gpus: int = 0, **spec: Any) -> Obj:
    """A pod with one container."""
    container: Obj = {"name": "main", "image": "engine:1"}
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [container], **spec}}


def make_template(app: str, image: str = "engine:1", **spec: Any) -> Obj:
    """A pod template with one container and the label ``app``."""
    port = {"name": "http", "containerPort": 8000}
    container = {"name": "main", "image": image, "ports": [port]}
    return {"metadata": {"labels": {"app": app}}, "spec": {"containers": [container], **spec}}


def make_set(name: str, replicas: int = 2, policy: str = "Parallel", update: str = "OnDelete") -> Obj:
    """A StatefulSet."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": policy,
            "updateStrategy": {"type": update},
            "selector": {"matchLabels": {"app": name}},
            "template": make_template(name),
        },
    }


def make_job(name: str, backoff: int = 1, **spec: Any) -> Obj:
    """A Job whose pods are not restarted in place."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": backoff, "template": make_template(name, restartPolicy="Never"), **spec},
    }


def make_widget(name: str = "a", /, **spec: Any) -> Obj:
    """A custom resource of the test's own kind."""
    return {"apiVersion": "example.dev/v1", "kind": "Widget", "metadata": {"name": name}, "spec": {"size": 3, **spec}}


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for loopback and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert, secret = directory / "tls.crt", directory / "tls.key"
    cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert, secret
