"""The life of one container: pulled, started, probed, ended, started again.

A container is never started twice at once, and `state` always says what the latest start does. A restart waits as the
kubelet's does: the first comes at once, the next ones after a delay that doubles, counted from the end of the last run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightship.sandbox.agent import env, logs, probes, rootfs
from tightship.sandbox.agent.api import ApiError, Object
from tightship.sandbox.agent.devices import Given, Grant
from tightship.sandbox.agent.events import Event, now
from tightship.sandbox.agent.host import Host
from tightship.sandbox.agent.netns import PodNetwork
from tightship.sandbox.agent.runtime import ContainerSpec, Exit, Running, StartError
from tightship.sandbox.agent.status import ContainerState, Terminated
from tightship.sandbox.agent.volumes import VolumeError, Volumes
from tightship.sandbox.images import ImageEnvironment

log = logging.getLogger(__name__)
MESSAGE_LIMIT = 4096
FALLBACK_LINES, FALLBACK_BYTES = 80, 2048
IMAGE_DELAY = 1.0


@dataclass(frozen=True)
class PodParts:
    """What the containers of one pod have in common. `changed` is called whenever a container's state did."""

    host: Host
    pod: Callable[[], Object]
    volumes: Volumes
    network: PodNetwork | None
    address: str
    changed: Callable[[], None]
    given: Mapping[str, Given] = field(default_factory=dict)
    """What claims give, by the pod's names for them."""


class Container:
    """Runs one container of a pod; `state` says what it does."""

    def __init__(self, parts: PodParts, spec: Object, state: ContainerState, grant: Grant, directory: Path) -> None:
        self._host = parts.host
        self._pod = parts.pod
        self.spec = spec
        self.state = state
        self._grant = grant
        asked = [each["name"] for each in (spec.get("resources") or {}).get("claims") or []]
        self._given = [parts.given[name] for name in asked if name in parts.given]
        self._volumes = parts.volumes
        self._network = parts.network
        self._address = parts.address
        self._directory = directory
        self._changed = parts.changed
        self._init = spec in (parts.pod()["spec"].get("initContainers") or [])
        self._stopping = asyncio.Event()
        self.running: Running | None = None
        self.alive = asyncio.Event()
        self._delay = 0.0
        self._message_file = directory / "termination-log"

    # -- what the pod asks for ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until the restart policy says it is over, or until `stop`."""
        while not self._stopping.is_set():
            image = await self._pull()
            if image is None:
                return
            spec = await self._prepare(image)
            if spec is None:
                return
            await self._run_once(spec)
            if not self._restarts():
                self.state.finished_for_good = True
                self._changed()
                return
            await self._back_off()

    async def stop(self, grace: float, why: str) -> None:
        """End the container: preStop, SIGTERM, and SIGKILL when the grace period (seconds) is over."""
        self._stopping.set()
        if self.running is not None:
            await self._end(self.running, grace, why)

    # -- starting -------------------------------------------------------------------------------------------------

    def _log(self, number: int) -> Path:
        return self._directory / f"{number}.log"

    async def _pull(self) -> ImageEnvironment | None:
        """The image's environment; as long as there is none, ErrImagePull and ImagePullBackOff in turn."""
        name = self.spec["image"]
        delay = self._host.timing.backoff_first
        while not self._stopping.is_set():
            try:
                image = await asyncio.to_thread(self._host.resolve, name, self._host.name)
                why = "the sandbox has no such image"
            except Exception as error:
                log.exception("resolving image %s", name)
                image, why = None, str(error)
            if image is not None:
                self._event("Normal", "Pulled", f'Container image "{name}" already present on machine')
                return image
            message = f'Failed to pull image "{name}": {why}'
            self._event("Warning", "Failed", message)
            self._wait("ErrImagePull", message)
            await self._sleep(min(IMAGE_DELAY, delay))
            self._event("Normal", "BackOff", f'Back-off pulling image "{name}"')
            self._wait("ImagePullBackOff", f'Back-off pulling image "{name}"')
            await self._sleep(delay)
            delay = min(2 * delay, self._host.timing.backoff_max)
        return None

    async def _prepare(self, image: ImageEnvironment) -> ContainerSpec | None:
        """Resolve environment and mounts; waits with CreateContainerConfigError until every reference is there."""
        while not self._stopping.is_set():
            try:
                return await self._resolve(image)
            except (env.ConfigError, VolumeError, ApiError) as error:
                self._event("Warning", "Failed", f"Error: {error}")
                self._wait("CreateContainerConfigError", str(error))
                await self._sleep(self._host.timing.retry)
        return None

    async def _resolve(self, image: ImageEnvironment) -> ContainerSpec:
        pod = self._pod()
        references = await self._references()
        scope = env.Scope(pod, self.spec, lambda *key: references.get(key), self._host.allocatable)
        own = env.resolve(scope, self._base(pod)) | self._injected(pod)
        variables = image.merged(own)
        command = list(self.spec.get("command") or []) + list(self.spec.get("args") or [])
        directory = self._directory / f"run-{self.state.restarts}"
        return ContainerSpec(
            pod_uid=pod["metadata"]["uid"],
            name=self.spec["name"],
            argv=[env.expand(word, variables) for word in command],
            env=variables,
            cwd=self.spec.get("workingDir") or "/",
            hostname=pod["spec"].get("hostname") or pod["metadata"]["name"],
            mounts=[
                *rootfs.base_mounts(),
                *self._own_mounts(pod),
                *(mount for given in self._given for mount in given.mounts),
                *self._volumes.mounts(self.spec, variables),
            ],
            cpus=self._host.cores.of(len(self._grant.cpus)),
            log=self._log(self.state.restarts),
            network=self._network,
            directory=directory,
        )

    async def _references(self) -> dict[tuple[str, str], dict[str, str] | None]:
        """The ConfigMaps and Secrets that the environment refers to."""
        wanted: set[tuple[str, str]] = set()
        for source in self.spec.get("envFrom") or []:
            kind = "configmap" if "configMapRef" in source else "secret"
            wanted.add((kind, source[f"{'configMap' if kind == 'configmap' else kind}Ref"]["name"]))
        for entry in self.spec.get("env") or []:
            source = entry.get("valueFrom") or {}
            for kind, key in (("configmap", "configMapKeyRef"), ("secret", "secretKeyRef")):
                if key in source:
                    wanted.add((kind, source[key]["name"]))
        return {key: await self._volumes.read(*key) for key in wanted}

    def _base(self, pod: Object) -> dict[str, str]:
        links = pod["spec"].get("enableServiceLinks", True)
        values = {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "HOSTNAME": pod["spec"].get("hostname") or pod["metadata"]["name"],
        }
        values |= env.service_variables(self._host.services, pod["metadata"]["namespace"], links)
        values |= self._host.variables
        if self._grant.gpus:
            values["NVIDIA_VISIBLE_DEVICES"] = ",".join(self._grant.gpus)
        for given in self._given:
            values |= given.env
        return values

    def _injected(self, pod: Object) -> dict[str, str]:
        """What NVIDIA's NRI plugin adds to a container that its pod's annotation asks a GPU for, whatever its environment says."""
        asked = (pod["metadata"].get("annotations") or {}).get(f"nvidia.cdi.k8s.io/container.{self.spec['name']}")
        return {"NVIDIA_VISIBLE_DEVICES": asked} if asked else {}

    def _own_mounts(self, pod: Object) -> list[rootfs.Mount]:
        """The termination message's file and the pod's /etc/hosts."""
        self._message_file.parent.mkdir(parents=True, exist_ok=True)
        self._message_file.write_text("")
        path = self.spec.get("terminationMessagePath") or "/dev/termination-log"
        hosts = self._directory / "hosts"
        name = pod["spec"].get("hostname") or pod["metadata"]["name"]
        hosts.write_text(f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{self._address}\t{name}\n")
        return [
            rootfs.Mount(path, str(self._message_file), is_file=True),
            rootfs.Mount("/etc/hosts", str(hosts), is_file=True),
        ]

    # -- one run --------------------------------------------------------------------------------------------------

    async def _run_once(self, spec: ContainerSpec) -> None:
        if not spec.argv:
            self._ended(
                Exit(128, "StartError"), None, "no command: the sandbox's images have no entry point of their own"
            )
            return
        try:
            running = await self._host.runtime.start(spec)
        except (StartError, OSError) as error:
            self._event("Warning", "Failed", f"Error: {error}")
            self._ended(Exit(128, "StartError"), None, f"failed to create containerd task: {error}")
            return
        started = now()
        state = self.state
        state.running_since, state.terminated, state.id = started, None, f"sandbox://{running.id}"
        state.started = "startupProbe" not in self.spec
        state.ready = state.started and "readinessProbe" not in self.spec
        self.running = running
        self.alive.set()
        self._event("Normal", "Created", f"Created container {state.name}")
        self._event("Normal", "Started", f"Started container {state.name}")
        self._changed()
        began = time.monotonic()
        helpers = [asyncio.create_task(helper) for helper in self._helpers(running)]
        try:
            if self._stopping.is_set():
                running.kill()
            outcome = await asyncio.shield(running.exit)
        except asyncio.CancelledError:
            running.kill()
            raise
        finally:
            self.running = None
            self.alive.clear()
            for helper in helpers:
                helper.cancel()
        if time.monotonic() - began > self._host.timing.backoff_reset:
            self._delay = 0.0
        self._ended(outcome, started, self._message(outcome))

    def _helpers(self, running: Running) -> list[Coroutine[Any, Any, None]]:
        """What goes on beside the container: postStart and probes."""
        found: list[Coroutine[Any, Any, None]] = []
        if (hook := (self.spec.get("lifecycle") or {}).get("postStart")) is not None:
            found.append(self._post_start(hook, running))
        if not self._init:
            found.append(self._probe(running))
        return found

    async def _post_start(self, hook: Object, running: Running) -> None:
        if failure := await self._hook(hook, running, 30):
            self._event("Warning", "FailedPostStartHook", failure)
            await self._end(running, self._grace({}), "failed post-start hook")

    async def _probe(self, running: Running) -> None:
        """Startup first; readiness and liveness once it has succeeded."""
        if (startup := self.spec.get("startupProbe")) is not None:
            await self._start_up(startup, running)
            self.state.started = True
            self.state.ready = "readinessProbe" not in self.spec
            self._changed()
        tasks = []
        if (readiness := self.spec.get("readinessProbe")) is not None:
            tasks.append(self._watch("Readiness", readiness, running, self._set_ready))
        if (liveness := self.spec.get("livenessProbe")) is not None:
            tasks.append(
                self._watch("Liveness", liveness, running, lambda ok: self._judge("liveness", liveness, ok, running))
            )
        await asyncio.gather(*tasks)

    async def _start_up(self, probe: Object, running: Running) -> None:
        done = asyncio.Event()

        def report(good: bool) -> None:
            if good:
                done.set()
            self._judge("startup", probe, good, running)

        watching = asyncio.create_task(self._watch("Startup", probe, running, report))
        try:
            await done.wait()
        finally:
            watching.cancel()

    async def _watch(self, name: str, probe: Object, running: Running, report: Callable[[bool], None]) -> None:
        def unhealthy(failure: str) -> None:
            self._event("Warning", "Unhealthy", f"{name} probe failed: {failure}")

        async def attempt() -> str | None:
            return await self._host.prober.attempt(probe, self.spec, self._address, running)

        await probes.watch(probe, attempt, report, unhealthy, self._host.timing.probe_unit)

    def _set_ready(self, good: bool) -> None:
        if self.state.ready != good:
            self.state.ready = good
            self._changed()

    def _judge(self, name: str, probe: Object, good: bool, running: Running) -> None:
        if good or self.running is not running or self._ending is running:
            return
        self._ending = running
        why = f"Container {self.state.name} failed {name} probe, will be restarted"
        self._background = asyncio.create_task(self._end(running, self._grace(probe), why))

    _ending: Running | None = None
    _background: asyncio.Task[None] | None = None

    def _grace(self, probe: Object) -> float:
        own = probe.get("terminationGracePeriodSeconds")
        return float(self._pod()["spec"].get("terminationGracePeriodSeconds", 30) if own is None else own)

    async def _end(self, running: Running, grace: float, why: str) -> None:
        """preStop, SIGTERM, SIGKILL; returns when the container is gone."""
        self._event("Normal", "Killing", why)
        self._ending = running
        deadline = time.monotonic() + grace
        hook = (self.spec.get("lifecycle") or {}).get("preStop")
        if hook is not None and grace > 0 and (failure := await self._hook(hook, running, grace)):
            self._event("Warning", "FailedPreStopHook", failure)
        if grace > 0:
            running.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(running.exit), max(0.0, deadline - time.monotonic()))
            return
        running.kill()
        await asyncio.shield(running.exit)

    async def _hook(self, hook: Object, running: Running, limit: float) -> str | None:
        """Run a lifecycle hook; returns what failed."""
        if "sleep" in hook:
            await asyncio.sleep(min(limit, float(hook["sleep"].get("seconds") or 0)))
            return None
        return await self._host.prober.attempt({**hook, "timeoutSeconds": limit}, self.spec, self._address, running)

    # -- ending ---------------------------------------------------------------------------------------------------

    def _ended(self, outcome: Exit, started: str | None, message: str) -> None:
        state = self.state
        state.terminated = Terminated(outcome.code, outcome.reason, message, started or now(), now(), state.id)
        state.running_since = None
        state.ready = state.started = False
        if self._init and outcome.code == 0:
            state.ready = True
        self._changed()

    def _message(self, outcome: Exit) -> str:
        try:
            message = self._message_file.read_bytes()[:MESSAGE_LIMIT].decode(errors="replace")
        except OSError:
            message = ""
        fallback = self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not message and fallback and outcome.code != 0:
            message = logs.tail_text(self._log(self.state.restarts), FALLBACK_LINES, FALLBACK_BYTES)
        return message

    def _restarts(self) -> bool:
        if self._stopping.is_set():
            return False
        policy = self._pod()["spec"].get("restartPolicy", "Always")
        failed = self.state.terminated is not None and self.state.terminated.exit_code != 0
        if self._init:
            return failed and policy != "Never"
        return bool(policy == "Always" or (policy == "OnFailure" and failed))

    async def _back_off(self) -> None:
        state = self.state
        if self._delay:
            name = f"{state.name} in pod {self._pod()['metadata']['name']}"
            state.last, state.terminated = state.terminated, None
            self._event("Warning", "BackOff", "Back-off restarting failed container")
            self._wait("CrashLoopBackOff", f"back-off {self._delay:g}s restarting failed container={name}")
            await self._sleep(self._delay)
        else:
            state.last = state.terminated
        self._delay = min(2 * self._delay or self._host.timing.backoff_first, self._host.timing.backoff_max)
        if not self._stopping.is_set():
            state.restarts += 1

    def _wait(self, reason: str, message: str) -> None:
        if self.state.terminated is not None:
            self.state.last, self.state.terminated = self.state.terminated, None
        self.state.waiting, self.state.message = reason, message
        self._changed()

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _event(self, kind: str, reason: str, message: str) -> None:
        section = "initContainers" if self._init else "containers"
        about = {"kind": "Pod", "metadata": self._pod()["metadata"]}
        field = f"spec.{section}{{{self.state.name}}}"
        self._host.recorder.emit(Event(self._host.name, about, kind, reason, message, field))
