"""Check the keys of `langgraph.json` against its JSON schema, `langgraph.schema.json`.

The schema has every key that LangGraph's CLI knows, and Belay's own. `x-refused` is why a key stops
the start: ignoring it would not do what it promises. `x-warned` and `x-belay` are why a key has no
effect; the former is logged at the start.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from belay_server.graphs.project.loading import ProjectError


@cache
def schema_text() -> bytes:
    """Return the JSON schema of `langgraph.json`."""
    return files(__package__).joinpath("langgraph.schema.json").read_bytes()


def check_keys(path: Path, document: Mapping[str, Any]) -> list[str]:
    """Return a warning for each unknown key, and for each known key without effect that promises
    one. Raise ProjectError for a refused key."""
    schema = orjson.loads(schema_text())
    for name, why in _marked("x-refused", document, schema, ""):
        raise ProjectError(f"{path}: '{name}' is not supported: {why}")
    warnings = [
        f"'{name}' has no effect: {why}" for name, why in _marked("x-warned", document, schema, "")
    ]
    warnings += _unknown(document, schema, "")
    return [f"{path}: {warning}" for warning in warnings]


def _parts(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place, the value and the schema of each known key of an object."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        for choice in found.get("anyOf", [found]) if isinstance(found, dict) else ():
            if choice.get("type") != "string":
                yield f"{place}{name}", inner, choice


def _marked(
    mark: str, value: Any, schema: Mapping[str, Any], place: str
) -> Iterator[tuple[str, str]]:
    """Yield the place of each given key whose schema has the mark, and the mark's reason."""
    for where, inner, found in _parts(value, schema, place):
        if inner is not None and mark in found:
            yield where, found[mark]
        yield from _marked(mark, inner, found, f"{where}.")


def _unknown(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    known = schema.get("properties", {})
    if isinstance(value, dict) and schema.get("additionalProperties") is False:
        for name in value.keys() - known.keys():
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            yield f"unknown key '{place}{name}' is ignored{hint}"
    for where, inner, found in _parts(value, schema, place):
        yield from _unknown(inner, found, f"{where}.")
