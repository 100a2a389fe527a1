"""What is to be thought of one LLMService: is it valid, which profile answers it, what does the advisor say.

Worked out from the objects alone, each time anew. The service's own reconciler reports it and the placement pass acts on it, so
the two cannot disagree, and neither waits for a status that the other has still to write.
"""

from __future__ import annotations

from dataclasses import dataclass

from tightship.api.v1alpha1.batchprofile import ProfileKey
from tightship.api.v1alpha1.conditions import Reason
from tightship.api.v1alpha1.gpupack import Assignment
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.api.v1alpha1.validation import InvalidSpecError
from tightship.core.advisor import Recommendation
from tightship.core.placement import Shape
from tightship.decide import ProfileError, decision_from_profile, objectives_from_api
from tightship.kube.store import Object, Store
from tightship.manifests.packs import profile_name
from tightship.reconcile import indexes
from tightship.reconcile.lengths import key_of
from tightship.reconcile.reading import checked, is_complete, is_imported, key_hash, rerun_of


@dataclass(frozen=True)
class Verdict:
    """One service, examined.

    `service` is None when the manifest can't be read at all. `profile` is the BatchProfile that answers the service's key (None:
    there is none yet), `profile_name` its name or the one it will get. `decision` is there once the profile is complete and readable;
    `unreadable` says why it isn't.
    """

    service: LLMService | None
    problems: tuple[str, ...] = ()
    key: ProfileKey | None = None
    profile: Object | None = None
    profile_name: str | None = None
    decision: Recommendation | None = None
    unreadable: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the profile has been measured (or imported)."""
        return self.profile is not None and is_complete(self.profile)

    @property
    def shape(self) -> Shape | None:
        """What every replica should run with: what was measured as it would run, never a packing that is only estimated.

        None where there is no answer, or memory was not measured.
        """
        decision = self.decision
        if self.problems or decision is None or decision.applied is None or self.profile_name is None:
            return None
        if decision.applied_kv_cache is None or decision.applied_memory is None:
            return None
        return Shape(self.profile_name, decision.applied.batch, decision.applied_kv_cache, decision.applied_memory)

    @property
    def per_device(self) -> int:
        """Replicas that may share one GPU or CPU set now; 0 where there is no answer."""
        return self.decision.applied.replicas if self.decision and self.decision.applied else 0

    def matches(self, assignment: Assignment, store: Store) -> bool:
        """Whether the profile behind an assignment is complete and of this service's key.

        Only then can replicas be made from the manifest as it stands: otherwise it says what has not been measured yet.
        """
        if self.problems or self.service is None or self.key is None:
            return False
        profile = store.get("BatchProfile", self.service.metadata.namespace or "", assignment.profile)
        return profile is not None and key_hash(profile) == self.key.hash and is_complete(profile)


def examine(obj: Object, store: Store) -> Verdict:
    """Examine an LLMService as the store shows it. Nothing is worked out twice as long as what it rests on is the same."""
    service, problems = store.derive(obj, checked)
    if service is None:
        return Verdict(None, problems)
    source = service.spec.workload.lengths_from
    lengths = store.get("ConfigMap", service.metadata.namespace or "", source.config_map.name) if source else None
    try:
        key = store.derive_with(obj, key_of, (lengths,), lambda: key_of(service, store))
    except InvalidSpecError as error:
        return Verdict(service, tuple(error.problems))
    profile, name = _profile(service, key, store)
    return store.derive_with(obj, examine, (key, profile), lambda: _examined(service, key, profile, name))


def _examined(service: LLMService, key: ProfileKey, profile: Object | None, name: str) -> Verdict:
    problem = _reference_problem(service, key, profile)
    if problem:
        return Verdict(service, (problem,), key, None, name)
    verdict = Verdict(service, (), key, profile, name)
    return _decide(verdict, service, profile) if verdict.complete and profile is not None else verdict


def wanted_by(profile: Object, store: Store) -> list[str]:
    """Names of the services (of the profile's namespace) that a measurement is for.

    Those that would decide from it: what another complete profile of the same key answers needs no GPU. And those that asked
    for it again (`profiling.rerun`), whatever else is there.
    """
    names_found = []
    namespace, keyed = profile["metadata"]["namespace"], key_hash(profile)
    candidates = [each for hashed in (keyed, "") for each in store.by("LLMService", indexes.KEY, hashed, namespace)]
    for obj in sorted(candidates, key=lambda each: str(each["metadata"]["name"])):
        if obj["metadata"].get("deletionTimestamp"):
            continue
        verdict = examine(obj, store)
        service, key = verdict.service, verdict.key
        if service is None or key is None or key.hash != keyed:
            continue
        again = service.spec.profiling.rerun
        asked = service.spec.profile_ref is None and again is not None
        asked = asked and again == rerun_of(profile)
        if asked or _profile(service, key, store)[1] == profile["metadata"]["name"]:
            names_found.append(service.metadata.name)
    return names_found


def _profile(service: LLMService, key: ProfileKey, store: Store) -> tuple[Object | None, str]:
    namespace, own_name = service.metadata.namespace or "", profile_name(key)
    if service.spec.profile_ref is not None:
        name = service.spec.profile_ref.name
        return store.get("BatchProfile", namespace, name), name
    found = store.by("BatchProfile", indexes.KEY, key.hash, namespace)
    # What is complete comes first, then what tells how replicas share a GPU, then what was measured again on purpose, then what is
    # in use (a later measurement that was cut short must not take its place), then our own name: a profile from Git may have any.
    again, used = service.spec.profiling.rerun, service.status.profile
    found.sort(
        key=lambda each: (
            not is_complete(each),
            not (each.get("status") or {}).get("memory"),
            again is None or is_imported(each) or again != rerun_of(each),
            used is None or each["metadata"]["name"] != used.name,
            each["metadata"]["name"] != own_name,
            each["metadata"]["name"],
        )
    )
    return (found[0], found[0]["metadata"]["name"]) if found else (None, own_name)


def _reference_problem(service: LLMService, key: ProfileKey, profile: Object | None) -> str | None:
    reference = service.spec.profile_ref
    if reference is None or profile is None or key_hash(profile) == key.hash:
        return None
    return (
        f"spec.profileRef: BatchProfile {reference.name} was measured for key {key_hash(profile)[:10]}, this manifest's key is "
        f"{key.hash[:10]}: model, engine, accelerator, workload, environment or resources differ; leave profileRef out to "
        "have this manifest measured, or change the manifest to what the profile measured"
    )


def _decide(verdict: Verdict, service: LLMService, profile: Object) -> Verdict:
    spec, decision, unreadable = service.spec, None, None
    try:
        decision = decision_from_profile(
            profile,
            objectives_from_api(spec.slo.objectives),
            efficiency_floor=float(spec.advisor.efficiency_floor),
            minimum_gain=float(spec.packing.minimum_gain),
            memory_reserve=spec.packing.memory_reserve,
            max_replicas=spec.packing.most_per_gpu,
        )
    except ProfileError as error:
        unreadable = f"BatchProfile {verdict.profile_name}: {error}"
    return Verdict(service, (), verdict.key, profile, verdict.profile_name, decision, unreadable)


WAITING_REASONS = frozenset({Reason.WAITING, Reason.MEASURING, Reason.UNSCHEDULABLE})
"""What a profile that is not complete may say of itself in a service's `Profiled`."""
