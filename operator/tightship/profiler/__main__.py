"""`python3 -m tightship.profiler`: the profiling Job's container.

Exit status 0 says "finished", also when the measurement failed (the outcome says how); anything else says "start me again".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace

from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.clock import Clock, SystemClock
from tightship.profiler.descriptors import raise_limit
from tightship.profiler.engine import Launcher, ProcessLauncher
from tightship.profiler.errors import LengthsError, ProfilerError, ReportError
from tightship.profiler.gpu import CpuDevice, Device, DeviceError, memory_limit, open_nvml
from tightship.profiler.profile import Profiler, make_job
from tightship.profiler.report import MESSAGE_MOST, ApiSink, Report, Sink, continued
from tightship.profiler.sharing import open_sharing

log = logging.getLogger("tightship.profiler")

FINISHED, AGAIN, STOPPED = 0, 1, 143
FLUSH_SECONDS = 600.0
LAST_FLUSH_SECONDS = 5.0


def open_device(profile: api.BatchProfile, environ: Mapping[str, str], clock: Clock) -> Device:
    """The device that the Job was given. Raises DeviceError when there is none."""
    if environ.get("TIGHTSHIP_DEVICE", "cuda") == "cpu":
        return CpuDevice(memory_limit(dict(environ)), profile.spec.key.accelerator.cores_per_replica or 1, clock)
    return open_nvml(dict(environ))


def kept(profile: api.BatchProfile) -> api.BatchProfileStatus | None:
    """What an earlier attempt found and this one goes on from; None when the profile is finished already.

    Of what was measured for another `rerun` nothing is, finished or not: it stands beside, where it is complete. A finished profile that is
    asked for more trials keeps everything, its outcome included.
    """
    outcome, wanted = profile.status.outcome, profile.spec.measurement
    answered = outcome or profile.status.progress
    if answered is not None and not wanted.is_answered_by(answered.rerun):
        return _begun(profile)
    if outcome is None:
        return profile.status
    if wanted.extend is not None and wanted.extend.request != outcome.extend:
        return profile.status
    return None


def _begun(profile: api.BatchProfile) -> api.BatchProfileStatus:
    """What was measured for the present `rerun`, while an earlier measurement stood."""
    begun = profile.status.rerun
    if begun is None or begun.request != profile.spec.measurement.rerun:
        return api.BatchProfileStatus()
    return api.BatchProfileStatus(**{name: getattr(begun, name) for name in api.Measured.model_fields})


async def profile(sink: Sink, environ: Mapping[str, str], clock: Clock, launcher: Launcher | None = None) -> int:
    """Profile what the sink holds; returns the exit status. `launcher`: by default engines run with this interpreter."""
    subject = await sink.read()
    status = kept(subject)
    if status is None:
        log.info("the profile is finished already")
        return FINISHED
    report = Report(sink, status, standing=subject if subject.standing else None)
    try:
        await _measure(subject, report, environ, clock, launcher or _launcher(clock, environ))
        return FINISHED if await report.flush(FLUSH_SECONDS) else AGAIN
    except asyncio.CancelledError:
        log.warning("stopped; what was measured is kept")
        await report.flush(LAST_FLUSH_SECONDS)
        return STOPPED
    finally:
        await report.close()


def _launcher(clock: Clock, environ: Mapping[str, str]) -> Launcher:
    return ProcessLauncher(clock, environ, echo=lambda line: print(f"engine: {line}", flush=True))


async def _measure(
    subject: api.BatchProfile, report: Report, environ: Mapping[str, str], clock: Clock, launcher: Launcher
) -> None:
    model = environ.get("TIGHTSHIP_MODEL_PATH") or subject.spec.key.model.source.removeprefix("hf://")
    try:
        device = open_device(subject, environ, clock)
        job = replace(make_job(subject, model, device, environ), in_flight_most=raise_limit())
        profiler = Profiler(
            job,
            launcher=launcher,
            device=device,
            report=report,
            clock=clock,
            environ=environ,
            sharing=open_sharing(device.identity, subject.spec.key.accelerator.cores_per_replica, environ, clock),
        )
    except (DeviceError, LengthsError) as error:
        report.outcome = _not_begun(subject, report.outcome, error)
        report.save()
        return
    outcome = await profiler.run()
    log.info("%s (%s): %s", outcome.state, outcome.reason, outcome.message)


def _not_begun(subject: api.BatchProfile, earlier: api.Outcome | None, error: ProfilerError) -> api.Outcome:
    """The outcome where not even an engine could be started; what was measured before stands."""
    wanted = subject.spec.measurement
    request = wanted.extend.request if wanted.extend is not None else None
    if earlier is not None:
        message = continued(earlier.message, f"the trials asked for failed: {error}")
        return earlier.model_copy(update={"message": message, "extend": request})
    return api.Outcome(
        state="Failed", reason="EngineFailed", message=str(error)[:MESSAGE_MOST], rerun=wanted.rerun, extend=request
    )


async def run(environ: Mapping[str, str]) -> int:
    """The whole container; SIGTERM and SIGINT end it early, with what was measured kept."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    sink = ApiSink.from_environment(environ)
    try:
        return await profile(sink, environ, SystemClock())
    except asyncio.CancelledError:
        return STOPPED
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await sink.close()


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return asyncio.run(run(os.environ))
    except ReportError as error:
        log.error("%s", error)
    except ProfilerError:
        log.exception("unexpected")
    return AGAIN


if __name__ == "__main__":
    sys.exit(main())
