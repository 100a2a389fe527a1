"""`tightship profile`: measure a model here, without a cluster, and write what a cluster can use.

The profiler is the one that the operator's Jobs run; only its surroundings differ: the profile is a file, the engine a vLLM of
this machine, progress a bar. What must hold: the file is a valid BatchProfile manifest after every point, with the measurement in
`spec.results`; a measurement that was stopped loses nothing and goes on with `--resume`; no file is overwritten unasked, and none
is left behind where nothing was measured.

Exit status: 0 measured (also when the budget ended it); 1 the measurement failed; 2 the question or a file is wrong;
130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from tightship.api.units import format_quantity, parse_duration, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels
from tightship.commands import advise, export, manifest, options, subject
from tightship.commands.manifest import InputError
from tightship.commands.output import say, show
from tightship.commands.progress import REDRAW_SECONDS, ProgressBar
from tightship.core.advisor import Basis, Recommendation
from tightship.decide import ProfileError
from tightship.profiler import __main__ as profiler
from tightship.profiler.clock import SystemClock
from tightship.profiler.engine import MODULE, ProcessLauncher
from tightship.profiler.errors import ReportError
from tightship.profiler.gpu import DeviceError, memory_limit, open_nvml
from tightship.profiler.job import SEED
from tightship.profiler.model import is_folder

MEASURED, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
IMPORT_SECONDS: Final = 300.0
CROWDED: Final = 1 << 30
"""Memory of a GPU that others use, from which on it is said."""
INPUT_TOKENS: Final = 111
OUTPUT_TOKENS: Final = 292
"""Mean lengths of the requests of the published runs (ShareGPT, arXiv:2503.08311): the workload where none is given."""
_LENGTHS_NOTE: Final = (
    f"no lengths were given: requests have {INPUT_TOKENS} tokens in and {OUTPUT_TOKENS} out on average, as in the published runs (ShareGPT); "
    "the advice is for those, and --input-tokens and --output-tokens, or --lengths, say what yours are"
)
IMAGES: Final = {"cuda": "vllm/vllm-openai:v{version}", "cpu": "vllm/vllm-openai-cpu:v{version}"}
"""vLLM's own images, by device: what serves elsewhere what was measured here, unless --image names another."""

_LENGTHS_HELP: Final = f"""\
Without -f, --lengths and either of --input-tokens and --output-tokens, requests have {INPUT_TOKENS} tokens in and {OUTPUT_TOKENS} out on
average, as in the published runs (ShareGPT, arXiv:2503.08311); that is said.
"""
EXAMPLES: Final = """\
examples:
  tightship profile --model ./opt-1.3b --engine-arg=--dtype=float16 --budget 10m -o opt.yaml
  tightship profile --model ./opt-1.3b --input-tokens 111 --output-tokens 292 --itl 30ms --budget 10m -o opt.yaml
  tightship profile -f llmservice.yaml -o profile.yaml        the profile that this service would have measured
  tightship profile --resume -o profile.yaml                  go on where it was stopped
  tightship profile --extend -o profile.yaml --max-replicas-per-gpu 6
                                                              try a packing that is only estimated, or wasn't allowed
  tightship profile export NAME -n NAMESPACE -o profile.yaml  from a cluster; `tightship profile export --help`
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `profile`, with `export` below it."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a model here, without a cluster",
        description=f"{__doc__}\n{_LENGTHS_HELP}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    subject.add_arguments(parser)
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--budget", type=subject.duration, metavar="DURATION", help="time from the first healthy engine (default: 20m)"
    )
    how.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter that has vLLM (default: this one, %(default)s)",
    )
    how.add_argument(
        "--gpu",
        type=int,
        metavar="INDEX",
        help="which GPU, as nvidia-smi counts them (default: the first; with --resume, the same)",
    )
    how.add_argument(
        "--seed",
        type=_seed_option,
        metavar="N",
        help=f"of the load's random numbers: order, ages and token ids (default: {SEED}, or what --resume goes on with)",
    )
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "-o", "--output", default=None, metavar="FILE", help="the profile's file (default: profile.yaml)"
    )
    where.add_argument("--engine-log", type=Path, metavar="FILE", help="what the engine prints (default: -o with .log)")
    again = where.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on with what -o holds; without -f and --model, with its key"
    )
    again.add_argument(
        "--extend",
        action="store_true",
        help="have a finished profile's best packing tried, where it is only estimated; --budget is of this trial",
    )
    again.add_argument("--force", action="store_true", help="overwrite -o")
    commands = parser.add_subparsers(dest="subcommand", metavar="export", title="subcommand")
    export.add_parser(commands)
    return parser


def _seed_option(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 0 to {(1 << 31) - 1}")
    return int(text)


@dataclass
class Plan:
    """All that a measurement here needs."""

    profile: api.BatchProfile
    """What is measured, with what was measured already in its status."""
    output: str
    log: Path
    python: str
    environ: dict[str, str]
    cores: frozenset[int] | None = None
    """CPU cores of the pack, as far as they are there; None leaves them as they are."""
    seed: int | None = None
    """Of the load, where it isn't the usual one."""
    gpu: int | None = None
    """The GPU asked for, as NVML counts."""
    notes: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Measure, write, advise; returns the exit status."""
    if getattr(args, "subcommand", None) == "export":
        return export.run(args)
    try:
        plan = make_plan(args, dict(os.environ))
        if plan.profile.status.outcome is None or plan.profile.spec.measurement.extend is not None:
            return _measure(plan)
        say(f"{plan.output}: finished already: {_how_it_ended(plan.profile.status.outcome)}")
        return _conclude(plan, plan.profile)
    except InputError as error:
        say(f"tightship profile: {error}")
        return USAGE
    except KeyboardInterrupt:
        say("stopped before the measurement began")
        return INTERRUPTED


# --- what to measure, and with what ---


def make_plan(args: argparse.Namespace, environ: dict[str, str]) -> Plan:
    """Everything that can be checked before an engine starts.

    Raises:
        InputError: in words, what is missing or wrong.
    """
    output = args.output or "profile.yaml"
    if output == "-":
        raise InputError("-o -: a measurement that may be stopped needs a file to go on from")
    path, going_on = Path(output), "--extend" if args.extend else "--resume" if args.resume else None
    there = manifest.exists(output)
    if not is_folder(path.resolve().parent):
        raise InputError(f"-o {output}: there is no directory {path.resolve().parent}")
    if there and not (going_on or args.force):
        raise InputError(
            f"{output} exists: go on with it (--resume), overwrite it (--force), or name another file (-o)"
        )
    if going_on and not there:
        raise InputError(f"{going_on}: there is no {output} to go on with")
    if args.filename is None and args.model is None and not going_on:
        raise InputError("--model must be given, or -f with an LLMService manifest that says it")
    kept = read_kept(output) if going_on else None
    version: str | None = None
    notes: list[str] = []
    if kept is not None and not subject.names_a_key(args):
        profile = _with_options(kept, args)
    else:
        defaults: dict[str, Any] = {}
        if args.filename is None:
            # What the manifest doesn't say, this machine does.
            version = engine_version(args.python, environ) if args.image is None else None
            measured_on = None if kept is None else _measured_on(kept)
            defaults = _defaults(args, args.device or _device(environ), version, environ, measured_on)
            if kept is None and args.lengths is None and args.input_tokens is None and args.output_tokens is None:
                defaults |= {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
                notes.append(_LENGTHS_NOTE)
        profile = subject.from_arguments(args, defaults).profile(args.name)
        if kept is not None:
            profile = _going_on(kept, profile, output)
    version = version or engine_version(args.python, environ)
    plan = Plan(
        profile=_extended(profile, output) if args.extend else _unfinished(profile),
        output=output,
        log=args.engine_log or path.with_suffix(".log"),
        python=args.python,
        environ=environ,
        seed=_seed(args.seed, profile, output),
        gpu=args.gpu,
        notes=[*notes, *_image_notes(profile, version)],
    )
    _surroundings(plan, args)
    return plan


def engine_version(python: str, environ: Mapping[str, str]) -> str:
    """The version of the vLLM that an interpreter has. Raises InputError when it has none."""
    advice = "install it there (pip install vllm), or name an interpreter that has it with --python"
    # Its own version first, then what its imports print.
    script = "import vllm; print('version=' + vllm.__version__)"
    try:
        done = subprocess.run(
            [python, "-c", script],
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--python {python}: {getattr(error, 'strerror', None) or error}; {advice}") from error
    found = re.search(r"^version=(\S+)", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{python} can't import vLLM ({words}): {advice}")
    return found[1]


def _device(environ: Mapping[str, str]) -> str:
    try:
        open_nvml(dict(environ))
    except DeviceError:
        return "cpu"
    return "cuda"


def _defaults(
    args: argparse.Namespace, device: str, version: str | None, environ: dict[str, str], measured_on: str | None
) -> dict[str, Any]:
    """What this machine answers where the options are silent."""
    found: dict[str, Any] = {"device": device}
    if version is not None:
        found["image"] = IMAGES[device].format(version=version.partition("+")[0])
    if device == "cuda":
        try:
            narrowed = _gpu_environ(args.gpu, environ, measured_on)
            found["product"] = (open_nvml(narrowed).identity.product or "").replace(" ", "-")
        except DeviceError as error:
            raise InputError(f"--device cuda: {error}") from error
        return found
    cores = args.cores or len(os.sched_getaffinity(0))
    memory = memory_limit(environ) >> 20
    return found | {"cores": cores, "cores_per_replica": cores, "memory": f"{memory}Mi"}


def _image_notes(profile: api.BatchProfile, version: str) -> list[str]:
    """Where the image's tag says another release than the engine's here."""
    image, release = profile.spec.key.engine.image, version.partition("+")[0]
    tag = re.search(r":v?(\d+\.\d+\.\d+)", image)
    if tag is None or tag[1] == release:
        return []
    return [f"the profile is for {image}, but vLLM {version} is what is measured here: give --python one of {tag[1]}"]


def read_kept(filename: str) -> api.BatchProfile:
    """The profile in a file that a measurement wrote, with its results, progress and outcome in the status.

    Raises:
        InputError: it can't be read.
    """
    try:
        # First without what it measured, so that each part is known to be what the API says.
        obj = {name: value for name, value in manifest.read_profile(filename).items() if name != "status"}
        read = api.BatchProfile.model_validate(obj)
        noted = json.loads((read.metadata.annotations or {}).get(labels.ANNOTATION_MEASUREMENT) or "{}")
        results = {} if read.spec.results is None else read.spec.results.to_dict()
        return api.BatchProfile.model_validate({**obj, "status": {**results, **noted}})
    except InputError as error:
        raise InputError(f"--resume: {error}") from error
    except (ValidationError, ValueError, TypeError) as error:
        raise InputError(
            f"--resume: {filename} is not a profile that can be gone on with: {manifest.first_error(error)}"
        ) from error


def _with_options(kept: api.BatchProfile, args: argparse.Namespace) -> api.BatchProfile:
    """What is in the file, with what it is measured for as the options say."""
    how = kept.spec.measurement.to_dict()
    over = {
        "budget": args.budget,
        "objectives": subject.objectives(args),
        "efficiencyFloor": None if args.efficiency_floor is None else f"{args.efficiency_floor:g}",
        "minimumGain": None if args.minimum_gain is None else f"{args.minimum_gain:g}",
        "memoryReserve": args.memory_reserve,
        "maxReplicasPerGPU": args.max_replicas_per_gpu,
    }
    how |= {name: value for name, value in over.items() if value is not None}
    return _measured_how(kept, api.Measurement.model_validate(how))


def _measured_how(profile: api.BatchProfile, how: api.Measurement) -> api.BatchProfile:
    return profile.model_copy(update={"spec": profile.spec.model_copy(update={"measurement": how, "results": None})})


def _going_on(kept: api.BatchProfile, asked: api.BatchProfile, output: str) -> api.BatchProfile:
    """What was asked for, with what the file has of it; another key is another measurement."""
    if kept.spec.key.hash != asked.spec.key.hash:
        before, now = kept.spec.key.to_dict(), asked.spec.key.to_dict()
        differing = [name for name in before if name != "hash" and before[name] != now.get(name)]
        shown = "; ".join(f"{name} {before[name]} there, {now.get(name)} here" for name in differing)
        raise InputError(f"--resume: {output} was measured for another key ({shown}): name another file with -o")
    return _measured_how(asked, asked.spec.measurement).model_copy(update={"status": kept.status})


def _unfinished(profile: api.BatchProfile) -> api.BatchProfile:
    """Open again what ended for a cause that may be gone: a budget since raised, a failure, or a machine that was busy."""
    status, how = profile.status, profile.spec.measurement
    outcome = status.outcome
    if outcome is None:
        return profile
    raised = float(status.gpu_seconds or 0) < parse_duration(how.budget)
    if outcome.state == "Failed" or ((outcome.state == "BudgetExceeded" or outcome.unfinished) and raised):
        return profile.model_copy(update={"status": status.model_copy(update={"outcome": None})})
    return profile


def _extended(profile: api.BatchProfile, output: str) -> api.BatchProfile:
    """A finished profile that asks for the trial of what would be chosen, if that is only estimated.

    Raises:
        InputError: there is nothing to decide from, or nothing to try.
    """
    if profile.status.outcome is None or not profile.status.points or profile.status.outcome.state == "Failed":
        raise InputError(f"--extend: what {output} holds isn't finished: go on with it with --resume")
    how = profile.spec.measurement
    try:
        answer = options.settings_of(how).decide(profile.to_dict())
    except ProfileError as error:
        raise InputError(f"--extend: {output}: {error}") from error
    pair = _untried(answer)
    if pair is None:
        raise InputError(
            f"--extend: nothing to try in {output}: {answer.message}; another objective or a larger --max-replicas-per-gpu may "
            "make another packing the best"
        )
    batch, replicas = pair
    # Any text that isn't the last extension's.
    now = datetime.now(timezone.utc).isoformat()
    asked = api.Extension(request=now, pairs=[api.Pair(batch=batch, replicas=replicas)], budget=how.budget)
    return _measured_how(profile, how.model_copy(update={"extend": asked}))


def _untried(answer: Recommendation) -> tuple[int, int] | None:
    """The packing that would be chosen, where it is only estimated."""
    chosen = answer.chosen
    estimated = chosen is not None and answer.basis is Basis.ESTIMATED and chosen.replicas > 1
    return chosen.pair if chosen is not None and estimated else None


def _surroundings(plan: Plan, args: argparse.Namespace) -> None:
    """The environment of profiler and engine, as a Job's container would have it, and the cores."""
    key, environ = plan.profile.spec.key, plan.environ
    environ |= _engine_environ(key, dict(args.engine_env or []), environ, from_options=args.filename is None)
    environ["TIGHTSHIP_DEVICE"] = key.accelerator.device
    environ["TIGHTSHIP_MODEL_PATH"] = model_argument(key, args.model)
    for name in ("TIGHTSHIP_LENGTHS_FILE", "TIGHTSHIP_SEED"):
        environ.pop(name, None)
    if plan.seed is not None:
        environ["TIGHTSHIP_SEED"] = str(plan.seed)
    if key.workload.lengths_digest is not None:
        environ["TIGHTSHIP_LENGTHS_FILE"] = _lengths_file(key, args.lengths)
    if key.accelerator.device == "cpu":
        environ["TIGHTSHIP_DEVICE_MEMORY"] = str(parse_quantity(key.accelerator.memory or "0"))
        plan.cores = _cores(key.accelerator.cores_per_replica or 1, key.accelerator.cores or 1)
        return
    try:
        environ.update(_gpu_environ(args.gpu, environ, _measured_on(plan.profile)))
        device = open_nvml(environ)
        used = device.used()
    except DeviceError as error:
        raise InputError(f"{error}; --device cpu measures vLLM's CPU back end") from error
    there, wanted = (device.identity.product or "").replace(" ", "-"), key.accelerator.product or ""
    if args.product is None and not (wanted.startswith(there) or there.startswith(wanted)):
        raise InputError(
            f"the profile is for {wanted}, but this machine has a {there}: measure it on the GPU it is for, or, if both names are of "
            f"the same product, confirm it with --product {wanted}"
        )
    if args.filename is not None and args.product not in (None, wanted):
        raise InputError(f"--product {args.product}: {args.filename} says {wanted}")
    if used > CROWDED:
        plan.notes.append(
            f"others use {format_quantity(used >> 20 << 20)} of this GPU: what is measured beside them means little (nvidia-smi)"
        )


def model_argument(key: api.ProfileKey, given: str | None) -> str:
    """What the engine gets as --model here. Raises InputError when this machine can't know."""
    if given is not None and is_folder(given):
        return str(Path(given).resolve())
    source = key.model.source if given is None else given
    if source.startswith("pvc://"):
        raise InputError(f"the model is {source}, a volume of the cluster: say where it is here with --model DIRECTORY")
    path = source.removeprefix(subject.FILE)
    if path != source and not is_folder(path):
        raise InputError(f"the model was in {path}, which is no directory now: say where it is with --model DIRECTORY")
    return path.removeprefix(subject.HF)


def _engine_environ(
    key: api.ProfileKey, given: Mapping[str, str], inherited: Mapping[str, str], *, from_options: bool
) -> dict[str, str]:
    """The engine's variables: the key's, and for those that a cluster takes from Secrets and ConfigMaps what is given here."""
    plain = {one.name: one.value or "" for one in key.engine.env if one.value_from is None}
    elsewhere = [one.name for one in key.engine.env if one.value_from is not None]
    if not from_options:
        clash = sorted(name for name in given if name in plain and given[name] != plain[name])
        unknown = sorted(set(given) - set(plain) - set(elsewhere)) if not key.engine.env_from else []
        if clash or unknown:
            raise InputError(
                f"--engine-env {', '.join(clash + unknown)}: the manifest says what the engine's environment is, and the key holds it; "
                "change it there"
            )
    missing = [name for name in elsewhere if name not in given and name not in inherited]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: the manifest takes it from the cluster; give it here with --engine-env NAME=VALUE"
        )
    return {**plain, **given}


def _lengths_file(key: api.ProfileKey, path: Path | None) -> str:
    if path is None:
        raise InputError("the profile's workload is a set of lengths: give the file again with --lengths FILE")
    digest = subject.digest_of(path)
    if digest != key.workload.lengths_digest:
        wanted = str(key.workload.lengths_digest)
        raise InputError(
            f"--lengths {path}: not the lengths this profile is for (their SHA-256 begins with {digest[:10]}, not {wanted[:10]})"
        )
    subject.check_lengths(path)
    return str(path.resolve())


def _cores(replica: int, pack: int) -> frozenset[int]:
    """The cores of a pack, or as many as there are: one replica's must be, several replicas may share them in trials."""
    there = sorted(os.sched_getaffinity(0))
    if replica > len(there):
        raise InputError(f"a replica has {replica} cores, and this process may use {len(there)} (taskset, nproc)")
    return frozenset(there[:pack])


def _seed(asked: int | None, profile: api.BatchProfile, output: str) -> int | None:
    """The seed of the load, None for the usual one: that of what is there already, since a curve is of one load.

    Raises:
        InputError: another one is asked for.
    """
    load = profile.status.load if profile.status.points else None
    if load is None:
        return asked
    if asked not in (None, load.seed):
        raise InputError(
            f"--seed {asked}: what {output} holds was measured with seed {load.seed}, and a curve is of one load: leave --seed out, or "
            "measure anew with another -o"
        )
    return None if load.seed == SEED else load.seed


def _measured_on(profile: api.BatchProfile) -> str | None:
    """The UUID of the GPU that points in a profile were measured on."""
    gpu = profile.status.gpu
    return gpu.uuid if gpu is not None and profile.status.points else None


def _gpu_environ(index: int | None, environ: Mapping[str, str], measured_on: str | None) -> dict[str, str]:
    """The environment, narrowed to one GPU of a machine with several, so that NVML and CUDA mean the same one.

    It is the one that what is there already was measured on; else the one asked for, else the first of CUDA_VISIBLE_DEVICES.

    Raises:
        DeviceError: NVML can't be asked.
        InputError: there is no such GPU, or what is asked for is another than the one measured on.
    """
    first = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    # Where the container's runtime gave one GPU, NVML sees no other, and CUDA counts what it gave.
    chosen = first.startswith("GPU-") or (
        first.isdigit() and not environ.get("NVIDIA_VISIBLE_DEVICES", "").startswith("GPU-")
    )
    if index is None and measured_on is None and not chosen:
        return dict(environ)
    uuids = _gpus()
    asked, allowed = _allowed(index, environ if chosen else {}, uuids)
    if not allowed:
        raise InputError(f"{asked}: there are {len(uuids)} GPUs here, counted from 0 (nvidia-smi -L)")
    number = allowed[0]
    if measured_on is not None:
        if measured_on not in uuids:
            raise InputError(
                f"what is there was measured on GPU {measured_on}, which this machine doesn't have (nvidia-smi -L): go on where it "
                "is, or measure anew with another -o"
            )
        number = uuids.index(measured_on)
        if number not in allowed:
            raise InputError(
                f"{asked}: what is there was measured on GPU {number} ({measured_on}), and a curve is of one GPU: go on there "
                f"with --gpu {number}, or measure anew with another -o"
            )
    # By its number, since many releases of vLLM can't read a UUID here (vllm-project/vllm issues 13815 and 20939). NVML counts by
    # PCI bus; CUDA does only when told.
    return {
        **environ,
        "NVIDIA_VISIBLE_DEVICES": uuids[number],
        "CUDA_VISIBLE_DEVICES": str(number),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def _allowed(index: int | None, environ: Mapping[str, str], uuids: Sequence[str]) -> tuple[str, list[int]]:
    """What says which GPUs may be used, and their numbers: all of them where nothing says it."""
    if index is not None:
        return f"--gpu {index}", [index] if 0 <= index < len(uuids) else []
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return "", list(range(len(uuids)))
    numbers = []
    for name in (text.strip() for text in visible.split(",")):
        fitting = [
            n for n, uuid in enumerate(uuids) if name == str(n) or (name.startswith("GPU-") and uuid.startswith(name))
        ]
        if not fitting:  # CUDA looks no further than to the first that isn't there
            break
        numbers.append(fitting[0])
    return f"CUDA_VISIBLE_DEVICES={visible}", numbers


def _gpus() -> list[str]:
    """The UUIDs of this machine's GPUs, in NVML's order. Raises DeviceError."""
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    except nvml.NVMLError as error:
        raise DeviceError(f"NVML can't list the GPUs ({error})") from error
    return [uuid.decode() if isinstance(uuid, bytes) else uuid for uuid in uuids]


# --- measuring ---


class ManifestSink:
    """The profiler's sink: the manifest in a file, rewritten at every report that holds a point, and the progress shown."""

    def __init__(self, profile: api.BatchProfile, output: str, show: Callable[[api.Progress], None]) -> None:
        self._profile = profile
        self._output = output
        self._show = show
        self.latest = profile

    async def read(self) -> api.BatchProfile:
        """The profile, with what an earlier run measured in its status."""
        return self._profile

    async def write(self, status: Mapping[str, Any]) -> None:
        """Keep it. Raises ReportError when the file can't be written."""
        self.latest = api.BatchProfile.model_validate({**self._profile.to_dict(), "status": status})
        if status.get("points"):
            try:
                manifest.write(self._output, to_text(self.latest))
            except InputError as error:
                raise ReportError(str(error)) from error
        # Last: what is kept must not depend on what can be shown.
        if status.get("progress"):
            self._show(api.Progress.model_validate(status["progress"]))

    async def close(self) -> None:
        """Nothing to let go of."""


def to_text(profile: api.BatchProfile) -> str:
    """The manifest of a profile measured here, as YAML."""
    obj, status = profile.to_dict(), profile.status
    # What is asked for here isn't asked of a cluster that gets the file.
    obj["spec"].get("measurement", {}).pop("extend", None)
    progress = None if status.progress is None else status.progress.model_copy(update={"message": None})
    parts = {"progress": progress, "outcome": status.outcome}
    noted = {name: part.to_dict() for name, part in parts.items() if part is not None}
    annotations = {labels.ANNOTATION_MEASUREMENT: json.dumps(noted)}
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    state = _how_it_ended(status.outcome) if status.outcome else "not finished; `tightship profile --resume` goes on"
    comment = f"Measured by `tightship profile`, {written}: {state}"
    return manifest.to_yaml(manifest.manifest(obj, obj["status"], annotations), comment)


def _how_it_ended(outcome: api.Outcome) -> str:
    return f"{outcome.state}: {outcome.message}" if outcome.message else outcome.state


def _measure(plan: Plan) -> int:
    profile = plan.profile
    key, budget, asked = profile.spec.key, profile.spec.measurement.budget, profile.spec.measurement.extend
    pairs = "" if asked is None else ", ".join(f"{each.replicas} x batch {each.batch} of " for each in asked.pairs)
    say(f"measuring {pairs}{key.model.source} on {key.accelerator.product or _cpu(key)} for {budget}")
    say(f"profile: {plan.output}; the engine's output: {plan.log}; Ctrl-C stops and keeps what is done")
    for note in plan.notes:
        say(f"note: {note}")
    bar = ProgressBar(sys.stderr, parse_duration(profile.spec.measurement.budget))
    sink = ManifestSink(profile, plan.output, bar.show)
    try:
        with _logging(plan.log, bar), _bound_to(plan.cores):
            status = asyncio.run(_run(plan, sink, bar))
    except ReportError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"--engine-log {plan.log}: {error.strerror or error}") from error
    finally:
        bar.close()
    measured = sink.latest
    if status in (INTERRUPTED, TERMINATED):
        _say_stopped(plan, measured)
        return status
    return _conclude(plan, measured)


async def _run(plan: Plan, sink: ManifestSink, bar: ProgressBar) -> int:
    """The profiler, with signals that end it and a bar that moves; returns the exit status."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stopped: list[int] = []

    def stop(number: int) -> None:
        stopped.append(number)
        if len(stopped) == 1:
            task.cancel()
        bar.note("stopping the engine (up to 20 s) ..." if len(stopped) == 1 else "still stopping the engine ...")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    ticker = loop.create_task(_tick(bar))
    clock = SystemClock()
    with plan.log.open("a", encoding="utf-8") as log:
        launcher = ProcessLauncher(
            clock,
            plan.environ,
            echo=lambda line: print(line, file=log, flush=True),
            command=(plan.python, "-m", MODULE),
        )
        try:
            status = await profiler.profile(sink, plan.environ, clock, launcher)
        except asyncio.CancelledError:
            status = profiler.STOPPED
        finally:
            ticker.cancel()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
    if stopped:
        return INTERRUPTED if stopped[0] == signal.SIGINT else TERMINATED
    return MEASURED if status == profiler.FINISHED else FAILED


async def _tick(bar: ProgressBar) -> None:
    while True:
        await asyncio.sleep(REDRAW_SECONDS)
        bar.redraw()


@contextlib.contextmanager
def _logging(path: Path, bar: ProgressBar) -> Iterator[None]:
    """The profiler's own log into the engine's file, and its warnings above the bar."""
    logger = logging.getLogger("tightship.profiler")
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("profiler: %(asctime)s %(levelname)s %(message)s"))
    warnings = _Warnings(bar)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(to_file)
    logger.addHandler(warnings)
    try:
        yield
    finally:
        logger.removeHandler(to_file)
        logger.removeHandler(warnings)
        to_file.close()
        logger.level, logger.propagate = before


class _Warnings(logging.Handler):
    def __init__(self, bar: ProgressBar) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.note(f"note: {record.getMessage()}")


@contextlib.contextmanager
def _bound_to(cores: frozenset[int] | None) -> Iterator[None]:
    """This process and its engines on these cores."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu(key: api.ProfileKey) -> str:
    return f"{key.accelerator.cores_per_replica or 1} CPU cores"


# --- what is said in the end ---


def _say_stopped(plan: Plan, profile: api.BatchProfile) -> None:
    found = len(profile.status.points)
    if not found:
        say("stopped before the first point: nothing was written")
        return
    say(f"stopped; {plan.output} keeps {found} points. Go on with:")
    say(f"  {_resume(plan)}")


def _resume(plan: Plan, how: str | None = None) -> str:
    how = how or ("--resume" if plan.profile.spec.measurement.extend is None else "--extend")
    words = ["tightship", "profile", how, "-o", plan.output]
    if plan.python != sys.executable:
        words += ["--python", plan.python]
    for option, value in (("--gpu", plan.gpu), ("--seed", plan.seed)):
        words += [] if value is None else [option, str(value)]
    if plan.profile.spec.key.model.source.startswith("pvc://"):
        words += ["--model", plan.environ["TIGHTSHIP_MODEL_PATH"]]
    if "TIGHTSHIP_LENGTHS_FILE" in plan.environ:
        words += ["--lengths", plan.environ["TIGHTSHIP_LENGTHS_FILE"]]
    return shlex.join(words)


def _conclude(plan: Plan, profile: api.BatchProfile) -> int:
    outcome, found = profile.status.outcome, len(profile.status.points)
    if outcome is None or outcome.state == "Failed":
        words = _how_it_ended(outcome) if outcome else "it ended without an outcome"
        say(f"tightship profile: {words}")
        say(f"the engine's output is in {plan.log}")
        if found:
            say(f"{plan.output} keeps {found} points; go on with:\n  {_resume(plan)}")
        return FAILED
    say(f"{_how_it_ended(outcome)}\n")
    chosen = options.settings_of(profile.spec.measurement)
    try:
        answer = chosen.decide(profile.to_dict())
        own = options.settings_of(options.measured_for(manifest.read_profile(plan.output)))
    except (InputError, ProfileError) as error:
        say(f"tightship profile: {plan.output}: {error}")
        return FAILED
    show(advise.to_table(answer))
    file, asked = shlex.quote(plan.output), options.to_words(chosen, own)
    say("\nnext:")
    say(f"  {' '.join(['tightship advise -f', file, *asked, '--explain'])}")
    if outcome.unfinished:
        say(f"  {_resume(plan, '--resume')}")
    if _untried(answer) is not None:
        say(f"  {' '.join([_resume(plan, '--extend'), *asked])}")
    say(f"  kubectl apply -f {shlex.quote(plan.output)}")
    if profile.spec.key.model.source.startswith(subject.FILE):
        say(
            "note: no service's manifest names a model file://: measure with -f LLMSERVICE.yaml, or --source, to have it used"
        )
    return MEASURED
