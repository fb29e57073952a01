"""Test which part of a run's context a graph gets, as LangGraph's server decides it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

import pytest
from pydantic import BaseModel, ConfigDict, Field

from belay_server.graphs.contexts import fitted


@dataclass
class Plain:
    model: str = "default"
    made: int = field(default=1, init=False)


@dataclass
class Required:
    model: str


class Model(BaseModel):
    model: str = Field("default", alias="the_model")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str = "default"


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Typed(TypedDict, total=False):
    model: str


BOTH = {"model": "m", "other": 1, "made": 2}


@pytest.mark.parametrize(
    ("schema", "context", "expected"),
    [
        (None, BOTH, None),
        (None, {}, None),
        *((schema, {}, {}) for schema in (Plain, Required, Model, Strict)),
        (Plain, BOTH, {"model": "m"}),
        (Required, BOTH, {"model": "m"}),
        (Strict, BOTH, {"model": "m"}),
        (Model, {"the_model": "m", "other": 1}, {"the_model": "m"}),
        (Open, BOTH, BOTH),
        (Typed, BOTH, BOTH),
        (Typed, {}, None),
        (dict, BOTH, BOTH),
    ],
)
def test_a_schema_with_fields_gets_those_alone(schema, context, expected):
    assert fitted(context, schema) == expected
