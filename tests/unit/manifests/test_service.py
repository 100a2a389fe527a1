"""The Service in front of the replicas."""

from __future__ import annotations

from story import make_service
from tightship.api.v1alpha1 import labels
from tightship.api.v1alpha1.llmservice import LLMService
from tightship.manifests.service import selector_text, service_object, url


def parsed():
    obj = make_service("chat")
    obj["metadata"]["uid"] = "u1"
    return LLMService.model_validate(obj)


def test_port_80_leads_to_the_replicas_only():
    made = service_object(parsed())
    assert made["spec"]["type"] == "ClusterIP"
    assert made["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    assert made["spec"]["selector"] == {labels.INSTANCE: "chat", labels.COMPONENT: "replica", labels.SERVICE: "chat"}
    assert made["metadata"]["ownerReferences"][0]["uid"] == "u1"


def test_the_scale_subresource_sees_the_same_selector():
    pairs = dict(pair.split("=") for pair in selector_text(parsed()).split(","))
    assert pairs == service_object(parsed())["spec"]["selector"]


def test_the_address_is_openai_s():
    assert url(parsed()) == "http://chat.default.svc/v1"
