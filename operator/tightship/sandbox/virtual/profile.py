"""The profiler from beginning to end in virtual time, on one of the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tightship.api.units import format_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.profiler.job import SEED, make_job
from tightship.profiler.profile import Profiler
from tightship.profiler.report import Report
from tightship.sandbox.virtual.clock import VirtualClock, in_virtual_time
from tightship.sandbox.virtual.disturbance import Faults, Noise
from tightship.sandbox.virtual.launcher import START_SECONDS, VirtualDevice, VirtualLauncher
from tightship.sandbox.virtual.settings import Setting


class MemorySink:
    """Holds a profile, and every status that was written to it with the virtual second in which that was."""

    def __init__(self, profile: api.BatchProfile) -> None:
        self.profile = profile
        self.written: list[tuple[float, dict[str, Any]]] = []

    async def read(self) -> api.BatchProfile:
        """The profile."""
        return self.profile

    async def write(self, status: Mapping[str, Any]) -> None:
        """Keep a status."""
        self.written.append((VirtualClock().now(), dict(status)))

    async def close(self) -> None:
        """Nothing to let go of."""


@dataclass(frozen=True)
class Profiled:
    """What a profile gave."""

    status: api.BatchProfileStatus
    written: Sequence[tuple[float, Mapping[str, Any]]]
    """Every status on the way, with its virtual second."""
    seconds: float
    """Virtual seconds of the whole, engine starts included."""
    starts: int
    """Engines started."""

    @property
    def sweep_began(self) -> float:
        """The virtual second in which the sweep's engine was first loaded."""
        return next(at for at, status in self.written if status["progress"]["stage"] == "Sweeping")

    @property
    def sweep_seconds(self) -> float:
        """From there to the last report of the sweep: what the sweep took, its engine's start not counted."""
        return max(at for at, status in self.written if status["progress"]["stage"] == "Sweeping") - self.sweep_began


def make_profile(
    setting: Setting, *, objectives: Sequence[float] = (), budget: float = 3600.0, **measurement: Any
) -> api.BatchProfile:
    """A profile of a setting. `objectives`: bounds on the mean inter-token latency, seconds; `budget` in seconds."""
    return api.BatchProfile.model_validate(
        {
            "metadata": {"name": "virtual", "namespace": "default"},
            "spec": {
                "key": {
                    "hash": "0" * 64,
                    "model": {"source": f"hf://{setting.hub}"},
                    "engine": {
                        "image": "vllm/vllm-openai:v0.33.0",
                        "args": list(setting.arguments),
                        "maxModelLen": setting.max_model_len,
                    },
                    "accelerator": {"device": "cuda", "product": "NVIDIA-H100-64GB"},
                    "workload": {
                        "inputTokens": round(setting.input_mean),
                        "outputTokens": round(setting.output_mean),
                    },
                },
                "measurement": {
                    "budget": format_duration(budget),
                    "objectives": [
                        {"metric": "InterTokenLatency", "statistic": "mean", "max": format_duration(bound)}
                        for bound in objectives
                    ],
                }
                | measurement,
            },
        }
    )


def profile(
    setting: Setting,
    *,
    objectives: Sequence[float] = (),
    budget: float = 3600.0,
    start_seconds: float = START_SECONDS,
    noise: Noise | None = None,
    faults: Sequence[Faults] = (),
    seed: int = SEED,
    **measurement: Any,
) -> Profiled:
    """Run the profiler on a setting, with its lengths, and return what it reported. `seed`: the load's."""

    async def story() -> Profiled:
        clock, gpu = VirtualClock(), setting.gpu()
        device = VirtualDevice(gpu)
        launcher = VirtualLauncher(gpu, start_seconds=start_seconds, noise=noise, faults=faults)
        subject = make_profile(setting, objectives=objectives, budget=budget, **measurement)
        sink = MemorySink(subject)
        report = Report(sink, api.BatchProfileStatus())
        job = replace(make_job(subject, setting.hub, device, {}), lengths=setting.lengths, seed=seed)
        began = clock.now()
        try:
            await Profiler(job, launcher=launcher, device=device, report=report, clock=clock, environ={}).run()
            await report.flush(60.0)
        finally:
            await report.close()
        status = api.BatchProfileStatus.model_validate(sink.written[-1][1])
        return Profiled(status, sink.written, clock.now() - began, len(launcher.launched))

    return in_virtual_time(story)
