"""What one object says, read as a model or as an answer to one question. Pure functions of the object alone.

Those that cost something are asked for through `Store.derive`, which reads each version of an object once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tightship.api.v1alpha1 import conditions as names
from tightship.api.v1alpha1.batchprofile import ProfileKey
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import InvalidSpecError, parse_service, profile_key
from tightship.core.conditions import find, is_true
from tightship.kube.store import Object


def pack_model(obj: Object) -> GPUPack:
    """A pack as a model."""
    return GPUPack.model_validate(obj)


def readable(obj: Object) -> LLMService | None:
    """The service in a manifest; None where its schema isn't ours."""
    try:
        return LLMService.model_validate(obj)
    except ValidationError:
        return None


def checked(obj: Object) -> tuple[LLMService | None, tuple[str, ...]]:
    """The service in a manifest that keeps all rules; or None, and what is wrong with it."""
    try:
        return parse_service(obj), ()
    except InvalidSpecError as error:
        return None, tuple(error.problems)


def plain_key(obj: Object) -> ProfileKey | None:
    """What a measurement for the service depends on; None where it can't be read, or rests on a ConfigMap too."""
    service, _ = checked(obj)
    if service is None or service.spec.workload.lengths_from is not None:
        return None
    try:
        return profile_key(service.spec)
    except InvalidSpecError:
        return None


def is_complete(profile: Object) -> bool:
    """Whether a profile can be decided from."""
    return is_true(_conditions(profile), names.COMPLETE)


def is_settled(profile: Object) -> bool:
    """Whether a measurement ended, one way or the other, and neither an extension of it nor a new one is to be made."""
    return (is_complete(profile) and is_answered(profile)) or is_true(_conditions(profile), names.FAILED)


def is_answered(profile: Object) -> bool:
    """Whether all that is asked of a profile has been measured, or has failed."""
    if is_complete(profile):
        return asked_again(profile) is None and pending(profile) is None
    return (profile.get("status") or {}).get("outcome") is not None and asked_again(profile) is None


def outcome_of(profile: Object) -> Mapping[str, Any]:
    """What a profile's status says of how its measurement ended; {} before that."""
    return (profile.get("status") or {}).get("outcome") or {}


def asked_again(profile: Object) -> str | None:
    """The text (`measurement.rerun`) that a profile has still to answer."""
    rerun = rerun_of(profile)
    return None if is_imported(profile) or outcome_of(profile).get("rerun") == rerun else rerun


def pending(profile: Object) -> str | None:
    """The request for trials (`measurement.extend`) that a profile has still to answer."""
    request: str | None = ((profile["spec"].get("measurement") or {}).get("extend") or {}).get("request")
    return None if is_imported(profile) or outcome_of(profile).get("extend") == request else request


def failure_of(profile: Object) -> Mapping[str, Any] | None:
    """The condition that says why a measurement failed for good."""
    condition = find(_conditions(profile), names.FAILED)
    return condition if condition is not None and condition["status"] == "True" else None


def is_imported(profile: Object) -> bool:
    """Whether a profile came with its results, so that nothing is ever measured for it."""
    return profile["spec"].get("results") is not None


def key_hash(profile: Object) -> str:
    """The hash of a profile's key."""
    return str(profile["spec"]["key"]["hash"])


def rerun_of(profile: Object) -> str | None:
    """The text that a profile was last asked with to measure again; None where it wasn't, or with an empty one."""
    return (profile["spec"].get("measurement") or {}).get("rerun") or None


def _conditions(obj: Object) -> list[Mapping[str, Any]]:
    return (obj.get("status") or {}).get("conditions") or []
