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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from tightship.api.units import format_quantity, parse_duration, parse_quantity
from tightship.api.v1alpha1 import batchprofile as api
from tightship.api.v1alpha1 import labels
from tightship.commands import advise, export, manifest, subject
from tightship.commands.manifest import InputError
from tightship.commands.progress import REDRAW_SECONDS, ProgressBar
from tightship.decide import ProfileError
from tightship.profiler import __main__ as profiler
from tightship.profiler.clock import SystemClock
from tightship.profiler.engine import MODULE, ProcessLauncher
from tightship.profiler.errors import ReportError
from tightship.profiler.gpu import DeviceError, memory_limit, open_nvml
from tightship.profiler.model import is_folder

MEASURED, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
IMPORT_SECONDS: Final = 300.0
CROWDED: Final = 1 << 30
"""Memory of a GPU that others use, from which on it is said."""
IMAGES: Final = {"cuda": "vllm/vllm-openai:v{version}", "cpu": "vllm/vllm-openai-cpu:v{version}"}
"""vLLM's own images, by device: what serves elsewhere what was measured here, unless --image names another."""

EXAMPLES: Final = """\
examples:
  tightship profile --model ./opt-1.3b --input-tokens 111 --output-tokens 292 --itl 30ms --budget 10m -o opt.yaml
  tightship profile -f llmservice.yaml -o profile.yaml        the profile that this service would have measured
  tightship profile --resume -o profile.yaml                  go on where it was stopped
  tightship profile export NAME -n NAMESPACE -o profile.yaml  from a cluster; `tightship profile export --help`
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the subcommand `profile`, with `export` below it."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a model here, without a cluster",
        description=__doc__,
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
        "--gpu", type=int, metavar="INDEX", help="which GPU, as nvidia-smi counts them (default: the first)"
    )
    how.add_argument("--seed", type=int, metavar="N", help="of the load's random numbers: order, ages and token ids")
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "-o", "--output", default=None, metavar="FILE", help="the profile's file (default: profile.yaml)"
    )
    where.add_argument("--engine-log", type=Path, metavar="FILE", help="what the engine prints (default: -o with .log)")
    again = where.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on with what -o holds; without -f and --model, with its key"
    )
    again.add_argument("--force", action="store_true", help="overwrite -o")
    commands = parser.add_subparsers(dest="subcommand", metavar="export", title="subcommand")
    export.add_parser(commands)
    return parser


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
    notes: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Measure, write, advise; returns the exit status."""
    if getattr(args, "subcommand", None) == "export":
        return export.run(args)
    try:
        plan = make_plan(args, dict(os.environ))
        if plan.profile.status.outcome is None:
            return _measure(plan)
        print(f"{plan.output}: finished already: {_how_it_ended(plan.profile.status.outcome)}", file=sys.stderr)
        return _conclude(plan, plan.profile)
    except InputError as error:
        print(f"tightship profile: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("stopped before the measurement began", file=sys.stderr)
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
    path = Path(output)
    there = manifest.exists(output)
    if not is_folder(path.resolve().parent):
        raise InputError(f"-o {output}: there is no directory {path.resolve().parent}")
    if there and not (args.resume or args.force):
        raise InputError(
            f"{output} exists: go on with it (--resume), overwrite it (--force), or name another file (-o)"
        )
    if args.resume and not there:
        raise InputError(f"--resume: there is no {output} to go on with")
    kept = read_kept(output) if args.resume else None
    version: str | None = None
    if kept is not None and not subject.names_a_key(args):
        profile = _with_options(kept, args)
    else:
        defaults: dict[str, Any] = {}
        if args.filename is None:
            # What the manifest doesn't say, this machine does.
            version = engine_version(args.python, environ) if args.image is None else None
            defaults = _defaults(args, args.device or _device(environ), version, environ)
        profile = subject.from_arguments(args, defaults).profile(args.name)
        if kept is not None:
            profile = _going_on(kept, profile, output)
    version = version or engine_version(args.python, environ)
    plan = Plan(
        profile=_unfinished(profile),
        output=output,
        log=args.engine_log or path.with_suffix(".log"),
        python=args.python,
        environ=environ,
        notes=_image_notes(profile, version),
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


def _defaults(args: argparse.Namespace, device: str, version: str | None, environ: dict[str, str]) -> dict[str, Any]:
    """What this machine answers where the options are silent."""
    found: dict[str, Any] = {"device": device}
    if version is not None:
        found["image"] = IMAGES[device].format(version=version.partition("+")[0])
    if device == "cuda":
        try:
            found["product"] = (open_nvml(_gpu_environ(args.gpu, environ)).identity.product or "").replace(" ", "-")
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
        obj = dict(manifest.read_profile(filename))
        noted = json.loads(
            ((obj.get("metadata") or {}).get("annotations") or {}).get(labels.ANNOTATION_MEASUREMENT) or "{}"
        )
        status = {**((obj.get("spec") or {}).get("results") or {}), **noted}
        return api.BatchProfile.model_validate({**obj, "status": status})
    except InputError as error:
        raise InputError(f"--resume: {filename}: {error}") from error
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"--resume: {filename} is not a profile that can be gone on with: {manifest.first_error(error)}"
        ) from error


def _with_options(kept: api.BatchProfile, args: argparse.Namespace) -> api.BatchProfile:
    """What is in the file, with what it is measured for as the options say."""
    how = kept.spec.measurement.to_dict()
    objectives = subject.objectives(args)
    over = {
        "budget": args.budget,
        "objectives": objectives or None,
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
    """Open again what ended for a cause that may be gone: a budget since raised, or a failure."""
    status, how = profile.status, profile.spec.measurement
    outcome = status.outcome
    if outcome is None:
        return profile
    raised = float(status.gpu_seconds or 0) < parse_duration(how.budget)
    if outcome.state == "Failed" or (outcome.state == "BudgetExceeded" and raised):
        return profile.model_copy(update={"status": status.model_copy(update={"outcome": None})})
    return profile


def _surroundings(plan: Plan, args: argparse.Namespace) -> None:
    """The environment of profiler and engine, as a Job's container would have it, and the cores."""
    key, environ = plan.profile.spec.key, plan.environ
    environ |= _engine_environ(key, dict(args.engine_env or []), environ, from_options=args.filename is None)
    environ["TIGHTSHIP_DEVICE"] = key.accelerator.device
    environ["TIGHTSHIP_MODEL_PATH"] = model_argument(key, args.model)
    for name in ("TIGHTSHIP_LENGTHS_FILE", "TIGHTSHIP_SEED"):
        environ.pop(name, None)
    if args.seed is not None:
        environ["TIGHTSHIP_SEED"] = str(args.seed)
    if key.workload.lengths_digest is not None:
        environ["TIGHTSHIP_LENGTHS_FILE"] = _lengths_file(key, args.lengths)
    if key.accelerator.device == "cpu":
        environ["TIGHTSHIP_DEVICE_MEMORY"] = str(parse_quantity(key.accelerator.memory or "0"))
        plan.cores = _cores(key.accelerator.cores_per_replica or 1, key.accelerator.cores or 1)
        return
    environ.update(_gpu_environ(args.gpu, environ))
    try:
        device = open_nvml(environ)
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
    if device.used() > CROWDED:
        plan.notes.append(
            f"others use {format_quantity(device.used() >> 20 << 20)} of this GPU: what is measured beside them means little (nvidia-smi)"
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


def _gpu_environ(index: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment, narrowed to one GPU of a machine with several, so that NVML and CUDA mean the same one."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    if index is None and (not visible.isdigit() or environ.get("NVIDIA_VISIBLE_DEVICES", "").startswith("GPU-")):
        return {**environ, **({"NVIDIA_VISIBLE_DEVICES": visible} if visible.startswith("GPU-") else {})}
    number = int(visible) if index is None else index
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        uuid = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(number))
    except nvml.NVMLError as error:
        raise InputError(f"there is no GPU {number} here ({error}); nvidia-smi -L lists them") from error
    uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
    # NVML counts by PCI bus; CUDA does only when told.
    return {
        **environ,
        "NVIDIA_VISIBLE_DEVICES": uuid,
        "CUDA_VISIBLE_DEVICES": str(number),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


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
        if status.get("progress"):
            self._show(api.Progress.model_validate(status["progress"]))
        if status.get("points"):
            try:
                manifest.write(self._output, to_text(self.latest))
            except InputError as error:
                raise ReportError(str(error)) from error

    async def close(self) -> None:
        """Nothing to let go of."""


def to_text(profile: api.BatchProfile) -> str:
    """The manifest of a profile measured here, as YAML."""
    obj, status = profile.to_dict(), profile.status
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
    key, budget = profile.spec.key, profile.spec.measurement.budget
    print(f"measuring {key.model.source} on {key.accelerator.product or _cpu(key)} for {budget}", file=sys.stderr)
    print(
        f"profile: {plan.output}; the engine's output: {plan.log}; Ctrl-C stops and keeps what is done", file=sys.stderr
    )
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
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
        if not stopped:
            task.cancel()
        bar.note("stopping the engine (up to 20 s) ..." if not stopped else "still stopping the engine ...")
        stopped.append(number)

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
        print("stopped before the first point: nothing was written", file=sys.stderr)
        return
    print(f"stopped; {plan.output} keeps {found} points. Go on with:", file=sys.stderr)
    print(f"  {_resume(plan)}", file=sys.stderr)


def _resume(plan: Plan) -> str:
    words = ["tightship", "profile", "--resume", "-o", plan.output]
    if plan.python != sys.executable:
        words += ["--python", plan.python]
    if plan.profile.spec.key.model.source.startswith("pvc://"):
        words += ["--model", plan.environ["TIGHTSHIP_MODEL_PATH"]]
    if "TIGHTSHIP_LENGTHS_FILE" in plan.environ:
        words += ["--lengths", plan.environ["TIGHTSHIP_LENGTHS_FILE"]]
    return shlex.join(words)


def _conclude(plan: Plan, profile: api.BatchProfile) -> int:
    outcome, found = profile.status.outcome, len(profile.status.points)
    if outcome is None or outcome.state == "Failed":
        words = _how_it_ended(outcome) if outcome else "it ended without an outcome"
        print(f"tightship profile: {words}", file=sys.stderr)
        print(f"the engine's output is in {plan.log}", file=sys.stderr)
        if found:
            print(f"{plan.output} keeps {found} points; go on with:\n  {_resume(plan)}", file=sys.stderr)
        return FAILED
    print(f"{_how_it_ended(outcome)}\n", file=sys.stderr)
    how = profile.spec.measurement
    try:
        answer = subject.decision(profile.to_dict(), how)
    except ProfileError as error:
        print(f"tightship profile: {plan.output}: {error}", file=sys.stderr)
        return FAILED
    print("\n".join(advise.to_table(answer)), flush=True)
    options = " ".join(subject.advise_options(how))
    print("\nnext:", file=sys.stderr)
    print(
        f"  tightship advise -f {shlex.quote(plan.output)} {options} --explain".replace("  --", " --"), file=sys.stderr
    )
    print(f"  kubectl apply -f {shlex.quote(plan.output)}", file=sys.stderr)
    if profile.spec.key.model.source.startswith(subject.FILE):
        print(
            "note: no service's manifest names a model file://: measure with -f LLMSERVICE.yaml, or --source, to have it used",
            file=sys.stderr,
        )
    return MEASURED
