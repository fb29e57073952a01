"""Check the keys of `langgraph.json` against its JSON schema, `langgraph.schema.json`.

The schema has every key that LangGraph's CLI knows, and Belay's own. `x-refused` is why a key stops
the start: ignoring it would not do what it promises. `x-belay` is why a key has no effect.
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
    """Return a warning for each unknown key. Raise ProjectError for a refused one."""
    schema = orjson.loads(schema_text())
    refused = [(name, why) for name, why in _refused(document, schema, "") if why]
    if refused:
        name, why = refused[0]
        raise ProjectError(f"{path}: '{name}' is not supported: {why}")
    return [f"{path}: {warning}" for warning in _unknown(document, schema, "")]


def _parts(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place, the value and the schema of each known key of an object."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        for choice in found.get("anyOf", [found]) if isinstance(found, dict) else ():
            if choice.get("type") != "string":
                yield f"{place}{name}", inner, choice


def _refused(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, str]]:
    for where, inner, found in _parts(value, schema, place):
        if inner is not None and "x-refused" in found:
            yield where, found["x-refused"]
        yield from _refused(inner, found, f"{where}.")


def _unknown(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    known = schema.get("properties", {})
    if isinstance(value, dict) and schema.get("additionalProperties") is False:
        for name in value.keys() - known.keys():
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            yield f"unknown key '{place}{name}' is ignored{hint}"
    for where, inner, found in _parts(value, schema, place):
        yield from _unknown(inner, found, f"{where}.")
