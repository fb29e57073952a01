"""JSON Schemas that callers ask an output to have. No I/O: what a schema refers to is in it, and
nothing is ever fetched for it.

Compiling one is quick, because what would not be is refused: regular expressions that are very many
or very large. Checking a value against one may take as long as whoever wrote it likes (`anyOf` of
`anyOf` of …), so that is done in a run's own child, which can be killed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonschema_rs
import orjson

from app.domain.agent_errors import InvalidOutputSchema

_Validator = (
    jsonschema_rs.Draft7Validator
    | jsonschema_rs.Draft201909Validator
    | jsonschema_rs.Draft202012Validator
)
_DEFAULT = "json-schema.org/draft/2020-12/schema"
#: By `$schema`, without its scheme and its empty fragment.
_DIALECTS: dict[str, tuple[str, type[_Validator]]] = {
    "json-schema.org/draft-07/schema": (
        "http://json-schema.org/draft-07/schema#",
        jsonschema_rs.Draft7Validator,
    ),
    "json-schema.org/draft/2019-09/schema": (
        "https://json-schema.org/draft/2019-09/schema",
        jsonschema_rs.Draft201909Validator,
    ),
    _DEFAULT: (
        "https://json-schema.org/draft/2020-12/schema",
        jsonschema_rs.Draft202012Validator,
    ),
}
#: More than anybody needs to see of a value that is wrong.
_SHOWN = 200
#: What compiles within half a second, at the worst.
_MOST_BYTES = 512 * 1024
_MOST_PATTERNS = 100
_WHOLE = {"path": "outputSchema"}
_PATTERN_OPTIONS = jsonschema_rs.FancyRegexOptions(size_limit=1_000_000)


def check_output_schema(schema: dict[str, Any]) -> None:
    """Raises InvalidOutputSchema, which says where it is wrong."""
    if len(orjson.dumps(schema)) > _MOST_BYTES:
        raise InvalidOutputSchema(f"outputSchema: must have at most {_MOST_BYTES} bytes", _WHOLE)
    if _count_patterns(schema) > _MOST_PATTERNS:
        raise InvalidOutputSchema(
            f"outputSchema: must have at most {_MOST_PATTERNS} regular expressions", _WHOLE
        )
    try:
        _compiled(schema)
    except jsonschema_rs.ValidationError as error:
        raise InvalidOutputSchema(
            f"outputSchema: {_short(error.message)}", _about(error, "outputSchema", None)
        ) from error


def _count_patterns(schema: Any) -> int:
    """Whatever stands under the names of the keywords that have them."""
    if isinstance(schema, list):
        return sum(map(_count_patterns, schema))
    if not isinstance(schema, dict):
        return 0
    named = schema.get("patternProperties")
    count = len(named) if isinstance(named, dict) else 0
    return count + ("pattern" in schema) + sum(map(_count_patterns, schema.values()))


def mismatch(schema: dict[str, Any], value: Any) -> dict[str, str] | None:
    """The first thing of an output that is not as asked, as the error its run ends with."""
    error = next(iter(_compiled(schema).iter_errors(value)), None)
    if error is None:
        return None
    about = _about(error, "structured", schema)
    message = f"{about['path']} is not what outputSchema asks for: {_short(error.message)}"
    return {"error": "OutputSchemaMismatch", "message": message, **about}


def _compiled(schema: dict[str, Any]) -> _Validator:
    named = schema.get("$schema", f"https://{_DEFAULT}")
    bare = named.partition("://")[2].removesuffix("#") if isinstance(named, str) else ""
    found = _DIALECTS.get(bare)
    if found is None:
        raise InvalidOutputSchema(
            "outputSchema: $schema must be draft-07, 2019-09 or 2020-12",
            {"path": "outputSchema.$schema", "keyword": "$schema", "actual": _shown(named)},
        )
    canonical, kind = found
    whole = {**schema, "$schema": canonical}
    return kind(whole, retriever=_refuse, pattern_options=_PATTERN_OPTIONS)


def _refuse(uri: str) -> NoReturn:
    raise ValueError(f"{uri} is not in the schema, and is not fetched")


def _about(error: Any, root: str, schema: dict[str, Any] | None) -> dict[str, str]:
    """Where in `root`, and which keyword of the schema; in words, as the clients have them."""
    keywords = [step for step in error.schema_path if isinstance(step, str)]
    about = {
        "path": _path(root, error.instance_path),
        "keyword": keywords[-1] if keywords else "$ref",
        "actual": _shown(error.instance),
    }
    expected = _at(schema, error.schema_path)
    return about if expected is None else {**about, "expected": _shown(expected)}


def _path(root: str, steps: Sequence[str | int]) -> str:
    """`structured.companies[0].name`"""
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


def _at(schema: Any, steps: Sequence[str | int]) -> Any:
    """What the schema has there; None when the way leads through a reference."""
    found = schema
    for step in steps:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def _shown(value: Any) -> str:
    return _short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
