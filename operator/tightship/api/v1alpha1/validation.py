"""The rules of admission, once more in Python: clusters below Kubernetes 1.25 drop CEL rules, and the operator must not.

Each check returns problems in words: what is wrong, with the value, and what to write instead. The CEL rules come from the same
patterns (`spec.py`, `template.py`), so the two cannot drift apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tightship.api import units
from tightship.api.v1alpha1 import common
from tightship.api.v1alpha1.batchprofile import KeyEngine, KeyModel, KeyWorkload, ProfileKey
from tightship.api.v1alpha1.llmservice import (
    MAX_NAME_LENGTH,
    ROUTING_RULE,
    SPREAD_RULE,
    LLMService,
    LLMServiceSpec,
)
from tightship.api.v1alpha1.spec import (
    PARALLEL_ONE_PATTERN,
    PARALLEL_PATTERN,
    PARALLEL_RULE,
    REFUSED_ARGS_PATTERN,
    REFUSED_ARGS_RULE,
    SOURCE_RULE,
    AcceleratorSpec,
    Workload,
)
from tightship.api.v1alpha1.template import (
    ANNOTATIONS_RULE,
    LABELS_RULE,
    RESERVED_ENV,
    RESERVED_LABELS,
    RESERVED_PREFIX,
    TemplateMetadata,
    TemplateSpec,
)

HF_SOURCE = re.compile(r"^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
PVC_SOURCE = re.compile(r"^pvc://(?P<claim>[a-z0-9][-a-z0-9.]*)/(?P<path>[^/].*)$")


class InvalidSpecError(ValueError):
    """A manifest that can't be served; `problems` says why, one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def parse_service(obj: Mapping[str, Any]) -> LLMService:
    """The LLMService in `obj`, as the API server returned it.

    Raises InvalidSpecError with every problem found, whether of the schema or of a rule.
    """
    try:
        service = LLMService.model_validate(obj)
    except ValidationError as error:
        raise InvalidSpecError([_in_words(item) for item in error.errors()]) from error
    problems = list(service_problems(service))
    if problems:
        raise InvalidSpecError(problems)
    return service


def _in_words(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']} (got {error.get('input')!s:.80})"


def service_problems(service: LLMService) -> Iterator[str]:
    """What the schema can't say and CEL says on newer clusters, for one service."""
    yield from _name_problems(service.metadata.name)
    spec = service.spec
    yield from _source_problems(spec.model.source)
    yield from engine_arg_problems(spec.engine.args)
    yield from _accelerator_problems(spec.accelerator)
    yield from _workload_problems(spec.workload)
    yield from _metadata_problems(spec.template.metadata)
    yield from _env_problems(spec.template.spec)
    yield from _spread_problems(spec)
    if spec.routing.mode == "InferencePool" and spec.routing.endpoint_picker is None:
        yield f"spec.routing: {ROUTING_RULE[1]}"
    yield from _number_problems(spec)
    metrics = [objective.metric for objective in spec.slo.objectives]
    for metric in sorted({metric for metric in metrics if metrics.count(metric) > 1}):
        yield f"spec.slo.objectives: {metric} is given {metrics.count(metric)} times; one objective per metric"


def _name_problems(name: str) -> Iterator[str]:
    if len(name) > MAX_NAME_LENGTH or not re.match(common.DNS_1035_PATTERN, name):
        yield (
            f"metadata.name: {name!r} ({len(name)} characters) is not a DNS-1035 label of at most {MAX_NAME_LENGTH} characters "
            "(lower-case letters, digits, hyphens; a letter first)"
        )


def _source_problems(source: str) -> Iterator[str]:
    if not (HF_SOURCE.match(source) or (PVC_SOURCE.match(source) and ".." not in source)):
        yield f"spec.model.source: {source!r}: {SOURCE_RULE[1]}"


def engine_arg_problems(args: Sequence[str]) -> Iterator[str]:
    """Arguments of the engine that Tightship refuses, each with the reason."""
    for arg in args:
        if re.match(REFUSED_ARGS_PATTERN, arg):
            yield f"spec.engine.args: {arg!r}: {REFUSED_ARGS_RULE[1]}"
        elif re.match(PARALLEL_PATTERN, arg) and not re.match(PARALLEL_ONE_PATTERN, arg):
            yield f"spec.engine.args: {arg!r}: {PARALLEL_RULE[1]}"


def _accelerator_problems(accelerator: AcceleratorSpec) -> Iterator[str]:
    if accelerator.device == "cuda" and not accelerator.product:
        yield "spec.accelerator.product: device cuda needs the node label nvidia.com/gpu.product, such as NVIDIA-H100-80GB-HBM3"
    if accelerator.device == "cpu":
        if accelerator.cores is None or accelerator.memory is None:
            yield "spec.accelerator: device cpu needs `cores` and `memory`, the part of a node that plays a GPU's part"
        elif (accelerator.cores_per_replica or 1) > accelerator.cores:
            yield (
                f"spec.accelerator.coresPerReplica: {accelerator.cores_per_replica} cores for a replica exceed "
                f"the {accelerator.cores} cores of a pack"
            )


def _workload_problems(workload: Workload) -> Iterator[str]:
    means = [name for name in ("input_tokens", "output_tokens") if getattr(workload, name) is not None]
    if workload.lengths_from is None and len(means) < 2:
        yield (
            "spec.workload: give both inputTokens and outputTokens, the mean lengths of your requests, or lengthsFrom, "
            "the lengths themselves"
        )
    elif workload.lengths_from is not None and means:
        yield "spec.workload: lengthsFrom holds the lengths themselves: leave inputTokens and outputTokens out beside it"


def _env_problems(template: TemplateSpec) -> Iterator[str]:
    for variable in template.engine.env:
        if variable.name.startswith(RESERVED_ENV):
            yield f"spec.template.spec.engine.env: {variable.name} is set by Tightship itself; choose another name or leave it out"


def _metadata_problems(metadata: TemplateMetadata) -> Iterator[str]:
    for name in metadata.labels:
        if name.startswith(RESERVED_PREFIX) or name in RESERVED_LABELS:
            yield f"spec.template.metadata.labels: {name}: {LABELS_RULE[1]}"
    for name in metadata.annotations:
        if name.startswith(RESERVED_PREFIX):
            yield f"spec.template.metadata.annotations: {name}: {ANNOTATIONS_RULE[1]}"


def _spread_problems(spec: LLMServiceSpec) -> Iterator[str]:
    spreads = spec.template.spec.topology_spread_constraints
    if spreads and spec.accelerator.device == "cpu":
        yield f"spec.template.spec.topologySpreadConstraints: {SPREAD_RULE[1]}"
    pairs = [(each.topology_key, each.when_unsatisfiable) for each in spreads]
    for key, what in sorted({pair for pair in pairs if pairs.count(pair) > 1}):
        yield f"spec.template.spec.topologySpreadConstraints: {key} with {what} is given {pairs.count((key, what))} times"


def _number_problems(spec: LLMServiceSpec) -> Iterator[str]:
    if float(spec.packing.minimum_gain) < 1:
        yield f"spec.packing.minimumGain: {spec.packing.minimum_gain} is below 1: packing that loses throughput is never kept"
    if not 0 <= float(spec.advisor.efficiency_floor) < 1:
        yield f"spec.advisor.efficiencyFloor: {spec.advisor.efficiency_floor} is not in [0, 1)"
    if units.parse_duration(spec.profiling.budget) <= 0:
        yield f"spec.profiling.budget: {spec.profiling.budget} leaves no time to measure"
    reserve = spec.packing.memory_reserve
    if reserve.endswith("%") and float(reserve[:-1]) >= 100:
        yield f"spec.packing.memoryReserve: {reserve} leaves no memory for replicas"
    for objective in spec.slo.objectives:
        if units.parse_duration(objective.max) <= 0:
            yield f"spec.slo.objectives: {objective.metric} max {objective.max} can't be met by any engine"


def lengths_digest(text: str) -> str:
    """What the profile key holds of a set of lengths: the SHA-256 of its text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def profile_key(spec: LLMServiceSpec, lengths: str | None = None) -> ProfileKey:
    """What a measurement for this service depends on, hashed.

    `lengths` is the text of the ConfigMap entry that `workload.lengthsFrom` names.

    Raises:
        ValueError: `lengthsFrom` is given and the text isn't.
    """
    engine, workload = spec.template.spec.engine, spec.workload
    if workload.lengths_from is not None and lengths is None:
        raise ValueError("the key of a workload with lengthsFrom needs the text of its lengths")
    digest = lengths_digest(lengths) if workload.lengths_from is not None and lengths is not None else None
    return ProfileKey.of(
        model=KeyModel(source=spec.model.source, revision=spec.model.revision),
        engine=KeyEngine(
            image=spec.engine.image,
            args=spec.engine.args,
            max_model_len=spec.engine.max_model_len,
            env=engine.env,
            env_from=[_source_name(source) for source in engine.env_from],
        ),
        accelerator=spec.accelerator,
        workload=KeyWorkload(
            input_tokens=workload.input_tokens, output_tokens=workload.output_tokens, lengths_digest=digest
        ),
        resources=engine.resources,
    )


def _source_name(source: Mapping[str, Any]) -> str:
    """`secretRef/NAME` of an envFrom source: names are part of the key, contents never."""
    return ",".join(
        f"{kind}/{reference.get('name', '')}"
        for kind, reference in sorted(source.items())
        if isinstance(reference, Mapping)
    )
