"""The lengths of requests that a ConfigMap holds, as the store shows them, and the key of a service with them.

Only ConfigMaps that carry the label `tightship.dev/lengths` are watched, so one without it can't be told from one that isn't
there: the words name both. What is in an entry is the profiler's to judge, but for an empty one; nothing is guessed in its place.
"""

from __future__ import annotations

from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.batchprofile import BatchProfile, ProfileKey
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.spec import LengthsFrom
from tightship.api.v1alpha1.validation import InvalidSpecError, lengths_digest, profile_key
from tightship.kube.store import Store


def key_of(service: LLMService, store: Store) -> ProfileKey:
    """What a measurement for this service depends on, the lengths in a ConfigMap included.

    Raises:
        InvalidSpecError: `workload.lengthsFrom` names what isn't there.
    """
    source = service.spec.workload.lengths_from
    if source is None:
        return profile_key(service.spec)
    try:
        return profile_key(service.spec, text_of(source, service.metadata.namespace or "", store))
    except LookupError as error:
        raise InvalidSpecError([f"spec.workload.lengthsFrom.configMap: {error.args[0]}"]) from error


def text_of(source: LengthsFrom, namespace: str, store: Store) -> str:
    """The text of the entry.

    Raises:
        LookupError: there is none; in words, with what to do.
    """
    wanted = source.config_map
    found = store.get("ConfigMap", namespace, wanted.name)
    if found is None:
        raise LookupError(
            f"ConfigMap {wanted.name} is not in namespace {namespace}, or lacks the label {labels.LENGTHS}, without which no ConfigMap "
            f"is read: create it with the entry {wanted.key}, and `kubectl label configmap {wanted.name} {labels.LENGTHS}=`"
        )
    text = (found.get("data") or {}).get(wanted.key)
    if text is None:
        there = ", ".join(sorted(found.get("data") or {})) or "none"
        binary = " as text, not as binaryData" if wanted.key in (found.get("binaryData") or {}) else ""
        raise LookupError(
            f"ConfigMap {wanted.name} has no entry {wanted.key}{binary} (its entries: {there}): add it, or change lengthsFrom.configMap.key"
        )
    if not text.strip():
        raise LookupError(
            f"the entry {wanted.key} of ConfigMap {wanted.name} is empty: write one request a line, `input,output` in tokens"
        )
    return str(text)


def measurable(profile: BatchProfile, store: Store) -> str | None:
    """Why the lengths of a profile's key can't be had for a measurement, in words; None when they can, or none are needed."""
    digest, source = profile.spec.key.workload.lengths_digest, profile.spec.measurement.lengths_from
    if digest is None:
        return None
    if source is None:
        return "the key holds a digest of lengths, and spec.measurement.lengthsFrom doesn't say where they are"
    try:
        text = text_of(source, profile.metadata.namespace or "", store)
    except LookupError as error:
        return str(error.args[0])
    if (actual := lengths_digest(text)) == digest:
        return None
    return (
        f"the entry {source.config_map.key} of ConfigMap {source.config_map.name} has digest {actual[:10]}..., the key is of lengths with "
        f"digest {digest[:10]}...: a service with the new lengths has them measured under a key of their own"
    )
