"""The life of one pod on a node: admitted, set up, run, reported, ended.

One task per pod walks this way; another writes the status whenever something changed, always the whole of it, and never
twice the same. A pod that the API server has marked for deletion is deleted from it only after nothing of it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import shutil
from pathlib import Path

import aiohttp

from tightship.sandbox.agent import netns, status
from tightship.sandbox.agent.api import ApiError, Object
from tightship.sandbox.agent.container import Container, PodParts
from tightship.sandbox.agent.devices import Given, PrepareError, Refused, qos_class
from tightship.sandbox.agent.env import ConfigError
from tightship.sandbox.agent.events import Event, now
from tightship.sandbox.agent.host import Host
from tightship.sandbox.agent.status import ContainerState, Terminated
from tightship.sandbox.agent.volumes import VolumeError, Volumes

log = logging.getLogger(__name__)

FINISHED = ("Succeeded", "Failed")
GONE_GRACE = 2.0
"""Seconds that containers get whose pod was removed from the API server without a word."""


class PodWorker:
    """Takes care of one pod from the moment it is bound to the node until it is gone."""

    def __init__(self, host: Host, pod: Object) -> None:
        self._host = host
        self.pod = pod
        self.uid = str(pod["metadata"]["uid"])
        self.directory = host.directory / "pods" / self.uid
        self.containers: dict[str, Container] = {}
        self.address = ""
        self._network: netns.PodNetwork | None = None
        self._phase = ""
        self._reason = ""
        self._message = ""
        self._leaving = asyncio.Event()
        self._evicting = asyncio.Event()
        self._removed = False
        self._dirty = asyncio.Event()
        self._written: Object | None = None
        earlier = (
            (pod.get("status") or {}).get("initContainerStatuses"),
            (pod.get("status") or {}).get("containerStatuses"),
        )
        policy = pod["spec"].get("restartPolicy", "Always")
        self._inits = [_state(c, earlier[0] or [], "Always") for c in pod["spec"].get("initContainers") or []]
        self._mains = [_state(c, earlier[1] or [], policy) for c in pod["spec"]["containers"]]
        self._started = str((pod.get("status") or {}).get("startTime") or now())
        self._tasks = [asyncio.create_task(self._write_status())]
        self.task = asyncio.create_task(self._run())

    # -- what the agent tells -------------------------------------------------------------------------------------

    def update(self, pod: Object) -> None:
        """The API server's pod changed."""
        self.pod = pod
        if pod["metadata"].get("deletionTimestamp"):
            self._leaving.set()
        self._changed()

    def removed(self) -> None:
        """The API server's pod is gone."""
        self._removed = True
        self._leaving.set()

    def evict(self, message: str) -> None:
        """End the pod for want of something on the node, as the kubelet does under pressure; it stays as Failed."""
        self._message = message
        self._evicting.set()

    def log_file(self, container: str, previous: bool) -> Path:
        """The log of a container's latest start, or of the one before it. Raises KeyError when it has no such container."""
        state = {state.name: state for state in [*self._inits, *self._mains]}[container]
        directory = self.directory / "containers" / container
        latest = directory / f"{state.restarts}.log"
        if not previous and (latest.exists() or not state.restarts):
            return latest
        return directory / f"{state.restarts - 1}.log"  # also while it waits for its next start, as the kubelet does

    def processes(self) -> dict[str, list[int]]:
        """Process IDs by container name."""
        running = {name: container.running for name, container in self.containers.items()}
        return {name: current.processes() for name, current in running.items() if current is not None}

    # -- the way of a pod -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._phase = str((self.pod.get("status") or {}).get("phase") or "")
        if self.pod["metadata"].get("deletionTimestamp"):
            self._leaving.set()
        try:
            if self._phase in FINISHED:
                self._reason = str(self.pod["status"].get("reason") or "")
                self._message = str(self.pod["status"].get("message") or "")
            elif not self._leaving.is_set():
                await self._live()
            if self._phase in FINISHED:
                self._give_back()
            await self._leaving.wait()
            await self._finish()
        finally:
            for task in self._tasks:
                task.cancel()
            self._give_back()
            if self._removed:
                await asyncio.to_thread(shutil.rmtree, self.directory, True)

    async def _live(self) -> None:
        """Run the containers until they are through, the pod is deleted, or its time is up."""
        life = asyncio.create_task(self._containers())
        leaving = asyncio.create_task(self._leaving.wait())
        evicting = asyncio.create_task(self._evicting.wait())
        try:
            done, _ = await asyncio.wait(
                {life, leaving, evicting}, timeout=self._time_left(), return_when=asyncio.FIRST_COMPLETED
            )
            if life in done:
                life.result()
                return
            expired = not done
            await self._stop_all("DeadlineExceeded" if expired else "Stopping container")
            if not self.containers:
                life.cancel()  # it was still waiting for a volume
            await asyncio.wait({life})
            if expired:
                self._fail("DeadlineExceeded", "Pod was active on the node longer than the specified deadline")
            elif evicting in done:
                self._fail("Evicted", self._message)
        except Refused as refusal:
            self._event("Warning", refusal.reason, str(refusal))
            self._fail(refusal.reason, f"Pod was rejected: {refusal}" if refusal.reason != "OutOfcpu" else str(refusal))
        finally:
            leaving.cancel()
            evicting.cancel()
            life.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refused):
                await life

    async def _containers(self) -> None:
        grants = self._host.stock.admit(self.pod)
        self._phase = "Pending"
        self._changed()
        await self._connect()
        self._changed()
        volumes = self._host.volumes(
            self._host.api, self.pod, self.directory, self._host.directory / "root", self._host.allocatable
        )
        await self._set_up(volumes)
        given = await self._prepare_claims()
        if self._leaving.is_set():
            return
        self._tasks.append(asyncio.create_task(self._refresh(volumes)))
        inits = self.pod["spec"].get("initContainers") or []
        mains = self.pod["spec"]["containers"]
        parts = PodParts(self._host, self._seen, volumes, self._network, self.address, self._changed, given)
        for spec, state in zip([*inits, *mains], [*self._inits, *self._mains], strict=True):
            name = spec["name"]
            directory = self.directory / "containers" / name
            self.containers[name] = Container(parts, spec, state, grants[name], directory)
        for spec, state in zip(inits, self._inits, strict=True):
            await self.containers[spec["name"]].run()
            if state.terminated is None or state.terminated.exit_code != 0:
                self._conclude()
                return
        await asyncio.gather(*(self.containers[spec["name"]].run() for spec in mains if not self._over(spec["name"])))
        self._conclude()

    def _over(self, name: str) -> bool:
        """Whether a container ended under an earlier agent, and its restart policy leaves it at that."""
        run = self.containers[name].state.terminated
        policy = self.pod["spec"].get("restartPolicy", "Always")
        return run is not None and (policy == "Never" or (policy == "OnFailure" and run.exit_code == 0))

    def _conclude(self) -> None:
        if not self._leaving.is_set():
            self._phase = status.phase(self.pod["spec"].get("restartPolicy", "Always"), self._inits, self._mains)
            self._changed()

    async def _connect(self) -> None:
        """Give the pod its address; a pod of the host's network has the node's."""
        if self.pod["spec"].get("hostNetwork"):
            self.address = self._host.address
            return
        self.address = self._host.addresses.take()
        while self._host.connect is not None and self._network is None:
            try:
                self._network = await self._host.connect(self.address)
            except OSError as error:
                self._event("Warning", "FailedCreatePodSandBox", f"Failed to create pod sandbox: {error}")
                await asyncio.sleep(self._host.timing.retry)

    async def _set_up(self, volumes: Volumes) -> None:
        while True:
            try:
                volumes.pod = self._seen()
                await volumes.set_up()
                return
            except (VolumeError, ConfigError, ApiError, aiohttp.ClientError, OSError) as error:
                self._event("Warning", "FailedMount", f"MountVolume.SetUp failed: {error}")
                await asyncio.sleep(self._host.timing.retry)

    async def _prepare_claims(self) -> dict[str, Given]:
        while self._host.claims is not None and self.pod["spec"].get("resourceClaims"):
            try:
                return await self._host.claims.prepare(self.pod)
            except PrepareError as error:
                self._event("Warning", "FailedPrepareDynamicResources", f"Failed to prepare dynamic resources: {error}")
                await asyncio.sleep(self._host.timing.retry)
        return {}

    async def _refresh(self, volumes: Volumes) -> None:
        while True:
            await asyncio.sleep(self._host.timing.refresh)
            try:
                volumes.pod = self._seen()
                await volumes.refresh()
            except (VolumeError, ConfigError, ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                log.info("refreshing volumes of %s: %s", self.pod["metadata"]["name"], error)

    def _seen(self) -> Object:
        """The pod with the addresses that its status will have."""
        own = {"hostIP": self._host.address, "podIP": self.address, "podIPs": [{"ip": self.address}]}
        return {**self.pod, "status": {**(self.pod.get("status") or {}), **own}}

    def _time_left(self) -> float | None:
        limit = self.pod["spec"].get("activeDeadlineSeconds")
        if limit is None:
            return None
        started = datetime.datetime.fromisoformat(self._started.replace("Z", "+00:00"))
        passed = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
        return max(0.0, float(limit) - passed)

    # -- the end --------------------------------------------------------------------------------------------------

    async def _stop_all(self, why: str) -> None:
        metadata = self.pod["metadata"]
        grace = metadata.get("deletionGracePeriodSeconds")
        if grace is None:
            grace = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
        if self._removed:
            grace = min(GONE_GRACE, grace)
        await asyncio.gather(
            *(item.stop(float(grace), f"{why} {item.state.name}") for item in self.containers.values())
        )

    async def _finish(self) -> None:
        """Report the last states, then let the API server forget the pod."""
        if self._removed:
            return
        if self._phase not in FINISHED and all(state.terminated for state in self._mains):
            failed = any(state.terminated and state.terminated.exit_code for state in self._mains)
            self._phase = "Failed" if failed else "Succeeded"
        for task in self._tasks:
            task.cancel()
        # First the devices, then the word: who reads of the end may be given them at once.
        self._give_devices_back()
        await self._patch_status()
        metadata = self.pod["metadata"]
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        while not self._removed:
            try:
                path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
                await self._host.api.request("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", **body})
                self._removed = True
            except ApiError as error:
                if error.status in (404, 409):
                    self._removed = True
                else:
                    await asyncio.sleep(self._host.timing.retry)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                await asyncio.sleep(self._host.timing.retry)

    def _give_back(self) -> None:
        self._give_devices_back()
        if self._network is not None:
            self._network.close()
            self._network = None
        if self.address and self.address != self._host.address:
            self._host.addresses.free(self.address)
            self.address = ""

    def _give_devices_back(self) -> None:
        self._host.stock.release(self.uid)
        if self._host.claims is not None:
            self._host.claims.release(self.uid)

    def _fail(self, reason: str, message: str) -> None:
        self._phase, self._reason, self._message = "Failed", reason, message
        self._changed()

    def _event(self, kind: str, reason: str, message: str) -> None:
        about = {"kind": "Pod", "metadata": self.pod["metadata"]}
        self._host.recorder.emit(Event(self._host.name, about, kind, reason, message))

    # -- status ---------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._dirty.set()

    async def _write_status(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if self._phase:
                await self._patch_status()

    def status(self) -> Object:
        """The pod's status as of now."""
        policy = self.pod["spec"].get("restartPolicy", "Always")
        if self._phase not in FINISHED:
            self._phase = status.phase(policy, self._inits, self._mains)
            if self._phase in FINISHED:
                self._phase = "Running"  # _conclude decides about the end, once all tasks are through
        before = status.with_own(self.pod, self._written)
        found: Object = {
            "phase": self._phase,
            "conditions": status.conditions(before, self._phase, self._inits, self._mains, now()),
            "hostIP": self._host.address,
            "startTime": self._started,
            "qosClass": qos_class(self.pod),
        }
        if self._reason:
            found |= {"reason": self._reason, "message": self._message}
        if self.address:
            found |= {"podIP": self.address, "podIPs": [{"ip": self.address}]}
        if self._reason not in ("OutOfcpu", "OutOfpods", "UnexpectedAdmissionError"):
            if self._inits:
                found["initContainerStatuses"] = [state.as_object() for state in self._inits]
            found["containerStatuses"] = [state.as_object() for state in self._mains]
        return found

    async def _patch_status(self) -> None:
        metadata = self.pod["metadata"]
        wanted = self.status()
        # what a watch shows late may look like a contradiction too: to write the same again changes nothing then
        if (wanted == self._written and not status.contradicted(self.pod, wanted)) or self._removed:
            return
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        try:
            await self._host.api.merge(path, {"metadata": {"uid": self.uid}, "status": wanted})
            self._written = wanted
        except ApiError as error:
            log.info("status of %s not written: %s", metadata["name"], error)
            if error.status not in (404, 409, 422):
                self._retry_later()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            log.info("status of %s not written: %s", metadata["name"], error)
            self._retry_later()

    def _retry_later(self) -> None:
        asyncio.get_running_loop().call_later(self._host.timing.retry, self._dirty.set)


def _state(spec: Object, earlier: list[Object], policy: str) -> ContainerState:
    """A container's first state; what an earlier agent reported of it becomes the last run, and the next a restart."""
    state = ContainerState(spec["name"], spec["image"])
    before = next((entry for entry in earlier if entry["name"] == spec["name"]), None)
    if before is None:
        return state
    state.restarts = int(before.get("restartCount") or 0)
    state.id = str(before.get("containerID") or "")
    inner = before.get("state") or {}
    if run := inner.get("terminated"):
        state.terminated = _terminated(run)
    elif run := inner.get("running"):
        lost = "The container was lost with the agent that ran it"
        end = Terminated(137, "ContainerStatusUnknown", lost, run.get("startedAt"), now(), state.id)
        if policy == "Never":
            state.terminated = end
        else:
            state.last = end
            state.restarts += 1
    elif run := (before.get("lastState") or {}).get("terminated"):
        state.last = _terminated(run)
        state.restarts += 1
    return state


def _terminated(run: Object) -> Terminated:
    return Terminated(
        int(run.get("exitCode") or 0),
        str(run.get("reason") or ""),
        str(run.get("message") or ""),
        run.get("startedAt"),
        run.get("finishedAt"),
        str(run.get("containerID") or ""),
    )
