"""The budget in front of evictions: it selects what the Service selects, and says what the manifest says."""

from __future__ import annotations

import pytest

from story import make_service
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests.budget import disruption_budget
from tightship.manifests.service import service_object


@pytest.mark.parametrize("share", [1, 3, "25%"])
@pytest.mark.parametrize("replicas", [0, 1, 4])
def test_it_depends_on_nothing_that_scaling_changes(share: int | str, replicas: int) -> None:
    obj = make_service("chat", replicas=replicas, rollout={"maxUnavailable": share})
    obj["metadata"]["uid"] = "u1"
    service = LLMService.model_validate(obj)
    made, front = disruption_budget(service), service_object(service)
    assert made["spec"] == {"maxUnavailable": share, "selector": {"matchLabels": front["spec"]["selector"]}}
    assert made["metadata"] == front["metadata"]
