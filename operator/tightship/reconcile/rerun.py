"""`profiling.rerun`: having a key measured again, and whose settings it is measured with. Pure.

A text asks once, whoever else has texts of their own: the profile remembers the last one of each service that was dealt with (an
annotation), so that an old text never has anything measured, not even when another service of the key goes. A text that the profile has
already is used up: one measurement answers all who ask with the same words.

How to measure (budget, objectives, template, ...) is what the service that asked last wants. Until an engine has run the profile follows
that service's manifest, so that what keeps a Job from running is mended by mending the manifest. From then on it takes a new text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import Measurement
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.kube.store import Object, Store, labels_of
from tightship.manifests import packs
from tightship.reconcile.jobstate import end_of, has_begun
from tightship.reconcile.reading import is_answered, is_imported
from tightship.reconcile.verdict import wanted_by

_ASKED = ("rerun", "extend")
"""What of `spec.measurement` is asked for; the rest is how to measure."""


def is_due(service: LLMService, profile: Object) -> bool:
    """Whether the service's text is new: it is to be passed on, or used up."""
    wish = service.spec.profiling.rerun
    if wish is None or service.spec.profile_ref is not None or is_imported(profile):
        return False
    return _annotation(profile, labels.rerun_annotation(service.metadata.name)) != wish


def follows(service: LLMService, profile: Object, store: Store) -> bool:
    """Whether the profile's settings are to be this service's, though it asks for nothing anew.

    So it is while there is something to measure, no engine has run for it, and the service is the one that asked, or the first by name of
    those that wait. What a user wrote by hand is left as it is.
    """
    if labels_of(profile).get(labels.MANAGED_BY) != labels.PRODUCT or is_imported(profile) or is_answered(profile):
        return False
    waiting, asked = wanted_by(profile, store), _annotation(profile, labels.ANNOTATION_ASKED_BY)
    if service.metadata.name != (asked if asked in waiting else next(iter(waiting), None)):
        return False
    labelled = (labels.PROFILE, profile["metadata"]["name"])
    namespace = profile["metadata"]["namespace"]
    pods = store.list("Pod", namespace, labelled)
    return not any(end_of(job) is None and has_begun(job, pods) for job in store.list("Job", namespace, labelled))


def settings(service: LLMService, profile: Object) -> dict[str, Any]:
    """The merge patch that gives `spec.measurement` the service's settings; empty where it has them."""
    there, wanted = profile["spec"].get("measurement") or {}, packs.measurement(service)
    if _settings_of(there) == _settings_of(wanted):
        return {}
    return replacing({name: value for name, value in there.items() if name not in _ASKED}, wanted)


def replacing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch that makes `new` of `old`: what `new` leaves out goes."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        there = old.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            patch |= {name: inner} if (inner := replacing(there, value)) else {}
        elif value != there or name not in old:
            patch[name] = value
    return patch


def _settings_of(measurement: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings with every default in its place; None where they can't be read."""
    try:
        read = Measurement.model_validate(measurement)
    except ValidationError:
        return None
    return read.model_copy(update=dict.fromkeys(_ASKED)).to_dict()


def _annotation(profile: Object, name: str) -> str | None:
    found: str | None = (profile["metadata"].get("annotations") or {}).get(name)
    return found
