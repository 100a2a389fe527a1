"""What one profile asks for, on this device: from a BatchProfile and the Job's environment to plain values."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tightship.api.units import parse_duration
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1.validation import lengths_digest
from tightship.core.curve import Objective
from tightship.profiler import points
from tightship.profiler.engine import EngineSettings
from tightship.profiler.errors import LengthsError
from tightship.profiler.gpu import GIB, Device
from tightship.profiler.lengths import Lengths, Tokenize
from tightship.profiler.model import tokenizer
from tightship.profiler.sharing import engine_cores

START_SECONDS: Final = 3600.0
SEED: Final = 20250311
CPU_KV_SHARE: Final = 0.4

_REMARKS: Final = {
    "--speculative-config": (
        "speculative decoding was measured on random tokens: how many drafts are accepted, and so both latency and throughput, "
        "differ with real prompts"
    ),
    "--enable-lora": "measured on the base model: requests for LoRA adapters are slower",
}
"""Arguments that the key holds, and what they mean for the figures."""


@dataclass(frozen=True)
class Job:
    """What to profile, and how."""

    settings: EngineSettings
    """The sweep's engine."""
    lengths: Lengths
    budget: float
    """Seconds from the first healthy engine."""
    objectives: tuple[Objective, ...]
    efficiency_floor: float
    rerun: str | None
    seed: int = SEED
    max_replicas: int = 1
    """Most replicas on the device that packing trials may use; 1 for none."""
    minimum_gain: float = 1.05
    memory_reserve: str = "5%"
    extension: api.Extension | None = None
    remarks: tuple[str, ...] = ()
    """What the outcome must say of the figures, whatever is measured."""
    start_timeout: float = START_SECONDS
    in_flight_most: int | None = None
    """Most requests that engines can be made to run at once, all together; None where nothing limits them."""


def make_job(profile: api.BatchProfile, model: str, device: Device, environ: Mapping[str, str]) -> Job:
    """What a BatchProfile asks for, on this device. `model`: the path or name that the engine gets as --model.

    Raises:
        LengthsError: the file of lengths is not there, can't be read, or is not the one that the profile was made for.
    """
    key, how = profile.spec.key, profile.spec.measurement
    args = tuple(key.engine.args)
    explicit, environment = _cpu_settings(device, key.accelerator.cores_per_replica, environ)
    return Job(
        settings=EngineSettings(
            model=model,
            max_num_seqs=largest_batch(device, args),
            revision=key.model.revision if key.model.source.startswith("hf://") and not model.startswith("/") else None,
            args=args,
            max_model_len=key.engine.max_model_len,
            kv_cache_bytes=explicit,
            environment=environment,
        ),
        lengths=read_lengths(profile, environ, lambda: tokenizer(model, environ, key.model.revision)),
        budget=parse_duration(how.budget),
        objectives=tuple(points.objectives(how.objectives)),
        efficiency_floor=float(how.efficiency_floor),
        rerun=how.rerun,
        seed=seed_of(environ),
        max_replicas=_replicas_at_most(profile),
        minimum_gain=float(how.minimum_gain),
        memory_reserve=how.memory_reserve,
        extension=how.extend,
        remarks=tuple(_remarks(args)),
        start_timeout=float(environ.get("TIGHTSHIP_START_TIMEOUT", START_SECONDS)),
    )


def read_lengths(
    profile: api.BatchProfile, environ: Mapping[str, str], open_tokenizer: Callable[[], Tokenize]
) -> Lengths:
    """The workload: the means in the profile's key, or the file that TIGHTSHIP_LENGTHS_FILE names, if it has the key's digest.

    `open_tokenizer` is called for the first conversation: lengths given as numbers need no tokenizer.

    Raises:
        LengthsError: the file is not there, holds no lengths, or is not the one that the profile was made for.
    """
    workload = profile.spec.key.workload
    if workload.lengths_digest is None:
        return Lengths.constant(workload.input_tokens or 1, workload.output_tokens or 1)
    name = environ.get("TIGHTSHIP_LENGTHS_FILE")
    if not name:
        raise LengthsError(
            "the profile is of a set of lengths, but TIGHTSHIP_LENGTHS_FILE names no file that holds them"
        )
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LengthsError(f"the lengths in {name} can't be read: {error}") from error
    found = lengths_digest(text)
    if found != workload.lengths_digest:
        raise LengthsError(
            f"the lengths in {name} have the SHA-256 {found}, but this profile is of {workload.lengths_digest}: the ConfigMap was "
            "changed after the profile was created; services that refer to it get a new profile, so delete this one, or "
            "put the old lengths back and set profiling.rerun"
        )
    opened = functools.cache(open_tokenizer)

    def count(talk: str) -> int:
        return opened()(talk)

    try:
        return Lengths.parse(text, count, seed=seed_of(environ))
    except ValueError as error:
        raise LengthsError(f"the lengths in {name} can't be used: {error}") from error


def seed_of(environ: Mapping[str, str]) -> int:
    """Seed of all that is drawn at random: TIGHTSHIP_SEED, else the usual one."""
    return int(environ.get("TIGHTSHIP_SEED") or SEED)


def largest_batch(device: Device, args: tuple[str, ...]) -> int:
    """vLLM's own `max_num_seqs` on a device (EngineArgs.get_batch_defaults), bounded by the user's token budget."""
    identity = device.identity
    if identity.kind == "cpu":
        top = 128
    elif identity.memory >= 70 * GIB and "a100" not in (identity.product or "").lower():
        top = 1024
    else:
        top = 256
    budget = _option(args, "--max-num-batched-tokens")
    return min(top, int(budget)) if budget and budget.isdigit() else top


def _replicas_at_most(profile: api.BatchProfile) -> int:
    """Most replicas that trials may use: on CPUs those that the pack has cores for, since no more are ever run (`decide`)."""
    most, accelerator = profile.spec.measurement.max_replicas_per_gpu, profile.spec.key.accelerator
    if accelerator.device != "cpu" or accelerator.cores is None:
        return most
    return min(most, max(1, accelerator.cores // (accelerator.cores_per_replica or 1)))


def _cpu_settings(
    device: Device, cores_per_replica: int | None, environ: Mapping[str, str]
) -> tuple[int | None, dict[str, str | None]]:
    """The KV cache's bytes and the environment of an engine on CPUs; nothing for a GPU."""
    if device.identity.kind != "cpu":
        return None, {}
    explicit = None if environ.get("VLLM_CPU_KVCACHE_SPACE") else int(CPU_KV_SHARE * device.identity.memory)
    cores = os.sched_getaffinity(0)
    return explicit, {"VLLM_CPU_OMP_THREADS_BIND": engine_cores(cores, 0, cores_per_replica or 1)}


def _remarks(args: tuple[str, ...]) -> Iterator[str]:
    flags = {arg.replace("_", "-").partition("=")[0] for arg in args}
    flags |= {"--enable-lora"} if "--lora-modules" in flags else set()
    flags |= {"--speculative-config"} if any(flag.startswith("--speculative-config.") for flag in flags) else set()
    yield from (text for flag, text in _REMARKS.items() if flag in flags)


def _option(args: tuple[str, ...], name: str) -> str | None:
    """The value of the last `--name value` or `--name=value`, in either spelling of the dashes."""
    value = None
    for index, arg in enumerate(args):
        flag, equals, rest = arg.replace("_", "-").partition("=")
        if flag == name:
            value = rest if equals else (args[index + 1] if index + 1 < len(args) else None)
    return value
