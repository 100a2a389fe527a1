"""What is measured, and what for: an LLMService, read from its manifest or put together from options.

Commands that write profiles build the same LLMService that a cluster would be given, check it by the same rules and take its
key from the same function, so that a profile measured here is found by the service there.

A model in a directory of this machine has no name that a cluster knows: its source is `file://DIRECTORY`, unless a manifest
(`-f`) or `--source` says what the cluster calls it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tightship.api.units import format_duration, parse_duration
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, ProfileKey
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import (
    HF_SOURCE,
    PVC_SOURCE,
    InvalidSpecError,
    lengths_digest,
    parse_service,
    profile_key,
)
from tightship.commands import options
from tightship.commands.manifest import InputError, read_service
from tightship.manifests.packs import batch_profile
from tightship.profiler.lengths import parse_lengths
from tightship.profiler.model import is_folder

HF: Final = "hf://"
FILE: Final = "file://"
_PLACEHOLDER: Final = "pvc://directory/model"

_KEY_OPTIONS: Final = {
    "source": "--source",
    "revision": "--revision",
    "image": "--image",
    "engine_arg": "--engine-arg",
    "max_model_len": "--max-model-len",
    "device": "--device",
    "cores": "--cores",
    "cores_per_replica": "--cores-per-replica",
    "memory": "--memory",
    "input_tokens": "--input-tokens",
    "output_tokens": "--output-tokens",
}
"""Options that a manifest answers, by their destination."""

_WORDS: Final = (
    ("spec.engine.args", "--engine-arg"),
    ("spec.engine.image", "--image"),
    ("spec.engine.maxModelLen", "--max-model-len"),
    ("spec.model.source", "--model"),
    ("spec.model.revision", "--revision"),
    ("spec.accelerator.product", "--product"),
    ("spec.accelerator.coresPerReplica", "--cores-per-replica"),
    ("spec.accelerator.cores", "--cores"),
    ("spec.accelerator.memory", "--memory"),
    ("spec.accelerator", "--device"),
    ("spec.workload.inputTokens", "--input-tokens"),
    ("spec.workload.outputTokens", "--output-tokens"),
    ("spec.workload", "--input-tokens, --output-tokens or --lengths"),
    ("spec.template.spec.engine.env", "--engine-env"),
    ("spec.profiling.budget", "--budget"),
    ("spec.packing.maxReplicasPerGPU", "--max-replicas-per-gpu"),
    ("metadata.name", "--name"),
)
"""A manifest's fields, and the options that fill them."""


@dataclass(frozen=True)
class Subject:
    """A service to be measured."""

    service: LLMService
    key: ProfileKey
    lengths: Path | None = None
    """The file of the lengths whose digest is in the key."""

    def profile(self, name: str | None = None) -> BatchProfile:
        """The BatchProfile that holds its measurement, as the operator would make it, without what only a Job needs."""
        made = BatchProfile.model_validate(batch_profile(self.service, self.key))
        measurement = made.spec.measurement.model_copy(
            update={
                "template": type(made.spec.measurement.template)(),
                "cache": None,
                "rerun": None,
                "lengths_from": self.service.spec.workload.lengths_from,
                "max_replicas_per_gpu": self.service.spec.packing.most_per_gpu,
                "minimum_gain": self.service.spec.packing.minimum_gain,
            }
        )
        metadata = made.metadata.model_copy(
            update={
                "name": name or made.metadata.name,
                "namespace": self.service.metadata.namespace,
                "labels": {labels.PROFILE_KEY: labels.key_value(self.key.hash)},
                "annotations": {},
            }
        )
        return made.model_copy(
            update={"metadata": metadata, "spec": made.spec.model_copy(update={"measurement": measurement})}
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "-f",
        "--filename",
        metavar="FILE",
        help="an LLMService manifest: all below is taken from it, and the profile will be that service's; - reads stdin",
    )
    what.add_argument("--model", metavar="MODEL", help="a directory, or ORGANISATION/NAME on the hub")
    what.add_argument(
        "--source",
        metavar="URI",
        help="what the cluster calls a model in a directory, such as pvc://models/opt (default: file://DIRECTORY, which "
        "no service's manifest can match)",
    )
    what.add_argument("--revision", help="branch, tag or commit on the hub")
    what.add_argument("--image", help="engine image that will serve the model")
    what.add_argument(
        "--engine-arg",
        action="append",
        metavar="ARG",
        help="a vLLM argument, such as --engine-arg=--dtype=float16; may be repeated",
    )
    what.add_argument(
        "--engine-env",
        action="append",
        type=_variable,
        metavar="NAME=VALUE",
        help="the engine's environment; may be repeated",
    )
    what.add_argument(
        "--max-model-len", type=_count, metavar="TOKENS", help="longest context (default: the model's own)"
    )
    what.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where NVML sees a GPU, else cpu")
    what.add_argument(
        "--product", help="the node label nvidia.com/gpu.product (default: what the driver calls the GPU, with hyphens)"
    )
    what.add_argument(
        "--cores", type=_count, metavar="N", help="cpu: cores of one pack (default: all this process may use)"
    )
    what.add_argument(
        "--cores-per-replica", type=_count, metavar="N", help="cpu: cores of one replica (default: --cores)"
    )
    what.add_argument("--memory", metavar="QUANTITY", help="cpu: memory of one pack (default: this machine's)")
    what.add_argument("--input-tokens", type=_count, metavar="N", help="mean prompt length")
    what.add_argument("--output-tokens", type=_count, metavar="N", help="mean completion length")
    what.add_argument(
        "--lengths",
        type=Path,
        metavar="FILE",
        help="lengths of real requests, instead of their means: lines of input,output, JSON "
        "pairs, or ShareGPT-like conversations; with -f, what its ConfigMap holds",
    )
    what.add_argument("--name", type=_dns_name, help="name of the profile (default: from the model and the key)")
    what.add_argument(
        "-n", "--namespace", type=_dns_label, help="its namespace (default: the manifest's, else none, so kubectl's)"
    )
    decision = parser.add_argument_group("what it is measured for (changed later, nothing is measured again)")
    options.add_decision_options(decision, "the manifest's")


def from_arguments(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Subject:
    """The service that the options speak of. `defaults`: for options that were not given, by destination.

    Raises:
        InputError: the manifest can't be read, something is missing, or something is refused.
    """
    lengths = _lengths_text(args.lengths)
    if args.filename is not None:
        given = [option for name, option in _KEY_OPTIONS.items() if getattr(args, name, None) not in (None, [])]
        if given:
            raise InputError(f"{', '.join(given)}: {args.filename} says that already; change it there, or leave -f out")
        obj = dict(read_service(args.filename))
    else:
        obj = _manifest(args, defaults or {}, lengths)
    service = _parse(obj, args)
    if args.namespace:
        service = service.model_copy(
            update={"metadata": service.metadata.model_copy(update={"namespace": args.namespace})}
        )
    wants = service.spec.workload.lengths_from
    if wants is not None and lengths is None:
        raise InputError(
            f"its lengths are in ConfigMap {wants.config_map.name}, key {wants.config_map.key}: give the same text with --lengths "
            f"FILE (kubectl get configmap {wants.config_map.name} -o go-template='{{{{index .data \"{wants.config_map.key}\"}}}}')"
        )
    if wants is None and lengths is not None:
        raise InputError("--lengths: the manifest's workload has mean lengths; write lengthsFrom there instead of them")
    return Subject(service, profile_key(service.spec, lengths), args.lengths)


def digest_of(path: Path) -> str:
    """The digest that a key holds of the lengths in a file. Raises InputError when it can't be read."""
    return lengths_digest(_lengths_text(path) or "")


def check_lengths(path: Path) -> None:
    """That a file holds lengths: their form only, for what a conversation has in tokens is the profiler's to count, by the model's tokenizer.

    Raises:
        InputError: it can't be read, or holds something else.
    """
    try:
        parse_lengths(_lengths_text(path) or "", lambda talk: 2 + len(talk.split()))
    except ValueError as error:
        raise InputError(f"--lengths {path}: {error}") from error


def names_a_key(args: argparse.Namespace) -> bool:
    """Whether the options say what is measured, beyond where the model lies here."""
    return args.filename is not None or any(getattr(args, name, None) not in (None, []) for name in _KEY_OPTIONS)


def _lengths_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--lengths {path}: {getattr(error, 'strerror', None) or error}") from error


def _manifest(args: argparse.Namespace, defaults: Mapping[str, Any], lengths: str | None) -> dict[str, Any]:
    """The manifest that the options amount to."""

    def value(name: str) -> Any:
        given = getattr(args, name, None)
        return defaults.get(name) if given is None else given

    missing = [f"--{name}" for name in ("model", "image") if not value(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given, or -f with an LLMService manifest that says them")
    source = _source(value("model"), value("source"))
    name = re.sub(r"[^a-z0-9]+", "-", source.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    name = re.sub(r"^(?=[^a-z])", "m-", name)[:40].rstrip("-") or "model"
    device = value("device") or "cuda"
    accelerator = {"device": device, "product": value("product")}
    if device == "cpu":
        accelerator = {"device": device, "cores": value("cores"), "coresPerReplica": value("cores_per_replica")}
        accelerator["memory"] = value("memory")
    workload: dict[str, Any] = {"inputTokens": value("input_tokens"), "outputTokens": value("output_tokens")}
    if lengths is not None:
        if args.input_tokens or args.output_tokens:
            raise InputError("--lengths holds the lengths themselves: leave --input-tokens and --output-tokens out")
        workload = {"lengthsFrom": {"configMap": {"name": f"{name}-lengths", "key": args.lengths.name}}}
    return {
        "metadata": {"name": name},
        "spec": {
            "model": _set({"source": source, "revision": value("revision")}),
            "engine": _set(
                {
                    "image": value("image"),
                    "args": list(value("engine_arg") or []),
                    "maxModelLen": value("max_model_len"),
                }
            ),
            "accelerator": _set(accelerator),
            "workload": _set(workload),
            "template": {
                "spec": {"engine": {"env": [{"name": name, "value": text} for name, text in value("engine_env") or []]}}
            },
        },
    }


def _source(model: str, source: str | None) -> str:
    if source is not None:
        return source
    if is_folder(model):
        return f"{FILE}{Path(model).resolve()}"
    if HF_SOURCE.match(model):
        return model
    if PVC_SOURCE.match(model):
        return model
    if HF_SOURCE.match(f"{HF}{model}"):
        return f"{HF}{model}"
    raise InputError(
        f"--model {model if len(model) <= 100 else f'{model[:97]}...'}: neither a directory here nor ORGANISATION/NAME on the hub"
    )


def _parse(obj: Mapping[str, Any], args: argparse.Namespace) -> LLMService:
    """The service, with the options about objectives, packing and budget put over the manifest's."""
    spec = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in (obj.get("spec") or {}).items()
    }
    bounds = objectives(args)
    if bounds is not None:
        spec["slo"] = {"objectives": bounds}
    over: Sequence[tuple[str, str, Any]] = (
        ("advisor", "efficiencyFloor", None if args.efficiency_floor is None else f"{args.efficiency_floor:g}"),
        ("packing", "minimumGain", None if args.minimum_gain is None else f"{args.minimum_gain:g}"),
        ("packing", "memoryReserve", args.memory_reserve),
        ("packing", "maxReplicasPerGPU", args.max_replicas_per_gpu),
        ("profiling", "budget", getattr(args, "budget", None)),
    )
    for part, field, value in over:
        if value is not None:
            spec[part] = {**(spec.get(part) or {}), field: value}
    source = str((spec.get("model") or {}).get("source", ""))
    local = args.filename is None and source.startswith(FILE)
    if local:
        # The rules of admission know no directories; all but this one hold for it too.
        spec["model"] = {**spec["model"], "source": _PLACEHOLDER}
    try:
        service = parse_service({**obj, "spec": spec})
    except InvalidSpecError as error:
        problems = error.problems if args.filename is not None else [_as_option(each) for each in error.problems]
        raise InputError("; ".join(problems)) from error
    if local:
        model = service.spec.model.model_copy(update={"source": source})
        service = service.model_copy(update={"spec": service.spec.model_copy(update={"model": model})})
    return service


def _as_option(problem: str) -> str:
    for field, option in _WORDS:
        if problem.startswith(field):
            return option + problem[len(field) :]
    return problem


def objectives(args: argparse.Namespace) -> list[dict[str, str]] | None:
    """The objectives among the options, as the API writes them; None where there are none, which is not the same as none wanted.

    Raises:
        InputError: --statistic without a bound that it could be of.
    """
    asked = options.objectives(args)
    if asked is None:
        return None
    return [
        {"metric": each.metric.value, "statistic": each.statistic.value, "max": format_duration(each.maximum)}
        for each in asked
    ]


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _dns_name(text: str) -> str:
    """A name that an API server takes (RFC 1123)."""
    if len(text) > 253 or not all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", part) for part in text.split(".")):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no name that Kubernetes takes: lower-case letters, digits, - and . are, as in opt-1.3b"
        )
    return text


def _dns_label(text: str) -> str:
    if "." in text or len(text) > 63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no namespace: those have at most 63 characters and no dots")
    return _dns_name(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def duration(text: str) -> str:
    """A duration above 0, for an option; the text as it was given."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} leaves no time: write a duration such as 10m")
    return text
