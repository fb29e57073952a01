"""Schemas that callers ask outputs to have: which are taken, and what they say is wrong."""

from __future__ import annotations

import time

import pytest

from app.domain.agent_errors import InvalidOutputSchema
from app.domain.output_schemas import check_output_schema, mismatch

DIALECTS = (
    "http://json-schema.org/draft-07/schema#",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft-07/schema#",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2020-12/schema#",
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_three_dialects_are_taken_by_any_of_their_names(dialect):
    schema = {"$schema": dialect, "type": "object", "required": ["a"]}
    check_output_schema(schema)
    assert mismatch(schema, {"a": 1}) is None
    wrong = mismatch(schema, {})
    assert wrong is not None
    assert (wrong["path"], wrong["keyword"], wrong["expected"]) == (
        "structured",
        "required",
        '["a"]',
    )


def test_a_dialect_has_its_own_words():
    tuple_of_two = [{"type": "string"}, {"type": "integer"}]
    old = {"$schema": DIALECTS[0], "items": tuple_of_two}
    new = {"prefixItems": tuple_of_two}
    for schema in (old, new):
        check_output_schema(schema)
        assert mismatch(schema, ["a", 1]) is None
        wrong = mismatch(schema, ["a", "b"])
        assert wrong is not None
        assert wrong["path"] == "structured[1]"
    with pytest.raises(InvalidOutputSchema):
        check_output_schema({"items": tuple_of_two})


@pytest.mark.parametrize(
    ("schema", "path", "keyword"),
    [
        ({"type": "objct"}, "outputSchema.type", "anyOf"),
        ({"properties": {"a": [1]}}, "outputSchema.properties.a", "type"),
        ({"pattern": "("}, "outputSchema.pattern", "pattern"),
        ({"$ref": "#/nothing"}, "outputSchema", "$ref"),
        ({"$ref": "https://example.com/schema"}, "outputSchema", "$ref"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "outputSchema.$schema", "$schema"),
        ({"$schema": None}, "outputSchema.$schema", "$schema"),
    ],
)
def test_what_is_no_schema_is_refused_and_it_is_said_where(schema, path, keyword):
    with pytest.raises(InvalidOutputSchema, match="outputSchema") as raised:
        check_output_schema(schema)
    assert raised.value.about["path"] == path
    assert raised.value.about["keyword"] == keyword


def test_the_first_thing_that_is_wrong_is_told_with_its_place():
    schema = {
        "type": "object",
        "properties": {"firms": {"type": "array", "items": {"$ref": "#/$defs/firm"}}},
        "$defs": {"firm": {"properties": {"name": {"type": "string", "maxLength": 3}}}},
    }
    check_output_schema(schema)
    assert mismatch(schema, {"firms": [{"name": "abc"}]}) is None
    wrong = mismatch(schema, {"firms": [{}, {"name": "x" * 1000}]})
    assert wrong is not None
    assert wrong["error"] == "OutputSchemaMismatch"
    assert (wrong["path"], wrong["keyword"]) == ("structured.firms[1].name", "maxLength")
    assert wrong["actual"] == "x" * 200 + "…"
    assert len(wrong["message"]) < 400


def test_a_schema_that_refers_to_itself_ends():
    for schema in (
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$dynamicAnchor": "x", "allOf": [{"$dynamicRef": "#x"}]},
    ):
        check_output_schema(schema)
        assert mismatch(schema, {"a": 1}) is None
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}}}
    check_output_schema(tree)
    assert mismatch(tree, {"child": {"child": {}}}) is None
    wrong = mismatch(tree, {"child": {"child": 5}})
    assert wrong is not None
    assert wrong["path"] == "structured.child.child"


def test_an_empty_schema_takes_anything():
    check_output_schema({})
    for value in (None, 1, "x", [], {}):
        assert mismatch({}, value) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{n}": {"pattern": "(a{1,1000}){1,100}"} for n in range(99)}},
        {"properties": {f"p{n}": {"pattern": "a"} for n in range(101)}},
        {"patternProperties": {f"(a{{1,30}}){{1,{n}}}": {} for n in range(1, 102)}},
        {"allOf": [{"items": {"propertyNames": {"pattern": "a"}}}] * 101},
        {"enum": ["x" * 1000] * 600},
    ],
    ids=["large ones", "many", "many names of properties", "far inside", "half a megabyte"],
)
def test_what_would_take_long_to_compile_is_refused_at_once(schema):
    began = time.monotonic()
    with pytest.raises(InvalidOutputSchema) as raised:
        check_output_schema(schema)
    assert raised.value.about["path"].startswith("outputSchema")
    assert time.monotonic() - began < 1.0


def test_the_patterns_that_people_write_are_taken():
    patterns = [r"^.{1,500}$", r"^[^\s@]+@[^\s@]+\.\w+$", r"^(?!x)\d{4}-\d\d$", r"^\p{L}+$"]
    for pattern in patterns:
        check_output_schema({"properties": {f"p{n}": {"pattern": pattern} for n in range(100)}})
