"""Reads JSON from clients within bounds: of values, of depth, of characters that can be stored.

The bounds are checked before the document is built. A body of many small values costs a hundred
times its size as Python objects, and stands in the way of every other request while it is read.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from belay_server.domain.errors import InvalidRequest

MAX_DEPTH = 100
INVALID = "Invalid JSON in request body"


def parse_document(raw: bytes | str, *, most_values: int) -> Any:
    """The document. Raises InvalidRequest for what is no JSON, or is beyond a bound."""
    encoded = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    _refuse_many_values(encoded, most_values)
    try:
        with _without_garbage_collection():
            document = orjson.loads(encoded)
    except orjson.JSONDecodeError as error:
        if "depth limit" in str(error):
            raise InvalidRequest(_too_deep()) from error
        raise InvalidRequest(INVALID) from error
    # Counting is cheap, walking is not; most bodies need no walk.
    if encoded.count(b"[") + encoded.count(b"{") > MAX_DEPTH or b"\\u0000" in encoded:
        check_document(document)
    return document


def _refuse_many_values(encoded: bytes, most: int) -> None:
    """Each value but a first one has a comma before it, and each list or object may have a first
    one; the keys of objects have colons. Those in strings do not count."""
    if _marks(encoded) <= most:
        return
    without_escapes = encoded.replace(b"\\\\", b"").replace(b'\\"', b"")
    # What is left of the quotes are those around strings; every second part is outside of them.
    too_many = without_escapes.count(b'"') > 2 * most + 2
    if too_many or _marks(b"".join(without_escapes.split(b'"')[::2])) > most:
        raise InvalidRequest(
            f"{INVALID}: more than {most:,} values and keys (BELAY_MAX_BODY_VALUES)"
        )


def _marks(encoded: bytes) -> int:
    return sum(encoded.count(mark) for mark in (b",", b":", b"[", b"{"))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nothing of a document that is being built is garbage, and looking for some costs more than
    building it. No other greenlet runs meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _too_deep() -> str:
    return f"{INVALID}: nested more than {MAX_DEPTH} levels deep"


def check_document(document: Any) -> None:
    """Refuse nesting beyond MAX_DEPTH and NUL characters, in keys as in values."""
    level = [document]
    depth = 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and "\0" in item:
                raise InvalidRequest(f"{INVALID}: NUL characters cannot be stored")
        if any(isinstance(item, (dict, list)) for item in level):
            depth += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(_too_deep())
        level = below
