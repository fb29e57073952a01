from __future__ import annotations

import dataclasses
import datetime
import decimal
import uuid

import orjson
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage

from belay_server.graphs.serde import to_json, to_plain


@dataclasses.dataclass
class Point:
    x: int
    y: tuple[int, ...]


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


def test_values_of_graphs_are_converted_to_json():
    value = {
        "message": HumanMessage("hi", id="1"),
        "point": Point(1, (2, 3)),
        "set": {1},
        "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "id": uuid.UUID(int=1),
        "bytes": b"ab",
        "decimal": decimal.Decimal("1.5"),
        "opaque": Opaque(),
        5: "a number as key",
    }
    plain = to_plain(value)
    assert plain["message"]["type"] == "human"
    assert plain["point"] == {"x": 1, "y": [2, 3]}
    assert plain["set"] == [1]
    assert plain["when"] == "2026-01-01T00:00:00+00:00"
    assert plain["bytes"] == "YWI="
    assert plain["decimal"] == 1.5
    assert plain["opaque"] == "<opaque>"
    assert plain["5"] == "a number as key"


def test_a_message_keeps_its_tool_calls():
    call = {"name": "f", "args": {"a": 1}, "id": "c", "type": "tool_call"}
    assert to_plain(AIMessage("", tool_calls=[call]))["tool_calls"] == [call]


def test_nul_is_replaced_and_an_escaped_backslash_is_not():
    assert to_plain("a\0b") == "a\ufffdb"
    assert to_plain("a\\u0000b") == "a\\u0000b"
    assert to_plain("a\\\0b") == "a\\\ufffdb"
    assert to_plain({"k\0": 1}) == {"k\ufffd": 1}


def test_values_that_orjson_refuses_are_converted_to_json():
    assert to_plain("\ud800") == "?"
    assert to_plain({"n": 2**70})["n"] == float(2**70)
    nested: list = []
    for _ in range(400):
        nested = [nested]
    assert orjson.loads(to_json(nested))


@given(
    st.recursive(
        st.none() | st.booleans() | st.text() | st.binary() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_is_converted_to_json_without_nul(value):
    encoded = to_json(value)
    assert "\0" not in repr(orjson.loads(encoded)).encode("utf-8", "replace").decode()


def test_an_integer_beyond_a_double_is_a_string():
    """Python does not write an integer of 4,300 digits or more in decimal."""
    large, huge = 10**400, 2**15_000
    assert to_plain([large, -large, huge]) == [str(large), str(-large), hex(huge)]


def test_a_fragment_is_unchanged_beside_a_value_that_orjson_refuses():
    fragment = orjson.Fragment(b'{"a":[1,"x"]}')
    assert to_plain({"f": fragment, "huge": 2**70}) == {"f": {"a": [1, "x"]}, "huge": float(2**70)}
