"""Parse JSON from clients within limits: the number of values, the depth, storable characters.

The number of values is checked before the document is parsed. A body of many small values takes a
hundred times its size as Python objects, and blocks all other requests while it is parsed.
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
    """Return the parsed document. Raises InvalidRequest for invalid JSON, or beyond a limit."""
    encoded = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    _refuse_many_values(encoded, most_values)
    try:
        with _without_garbage_collection():
            document = orjson.loads(encoded)
    except orjson.JSONDecodeError as error:
        if "depth limit" in str(error):
            raise InvalidRequest(_too_deep()) from error
        raise InvalidRequest(INVALID) from error
    # Counting brackets is cheap, traversing the document is not. Most bodies need no traversal.
    if encoded.count(b"[") + encoded.count(b"{") > MAX_DEPTH or b"\\u0000" in encoded:
        check_document(document)
    return document


def _refuse_many_values(encoded: bytes, most: int) -> None:
    """Raise InvalidRequest for more values and keys than `most`. Count the marks outside strings:
    each value but the first of a list or object follows a comma, each list or object has an opening
    bracket, and each key has a colon."""
    if _marks(encoded) <= most:
        return
    without_escapes = encoded.replace(b"\\\\", b"").replace(b'\\"', b"")
    # The remaining quotes delimit strings, so every second part is outside of strings.
    too_many = without_escapes.count(b'"') > 2 * most + 2
    if too_many or _marks(b"".join(without_escapes.split(b'"')[::2])) > most:
        raise InvalidRequest(
            f"{INVALID}: more than {most:,} values and keys (BELAY_MAX_BODY_VALUES)"
        )


def _marks(encoded: bytes) -> int:
    return sum(encoded.count(mark) for mark in (b",", b":", b"[", b"{"))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection while a document is built: it would find nothing, and take longer
    than the parsing. No other greenlet runs meanwhile."""
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
    """Raise InvalidRequest for nesting beyond MAX_DEPTH, and for NUL characters in keys or
    values."""
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
