"""What the three kinds share: the base model, scalar types with their schemas, conditions, object references.

The models are read by people through `kubectl explain`: every field has a description. They serve twice, as the schema that
`tightship.api.crds` generates and as the parser of objects read from the cluster; a parser ignores fields it does not know, so
that an older operator survives a newer object.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

from tightship.api import units

DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|K|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
DECIMAL_PATTERN = r"^[0-9]+(\.[0-9]+)?$"
RESERVE_PATTERN = r"^([0-9]+(\.[0-9]+)?%|[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?)$"
PERCENTAGE_PATTERN = r"^([1-9][0-9]?|100)%$"
DNS_1035_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"

# Structural schemas (Kubernetes) carry these; pydantic passes them through.
PRESERVE_UNKNOWN: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


def list_map(*keys: str) -> dict[str, Any]:
    """Schema extension: a list that server-side apply merges by these keys."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}


def validations(*rules: tuple[str, str]) -> dict[str, Any]:
    """Schema extension: CEL rules as (rule, message), enforced by Kubernetes 1.25 and later."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


class Model(BaseModel):
    """Base of every API type: camelCase outside, snake_case inside, immutable once read."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    def to_dict(self) -> dict[str, Any]:
        """The object as Kubernetes sees it: camelCase keys, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _check_duration(value: str) -> str:
    units.parse_duration(value)
    return value


def _check_quantity(value: str) -> str:
    units.parse_quantity(value)
    return value


def _as_text(value: object) -> object:
    """YAML hands `5` or `0.1` over as a number where the API means a string; Kubernetes accepts integers for quantities."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Duration = Annotated[
    str,
    Field(max_length=32),
    AfterValidator(_check_duration),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN, "maxLength": 32}),
]
"""A Go duration: `30ms`, `20m`, `1h30m`."""

Quantity = Annotated[
    str,
    BeforeValidator(_as_text),
    AfterValidator(_check_quantity),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": QUANTITY_PATTERN,
            "maxLength": 32,
        }
    ),
]
"""A Kubernetes quantity: `64Gi`, `500Mi`, `2`."""


def _check_share(value: int | str) -> int | str:
    if isinstance(value, str) and not re.match(PERCENTAGE_PATTERN, value):
        raise ValueError("is neither a whole number nor a percentage from 1% to 100%")
    if isinstance(value, int) and value < 1:
        raise ValueError("is below 1")
    return value


Share = Annotated[
    int | str,
    AfterValidator(_check_share),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": PERCENTAGE_PATTERN,
            "maxLength": 4,
            "minimum": 1,
        }
    ),
]
"""Some of a whole, at least one: a number, or a percentage."""

Decimal = Annotated[str, WithJsonSchema({"type": "string", "pattern": DECIMAL_PATTERN, "maxLength": 32})]
"""A decimal number as a string: the API has no floats."""

Text = Annotated[str, Field(max_length=1024)]

Wish = Annotated[str | None, Field(max_length=128), BeforeValidator(lambda value: None if value == "" else value)]
"""A text that asks for something whenever it is new. An empty one asks for nothing: it is what a template leaves of a value not set."""

Name = Annotated[str, Field(min_length=1, max_length=253)]


class Condition(Model):
    """One observation about the object, in the form of metav1.Condition."""

    type: Annotated[str, Field(max_length=316, description="Type of the condition, in CamelCase.")]
    status: Annotated[Literal["True", "False", "Unknown"], Field(description="True, False or Unknown.")]
    reason: Annotated[str, Field(min_length=1, max_length=1024, description="Why, as one CamelCase word for programs.")]
    message: Annotated[str, Field(max_length=32768, description="Why, in words and numbers, and what to do next.")]
    observed_generation: Annotated[
        int | None, Field(ge=0, description="The metadata.generation this condition was computed from.")
    ] = None
    last_transition_time: Annotated[
        str | None,
        Field(description="When the status last flipped.", json_schema_extra={"format": "date-time"}),
    ] = None


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=32,
        description="What is true of this object, by type; `kubectl wait --for=condition=...` reads them.",
        json_schema_extra=list_map("type"),
    ),
]


class Metadata(Model):
    """The part of ObjectMeta that Tightship reads."""

    name: str = ""
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
