"""`make demo`: a manifest goes in, packed replicas that answer come out, on this machine and with nothing but Python.

It starts the sandbox with the embedded control plane, the operator in it, applies a sample manifest as a user would, prints what happens
while it happens, and ends with the tables that `kubectl get llm,bprof,gpack -o wide` would print, the conditions, and a completion.
Nothing here decides anything: all that is printed is read from the API or answered by the Service.
"""

from __future__ import annotations

import argparse
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from tightship.api.v1alpha1.labels import API_VERSION
from tightship.sandbox.cluster import Sandbox

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
GROUP_PATH = f"/apis/{API_VERSION}"
SAMPLES = {"simulated": "llmservice-opt.yaml", "vllm": "llmservice-cpu.yaml"}
BUDGETS = {"simulated": "90s", "vllm": "6m"}
TIMEOUT = 600.0
"""Seconds after which the demo gives up and shows what it sees."""
TERMINAL_REASONS = (
    "InvalidSpec",
    "UnsupportedAccelerator",
    "NameConflict",
    "EngineFailed",
    "SLOInfeasible",
    "InsufficientMemory",
)


class Demo:
    """One run: the API as seen from outside the sandbox, a clock that starts with it, and what was already printed."""

    def __init__(self, sandbox: Sandbox, manifest: Mapping[str, Any]) -> None:
        self.api = client(Path(sandbox.kubeconfig))
        self.sandbox = sandbox
        self.manifest = manifest
        self.name = str(manifest["metadata"]["name"])
        self.namespace = str(manifest["metadata"].get("namespace", "default"))
        self.began = time.monotonic()
        self.printed: set[tuple[str, ...]] = set()

    def say(self, text: str) -> None:
        """One line of progress, with the seconds since the start."""
        sys.stdout.write(f"{time.monotonic() - self.began:6.1f} s  {text}\n")
        sys.stdout.flush()

    def once(self, *key: str) -> bool:
        """True the first time it is asked for this key."""
        new = key not in self.printed
        self.printed.add(key)
        return new

    def get(self, path: str, **headers: str) -> dict[str, Any]:
        """An object of the API; {} where there is none."""
        response = self.api.get(path, headers=headers)
        if response.status_code == httpx.codes.NOT_FOUND:
            return {}
        return dict(response.raise_for_status().json())

    def path(self, plural: str, name: str = "") -> str:
        """Path of our kinds in the demo's namespace."""
        return f"{GROUP_PATH}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def apply(self) -> None:
        """Server-side apply of the manifest, as `kubectl apply --server-side` does it."""
        response = self.api.patch(
            self.path("llmservices", self.name),
            params={"fieldManager": "demo", "force": "true"},
            content=yaml.safe_dump(dict(self.manifest)),
            headers={"Content-Type": "application/apply-patch+yaml"},
        )
        if response.is_error:
            raise SystemExit(f"the manifest was refused: {response.json().get('message', response.text)}")

    def follow(self) -> bool:
        """Print conditions and points as they come, until the service is Ready (True) or can't become so (False)."""
        while time.monotonic() - self.began < TIMEOUT:
            service = self.get(self.path("llmservices", self.name))
            for line in self._news(service):
                self.say(line)
            conditions = {entry["type"]: entry for entry in service.get("status", {}).get("conditions", [])}
            if conditions.get("Ready", {}).get("status") == "True":
                return True
            if any(entry["status"] == "False" and entry["reason"] in TERMINAL_REASONS for entry in conditions.values()):
                return False
            time.sleep(0.5)
        self.say(f"gave up after {TIMEOUT:.0f} s")
        return False

    def _news(self, service: Mapping[str, Any]) -> Iterator[str]:
        status = service.get("status", {})
        profile_name = status.get("profile", {}).get("name")
        profile = self.get(self.path("batchprofiles", profile_name)) if profile_name else {}
        for point in sorted(profile.get("status", {}).get("points", []), key=lambda point: int(point["batch"])):
            if self.once("point", str(point["batch"])):
                latency = point.get("interTokenLatency", {}).get("mean", "?")
                rate = float(point.get("totalTokensPerSecond", point.get("outputTokensPerSecond", 0)))
                yield f"measured  batch {point['batch']:>4}: {rate:9.1f} tokens/s, {latency} between tokens"
        for entry in status.get("conditions", []):
            if entry["type"] not in ("Ready", "Reconciling") and self.once(
                entry["type"], entry["status"], entry["reason"]
            ):
                yield f"{entry['type']}={entry['status']} {entry['reason']}: {entry['message']}"
        ready, wanted = status.get("readyReplicas", 0), service.get("spec", {}).get("replicas", 0)
        if ready and self.once("ready", str(ready)):
            yield f"{ready} of {wanted} replicas ready"

    def report(self) -> None:
        """What a user would ask kubectl for at the end."""
        for title, path in (
            ("kubectl get llm -o wide", self.path("llmservices")),
            ("kubectl get bprof -o wide", self.path("batchprofiles")),
            ("kubectl get gpack -o wide", f"{GROUP_PATH}/gpupacks"),
            ("kubectl get pods", f"/api/v1/namespaces/{self.namespace}/pods"),
        ):
            wide = "wide" in title
            sys.stdout.write(f"\n$ {title}\n" + "\n".join(table(self.get(path, Accept=TABLE), wide=wide)) + "\n")
        service = self.get(self.path("llmservices", self.name))
        sys.stdout.write(f"\nConditions of {self.name}:\n")
        for entry in service.get("status", {}).get("conditions", []):
            sys.stdout.write(f"  {entry['type']:<13} {entry['status']:<6} {entry['reason']:<22} {entry['message']}\n")

    def complete(self) -> None:
        """One completion through the Service."""
        model = self.manifest["spec"]["model"]
        body = {
            "model": model.get("servedName") or model["source"].rsplit("/", 1)[-1],
            "prompt": "The ship",
            "max_tokens": 16,
        }
        url = f"{self.sandbox.gateway_url}/{self.namespace}/{self.name}/v1/completions"
        sys.stdout.write(f"\n$ curl {url} -H 'Content-Type: application/json' -d '{json_text(body)}'\n")
        answer = httpx.post(url, json=body, timeout=120).raise_for_status()
        sys.stdout.write(answer.text.strip() + "\n")


def client(kubeconfig: Path) -> httpx.Client:
    """An HTTP client for the cluster of a kubeconfig, as its user."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    trusted = ssl.create_default_context(cafile=cluster["certificate-authority"])
    headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
    return httpx.Client(base_url=cluster["server"], verify=trusted, headers=headers, timeout=30)


def json_text(body: Mapping[str, Any]) -> str:
    """The body as one line, for a shell."""
    return httpx.Request("POST", "http://localhost", json=dict(body)).content.decode()


def table(answer: Mapping[str, Any], *, wide: bool) -> list[str]:
    """A Kubernetes Table as lines of aligned columns; columns of lower priority only when `wide`."""
    columns = answer.get("columnDefinitions", [])
    shown = [index for index, column in enumerate(columns) if wide or not column.get("priority")]
    rows = [[columns[index]["name"].upper() for index in shown]]
    rows += [
        ["" if row["cells"][index] is None else str(row["cells"][index]) for index in shown]
        for row in answer.get("rows", [])
    ]
    widths = [max(len(row[index]) for row in rows) for index in range(len(shown))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def load_manifest(path: Path, budget: str) -> dict[str, Any]:
    """The LLMService of a sample file, with its profiling budget cut to what a demo takes."""
    documents = [
        document
        for document in yaml.safe_load_all(path.read_text())
        if document and document.get("kind") == "LLMService"
    ]
    manifest: dict[str, Any] = documents[0]
    manifest["spec"].setdefault("profiling", {})["budget"] = budget
    return manifest


def make_model(models: Path, script: Path, engine_python: str) -> None:
    """The small Llama, with random weights, that the real engine serves here."""
    target = models / "small-llama"
    if not (target / "config.json").exists():
        subprocess.run([engine_python, str(script), str(target)], check=True)


def run(args: argparse.Namespace) -> int:
    """Run the demo; exit status 0 when the service became Ready and answered."""
    manifest = load_manifest(args.samples / SAMPLES[args.engine], args.budget or BUDGETS[args.engine])
    with tempfile.TemporaryDirectory(prefix="tightship-demo-") as state:
        models = Path(state) / "models"
        models.mkdir()
        if args.engine == "vllm":
            sys.stdout.write("making a small Llama with random weights ...\n")
            make_model(models, args.model_script, args.engine_python)
        sys.stdout.write("starting the sandbox (embedded control plane, two nodes with two simulated GPUs each) ...\n")
        with Sandbox(
            plane="embedded",
            state=Path(state) / "sandbox",
            operator=True,
            models=str(models),
            engine_python=args.engine_python,
            engine_cores=[max(os.sched_getaffinity(0))] if args.engine == "vllm" else [],
        ) as sandbox:
            demo = Demo(sandbox, manifest)
            demo.say(f"the sandbox is up; KUBECONFIG={sandbox.kubeconfig}")
            demo.apply()
            demo.say(f"applied {SAMPLES[args.engine]} (profiling budget {manifest['spec']['profiling']['budget']})")
            ready = demo.follow()
            demo.report()
            if ready:
                demo.complete()
                demo.say("done")
            return 0 if ready else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    root = Path.cwd()
    parser = argparse.ArgumentParser(
        prog="python -m tightship.sandbox.demo", description="From a manifest to packed replicas that answer."
    )
    parser.add_argument(
        "--engine", choices=sorted(SAMPLES), default="simulated", help="simulated GPUs, or real vLLM on the CPU"
    )
    parser.add_argument("--budget", help="profiling budget (default: 90s simulated, 6m real)")
    parser.add_argument(
        "--samples", type=Path, default=root / "docs" / "samples", help="folder of the sample manifests"
    )
    parser.add_argument(
        "--model-script", type=Path, default=root / "scripts" / "make_small_llama.py", help="makes the small model"
    )
    parser.add_argument(
        "--engine-python",
        default=str(root / ".venv-vllm" / "bin" / "python"),
        help="interpreter that has vLLM's CPU build",
    )
    try:
        return run(parser.parse_args(argv))
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped\n")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
