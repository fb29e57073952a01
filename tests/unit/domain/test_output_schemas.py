"""Test which output schemas are accepted, and which errors in an output they report."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time

import pytest

from belay_server.configuration.command_lines import mismatch_command
from belay_server.domain.agent_runs import output_schemas
from belay_server.domain.agent_runs.errors import InvalidOutputSchema
from belay_server.services.agent_runs.output_mismatch import output_mismatch

DIALECTS = (
    "http://json-schema.org/draft-07/schema#",
    "http://json-schema.org/draft-07/schema",
    "https://json-schema.org/draft-07/schema#",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2020-12/schema#",
)


def check_output_schema(schema):
    """Return the CPU time of the longest step, in seconds of this thread."""
    steps = output_schemas.check_output_schema(schema)
    longest, began = 0.0, time.thread_time()
    for _ in steps:
        now = time.thread_time()
        longest, began = max(longest, now - began), now
    return max(longest, time.thread_time() - began)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_three_dialects_are_accepted_under_each_of_their_names(dialect):
    schema = {"$schema": dialect, "type": "object", "required": ["a"]}
    check_output_schema(schema)
    assert output_mismatch(schema, {"a": 1}) is None
    wrong = output_mismatch(schema, {})
    assert wrong is not None
    assert (wrong["path"], wrong["keyword"], wrong["expected"]) == (
        "structured",
        "required",
        '["a"]',
    )


def test_each_dialect_has_its_own_keywords():
    tuple_of_two = [{"type": "string"}, {"type": "integer"}]
    old = {"$schema": DIALECTS[0], "items": tuple_of_two}
    new = {"prefixItems": tuple_of_two}
    for schema in (old, new):
        check_output_schema(schema)
        assert output_mismatch(schema, ["a", 1]) is None
        wrong = output_mismatch(schema, ["a", "b"])
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
def test_an_invalid_schema_is_refused_with_its_path(schema, path, keyword):
    with pytest.raises(InvalidOutputSchema, match="outputSchema") as raised:
        check_output_schema(schema)
    assert raised.value.about["path"] == path
    assert raised.value.about["keyword"] == keyword


def test_the_first_mismatch_is_reported_with_its_path():
    schema = {
        "type": "object",
        "properties": {"firms": {"type": "array", "items": {"$ref": "#/$defs/firm"}}},
        "$defs": {"firm": {"properties": {"name": {"type": "string", "maxLength": 3}}}},
    }
    check_output_schema(schema)
    assert output_mismatch(schema, {"firms": [{"name": "abc"}]}) is None
    wrong = output_mismatch(schema, {"firms": [{}, {"name": "x" * 1000}]})
    assert wrong is not None
    assert wrong["error"] == "OutputSchemaMismatch"
    assert (wrong["path"], wrong["keyword"]) == ("structured.firms[1].name", "maxLength")
    assert wrong["actual"] == "x" * 200 + "…"
    assert len(wrong["message"]) < 400


def test_the_check_of_a_recursive_schema_terminates():
    for schema in (
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$dynamicAnchor": "x", "allOf": [{"$dynamicRef": "#x"}]},
    ):
        check_output_schema(schema)
        assert output_mismatch(schema, {"a": 1}) is None
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}}}
    check_output_schema(tree)
    assert output_mismatch(tree, {"child": {"child": {}}}) is None
    wrong = output_mismatch(tree, {"child": {"child": 5}})
    assert wrong is not None
    assert wrong["path"] == "structured.child.child"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        # A copy of the whole value for each error: 22 GB.
        (
            {"anyOf": [{"allOf": [{"contains": {"const": -n}} for n in range(1, 1500)]}]},
            [{"a": n} for n in range(20_000)],
        ),
        # An error for each way through the alternatives.
        (
            {"anyOf": [{"items": {"$ref": "#"}, "type": "array"}] * 8},
            [[[[[[[[[[[[1]]]]]]]]]]]],
        ),
    ],
)
def test_a_mismatch_that_cannot_be_located_is_reported_without_its_place(schema, value):
    check_output_schema(schema)
    wrong = output_mismatch(schema, value)
    assert wrong is not None
    assert (wrong["error"], wrong["path"]) == ("OutputSchemaMismatch", "structured")
    assert "too complex" in wrong["message"]
    with subprocess.Popen(
        mismatch_command(), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps([schema, value]).encode())
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    assert status != 0
    assert usage.ru_maxrss < 1024 * 1024


def test_an_output_of_any_json_is_reported():
    for value in ({"a": 2**70}, {"ü": "ß"}, [1.5, None, True]):
        wrong = output_mismatch({"maxProperties": 0, "maxItems": 0}, value)
        assert wrong is not None
        assert wrong["keyword"].startswith("max")


def doubling(levels):
    """A schema whose references lead to its last level in 2 ** levels ways."""
    twice = {
        f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(levels)
    }
    return {"$defs": {**twice, f"d{levels}": {}}, "$ref": "#/$defs/d0"}


def test_schemas_that_take_long_to_compile_are_recognized():
    assert output_schemas.takes_long_to_compile({"pattern": "a"})
    assert output_schemas.takes_long_to_compile({"items": {"unevaluatedItems": False}})
    assert not output_schemas.takes_long_to_compile(doubling(20))
    check_output_schema(doubling(20))  # without such a keyword, it does not


def test_a_schema_that_took_long_to_compile_is_refused():
    slow = {**doubling(5), "unevaluatedProperties": False}
    output_schemas.refuse_slow_schema(slow, 0.9)
    output_schemas.refuse_slow_schema(doubling(5), 5.0)
    with pytest.raises(InvalidOutputSchema, match="too many combinations"):
        output_schemas.refuse_slow_schema(slow, 1.1)


def test_an_empty_schema_accepts_any_value():
    check_output_schema({})
    for value in (None, 1, "x", [], {}):
        assert output_mismatch({}, value) is None


def nested(leaf, twice=0):
    for level in range(100):
        leaf = {"items": [leaf, leaf] if level < twice else [leaf]}
    return leaf


@pytest.mark.parametrize("dialect", [DIALECTS[0], DIALECTS[3], DIALECTS[4]])
@pytest.mark.parametrize(
    ("schema", "is_taken"),
    [
        ({"properties": {f"p{n}": {"pattern": "(a{1,1000}){1,100}"} for n in range(99)}}, False),
        ({"properties": {f"p{n}": {"pattern": "a"} for n in range(101)}}, False),
        ({"patternProperties": {f"(a{{1,30}}){{1,{n}}}": {} for n in range(1, 102)}}, False),
        ({"allOf": [{"items": {"propertyNames": {"pattern": "a"}}}] * 101}, False),
        ({"enum": ["x" * 1000] * 600}, False),
        ({"pattern": r"\S" * 150}, True),
        ({"pattern": r"\S" * 151}, False),
        ({"pattern": "(?i)[^\u0100-\uffff]"}, False),
        ({"pattern": "(?i:[^\u0100-\uffff])"}, False),
        ({"properties": {f"p{n}": {"pattern": r"\p{L}{20}"} for n in range(100)}}, True),
        ({"type": [0] * 16_000}, False),
        ({"dependencies": {"a": [0] * 16_000}, "items": [1]}, False),
        ({"items": [[1]] * 8_000}, False),
        (nested({"type": 1}), False),
        (nested({"type": 1}, twice=11), False),
        ({"anyOf": [{}] * 20_000}, True),
        ({"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(1_500)}, "not": 1}, False),
    ],
    ids=itertools.count(),
)
def test_no_step_of_a_check_takes_long(dialect, schema, is_taken):
    """A step takes 0.1 s. The test allows 1 s of this thread's CPU time, for slow machines."""
    schema = {"$schema": dialect, **schema}
    if is_taken:
        assert check_output_schema(schema) < 1.0
        return
    began = time.thread_time()
    with pytest.raises(InvalidOutputSchema) as raised:
        check_output_schema(schema)
    assert raised.value.about["path"].startswith("outputSchema")
    assert time.thread_time() - began < 1.0


def test_an_invalid_regular_expression_is_found_at_any_depth():
    for schema, place in (
        ({"properties": {"a": {"anyOf": [{}, {"pattern": "a{2,1}"}]}}}, ".properties.a.anyOf[1]"),
        ({"not": {"patternProperties": {"a{2,1}": {}}}}, ".not.patternProperties"),
    ):
        with pytest.raises(InvalidOutputSchema) as raised:
            check_output_schema(schema)
        assert raised.value.about["path"].startswith(f"outputSchema{place}")


def test_a_large_invalid_schema_is_refused_without_an_explanation():
    schema = {"properties": {str(n): {"type": "strin"} for n in range(1_000)}}
    with pytest.raises(InvalidOutputSchema, match="validate it in parts"):
        check_output_schema(schema)


def test_common_patterns_are_accepted():
    patterns = [r"^.{1,500}$", r"^[^\s@]+@[^\s@]+\.\w+$", r"^(?!x)\d{4}-\d\d$", r"^\p{L}+$"]
    for pattern in patterns:
        check_output_schema({"properties": {f"p{n}": {"pattern": pattern} for n in range(100)}})
