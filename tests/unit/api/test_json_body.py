"""Test that JSON bodies that cannot be stored exactly are refused and others are read unchanged."""

from __future__ import annotations

import gc
import json

import pytest
from flask import Request
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from belay_server.api.http.bodies.json_body import read_body
from belay_server.api.http.bodies.json_documents import MAX_DEPTH, parse_document
from belay_server.domain.errors import InvalidRequest


def read(body: bytes):
    request = Request(EnvironBuilder(method="POST", data=body).get_environ())
    return parse_document(read_body(request, None), most_values=200_000)


def nested(levels: int, inner: bytes = b"") -> bytes:
    return b"[" * levels + inner + b"]" * levels


@pytest.mark.parametrize("inner", [b"", b"1", b'"x"', b"null"])
@pytest.mark.parametrize("beside", [b"", b",[],{},[{}]"])
def test_the_deepest_body_allowed_has_max_depth_levels(inner, beside):
    """A value in the innermost array does not count as a level; its siblings change nothing."""
    body = b"[" + nested(MAX_DEPTH - 1, inner) + beside + b"]"
    assert read(body) == json.loads(body)
    with pytest.raises(InvalidRequest):
        read(b"[" + body + b"]")


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 1_000, 1_024, 1_025, 20_000, 1_000_000])
@pytest.mark.parametrize("opened_only", [False, True])
def test_any_deeper_body_is_refused(levels, opened_only):
    with pytest.raises(InvalidRequest):
        read(b"[" * levels if opened_only else nested(levels))


@pytest.mark.parametrize("levels", [0, 1, MAX_DEPTH - 2])
@pytest.mark.parametrize("text", [rb'"\u0000"', rb'"a\u0000b"', rb'{"\u0000":1}', rb'"\\\u0000"'])
def test_a_nul_is_refused_at_any_depth(levels, text):
    with pytest.raises(InvalidRequest):
        read(nested(levels, text))


@pytest.mark.parametrize("text", [rb'"\\u0000"', rb'{"\\u0000": "\\\\u0000"}'])
def test_an_escaped_backslash_before_u0000_is_not_a_nul(text):
    assert read(text) == json.loads(text)


_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
_NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | _NUMBERS | _TEXTS
_DOCUMENTS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner), max_leaves=20
)


@given(_DOCUMENTS, st.booleans())
def test_a_storable_document_is_read_unchanged(document, ascii_only):
    assert read(json.dumps(document, ensure_ascii=ascii_only).encode()) == document


def marks_of(document) -> int:
    """Return the number of commas, colons and opening brackets outside a document's strings."""
    if isinstance(document, list):
        return 1 + max(0, len(document) - 1) + sum(map(marks_of, document))
    if isinstance(document, dict):
        commas = max(0, len(document) - 1)
        return 1 + commas + len(document) + sum(map(marks_of, document.values()))
    return 0


@given(_DOCUMENTS, st.booleans())
def test_values_are_counted_exactly_whatever_the_strings_contain(document, as_ascii):
    raw = json.dumps(document, ensure_ascii=as_ascii).encode()
    most = marks_of(document)
    assert parse_document(raw, most_values=most) == json.loads(raw)
    if most:
        with pytest.raises(InvalidRequest, match="BELAY_MAX_BODY_VALUES"):
            parse_document(raw, most_values=most - 1)


@pytest.mark.parametrize(
    "body", [b'"' + b'\\"' * 300_000, b'["' + b"," * 300_000, b'["' + b"\\" * 300_001]
)
def test_an_unterminated_string_is_refused(body):
    with pytest.raises(InvalidRequest):
        read(body)


def test_garbage_collection_is_enabled_after_a_document():
    assert gc.isenabled()
    with pytest.raises(InvalidRequest):
        read(b"{")
    assert gc.isenabled()
