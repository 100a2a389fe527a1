"""What is reported, and where to: the profile's status, whole at every write, saved at once and never lost to an API server's absence.

Server-side apply takes back what its manager leaves out, so each write carries everything the profiler has found. What a complete profile
holds stands while it is measured again (`measurement.rerun`): the new figures are kept beside it and take its place at the end, unless the
new measurement failed. Writes happen in the background, the latest state only, and are repeated until they succeed: measuring goes on
while the API server is away. A file can take the API server's place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1.common import Model
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.labels import API_VERSION
from tightship.profiler import points
from tightship.profiler.errors import ReportError

log = logging.getLogger(__name__)

FIELD_MANAGER: Final = "tightship-profiler"
TOKEN_FILE: Final = "/var/run/secrets/tightship/token"
RETRY_LEAST: Final = 0.5
RETRY_MOST: Final = 10.0
TRIALS_MOST: Final = 256
"""The API's most: a status with more would be refused whole."""
MESSAGE_MOST: Final = 8000
"""Characters of an outcome's message."""
UNEXPECTED_MOST: Final = 5
"""How often a write may fail for a cause that nobody foresaw before the end of a profile waits for it no longer."""


class Sink(Protocol):
    """Where a profile is read from, and its status goes."""

    async def read(self) -> api.BatchProfile:
        """The profile as it is now. Raises ReportError when it is not there, or may not be read."""

    async def write(self, status: Mapping[str, Any]) -> None:
        """Make this the profiler's part of the status. Raises ReportError when it is refused."""

    async def close(self) -> None:
        """Let go of connections."""


class Away(Exception):
    """The API server can't be reached, or is not up to it now: worth another try."""


class ApiSink:
    """One BatchProfile on an API server, by server-side apply."""

    def __init__(self, base: str, namespace: str, name: str, token: Path, ca: Path | None) -> None:
        """`token` is read anew for every request, since it is short-lived and the kubelet replaces it."""
        self._namespace = namespace
        self._name = name
        self._token = token
        verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(ca)) if ca else True
        self._http = httpx.AsyncClient(base_url=base, verify=verify, timeout=10.0, trust_env=False)
        self._path = f"/apis/{API_VERSION}/namespaces/{namespace}/{api.PLURAL}/{name}"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> ApiSink:
        """The profile named by the environment of the profiling Job.

        Raises:
            ReportError: a variable is missing.
        """
        try:
            namespace, name = environ["TIGHTSHIP_PROFILE_NAMESPACE"], environ["TIGHTSHIP_PROFILE_NAME"]
            host, port = environ["KUBERNETES_SERVICE_HOST"], environ.get("KUBERNETES_SERVICE_PORT", "443")
        except KeyError as missing:
            raise ReportError(
                f"environment variable {missing.args[0]} is not set: run this in a profiling Job"
            ) from None
        token = Path(environ.get("TIGHTSHIP_TOKEN_FILE", TOKEN_FILE))
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace, name, token, token.with_name("ca.crt"))

    async def read(self) -> api.BatchProfile:
        """The profile, as soon as the API server answers."""
        delay = RETRY_LEAST
        while True:
            try:
                return api.BatchProfile.model_validate(await self._request("GET", self._path))
            except Away as away:
                log.warning("reading the profile: %s; trying again in %.1f s", away, delay)
            await asyncio.sleep(delay)
            delay = min(RETRY_MOST, 2 * delay)

    async def write(self, status: Mapping[str, Any]) -> None:
        """Apply the status once.

        Raises:
            Away: worth another try.
            ReportError: refused.
        """
        body = {
            "apiVersion": API_VERSION,
            "kind": api.KIND,
            "metadata": {"namespace": self._namespace, "name": self._name},
            "status": status,
        }
        await self._request(
            "PATCH",
            f"{self._path}/status",
            params={"fieldManager": FIELD_MANAGER, "force": "true"},
            headers={"Content-Type": "application/apply-patch+yaml"},
            content=json.dumps(body).encode(),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _request(self, method: str, path: str, headers: Mapping[str, str] | None = None, **more: Any) -> Any:
        try:
            token = self._token.read_text().strip()
            response = await self._http.request(
                method, path, headers={**(headers or {}), "Authorization": f"Bearer {token}"}, **more
            )
        except (httpx.HTTPError, OSError) as error:
            raise Away(f"{method} {path}: {str(error) or type(error).__name__}") from error
        if response.is_success:
            return response.json()
        text = f"{method} {path}: {response.status_code} {response.text[:500]}"
        # 401: the token has just expired. 403: rights reach the authorizer a moment after the Job's pod starts.
        if response.status_code >= 500 or response.status_code in (401, 403, 408, 409, 429):
            raise Away(text)
        raise ReportError(text)


class FileSink:
    """A BatchProfile manifest in a JSON file, replaced whole at every write."""

    def __init__(self, path: Path, profile: api.BatchProfile) -> None:
        """`profile`: what the file holds when there is none yet."""
        self._path = path
        self._profile = profile

    async def read(self) -> api.BatchProfile:
        """The profile in the file, or the one given."""
        if self._path.exists():
            return api.BatchProfile.model_validate_json(self._path.read_text())
        return self._profile

    async def write(self, status: Mapping[str, Any]) -> None:
        """Replace the file, so that a reader finds the old content or the new. Raises ReportError when it can't be written."""
        content = {**self._profile.to_dict(), "status": status}
        partial = self._path.with_suffix(self._path.suffix + ".part")
        try:
            partial.write_text(json.dumps(content, indent=2) + "\n")
            os.replace(partial, self._path)
        except OSError as error:
            raise ReportError(f"the profile can't be written to {self._path}: {error}") from error

    async def close(self) -> None:
        """Nothing to let go of."""


def continued(earlier: str | None, said: str) -> str:
    """A message with what was said later: that is there whole, as far as 8,000 characters go, and the earlier one gives way."""
    said = said[:MESSAGE_MOST]
    room = MESSAGE_MOST - len(said) - len("...; ")
    if not earlier or room <= 0:
        return said
    kept = earlier if len(earlier) <= room else f"{earlier[:room]}..."
    return f"{kept}; {said}"


class Report:
    """The profiler's part of the status, and its way out."""

    def __init__(self, sink: Sink, status: api.BatchProfileStatus, *, standing: api.BatchProfile | None = None) -> None:
        """What is to be reported.

        Args:
            sink: where it goes.
            status: what earlier attempts reported, and this one keeps.
            standing: the profile, where it is complete and measured again.
        """
        self._sink = sink
        self._standing = standing
        self.points: dict[int, api.Point] = {point.batch: point for point in status.points}
        self.gpu: api.ProfileGPU | None = status.gpu
        self.engine: api.ProfileEngine | None = status.engine
        self.memory: api.ProfileMemory | None = status.memory
        self.confirmation: api.Confirmation | None = status.confirmation
        self.load: api.Load | None = status.load
        self.baseline: api.Point | None = status.baseline
        self.trials: dict[tuple[int, int], api.Trial] = {(one.batch, one.replicas): one for one in status.trials}
        """By batch and replicas."""
        self.cost: api.Cost | None = status.cost
        self.progress: api.Progress | None = status.progress
        self.outcome: api.Outcome | None = _taken_back(status.outcome)
        """The earlier measurement's while it is being extended: what was found stays valid meanwhile."""
        self.gpu_seconds = float(status.gpu_seconds or 0.0)
        self._dirty = asyncio.Event()
        self._clean = asyncio.Event()
        self._clean.set()
        self._unexpected = 0
        self._hopeless = asyncio.Event()
        self._error: ReportError | None = None
        self._writer = asyncio.get_running_loop().create_task(self._write_for_ever())

    def save(self) -> None:
        """Have the present state written, as soon as the sink takes it.

        Raises:
            ReportError: an earlier state was refused.
        """
        if self._error is not None:
            raise self._error
        self._clean.clear()
        self._dirty.set()

    async def flush(self, timeout: float) -> bool:
        """Wait until all that was saved is written; False when that took too long, or fails time and again for no known cause.

        Raises:
            ReportError: it was refused.
        """
        self._unexpected = 0
        self._hopeless.clear()
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._clean, self._hopeless)]
        try:
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        if self._error is not None:
            raise self._error
        return self._clean.is_set()

    async def close(self) -> None:
        """Stop writing."""
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)
        await self._sink.close()

    def status(self) -> dict[str, Any]:
        """The profiler's part of the status, as it is written."""
        earlier = self._standing.standing if self._standing is not None else None
        if self._standing is None or earlier is None or (self.outcome is not None and self.outcome.state != "Failed"):
            return self._found() | _present(progress=self.progress, outcome=self.outcome)
        status = self._standing.status
        stands = api.Measured.model_validate(status.to_dict()).to_dict()
        if self.outcome is None:
            found = {"request": self._standing.spec.measurement.rerun, **self._found()}
            return stands | _present(progress=self.progress, outcome=_taken_back(earlier)) | {"rerun": found}
        progress = self.progress and self.progress.model_copy(update={"points": len(status.points)})
        return stands | _present(progress=progress, outcome=_in_vain(earlier, self.outcome))

    def _found(self) -> dict[str, Any]:
        """What this measurement has found."""
        status = _present(
            gpu=self.gpu,
            engine=self.engine,
            memory=self.memory,
            confirmation=self.confirmation,
            load=self.load,
            baseline=self.baseline,
            cost=self.cost,
        )
        status["points"] = [self.points[batch].to_dict() for batch in sorted(self.points)]
        if self.trials:
            status["trials"] = [self.trials[pair].to_dict() for pair in sorted(self._trials_kept())]
        status["gpuSeconds"] = points.decimal(round(self.gpu_seconds, 1), digits=1)
        return status

    def _trials_kept(self) -> list[tuple[int, int]]:
        """As many pairs as a status may hold; those that could not be tried give way, the largest first."""
        ordered = sorted(self.trials, key=lambda pair: (not points.has_figures(self.trials[pair]), pair[1], pair[0]))
        return ordered[:TRIALS_MOST]

    async def _write_for_ever(self) -> None:
        delay = RETRY_LEAST
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self._sink.write(self.status())
            except ReportError as error:
                self._error = error
                self._clean.set()
                return
            except Exception as error:  # whatever it is: a writer that ended unheard would cost the whole measurement
                self._tell(error, delay)
                self._dirty.set()
                await asyncio.sleep(delay)
                delay = min(RETRY_MOST, 2 * delay)
                continue
            delay = RETRY_LEAST
            if not self._dirty.is_set():
                self._clean.set()

    def _tell(self, error: Exception, delay: float) -> None:
        if isinstance(error, Away):
            log.warning("reporting: %s; trying again in %.1f s", error, delay)
            return
        log.error(
            "reporting failed in an unforeseen way (%s: %s); trying again in %.1f s",
            type(error).__name__,
            error,
            delay,
            exc_info=error,
        )
        self._unexpected += 1
        if self._unexpected >= UNEXPECTED_MOST:
            self._hopeless.set()


def _present(**parts: Model | None) -> dict[str, Any]:
    return {name: part.to_dict() for name, part in parts.items() if part is not None}


def _in_vain(standing: api.Outcome, failed: api.Outcome) -> api.Outcome:
    """The outcome of what stands, once the measurement that was to take its place has failed."""
    said = (
        f"the measurement that rerun {failed.rerun} asked for failed ({failed.reason}): {failed.message}; "
        "what was measured before stands, and a new text in profiling.rerun tries again"
    )
    message = continued(standing.message, said)
    return standing.model_copy(update={"reason": standing.state, "message": message, "rerun": failed.rerun})


def _taken_back(outcome: api.Outcome | None) -> api.Outcome | None:
    """A finished measurement's outcome as the profiler reports it while it extends it, or while it stands.

    JobFailed is the operator's word, for an extension whose Job broke; while it stands the operator writes the outcome, from what it has
    seen last, and could undo the one that the next extension ends with.
    """
    if outcome is None or outcome.state == "Failed" or outcome.reason != Reason.JOB_FAILED:
        return outcome
    return outcome.model_copy(update={"reason": outcome.state})
