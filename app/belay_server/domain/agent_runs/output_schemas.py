"""Validate the JSON Schemas that clients set for an output. No I/O.

References must be to the schema itself; nothing is fetched.

A client's schema may cost far more to validate than its size suggests: a regular expression of
6 KB took half a minute to compile, and the error report for 95 KB of nested lists a minute. So a
schema is validated in bounded steps, between which a web process can serve other requests.
Validating a value against a schema has no time limit (`anyOf` of `anyOf` of …), so that is done in
the run's own child process, which can be killed. Locating a mismatch also has no limit of memory:
the library keeps a copy of the value for each alternative (1.4 GB for 300 bytes of `anyOf`). That
is done in a process of its own (`services.agent_runs.output_mismatch`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import jsonschema_rs
import orjson

from belay_server.domain.agent_runs.errors import InvalidOutputSchema

_Validator = (
    jsonschema_rs.Draft7Validator
    | jsonschema_rs.Draft201909Validator
    | jsonschema_rs.Draft202012Validator
)
_DEFAULT = "json-schema.org/draft/2020-12/schema"
#: The canonical name and the validator of each `$schema`, without scheme and empty fragment.
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
#: How many characters of an invalid value an error shows.
_SHOWN = 200
_MOST_BYTES = 64 * 1024
_MOST_PATTERNS = 100
#: In characters. Compiling `\S` this many times takes 0.1 s; the time grows with the square.
_LONGEST_PATTERN = 300
#: Not part of ECMA-262, JSON Schema's dialect, and very slow with large character classes.
_INLINE_FLAGS = re.compile(r"\(\?[a-zA-Z-]")
#: Errors are located in schemas up to this size; the library's time grows with its square.
_EXPLAINED_BYTES = 4 * 1024
_EXPLAINED_DEPTH = 20
#: CPU time, in which such a schema takes about 100 MB.
_MOST_COMPILE_SECONDS = 1.0
_WHOLE = {"path": "outputSchema"}
_PATTERN_OPTIONS = jsonschema_rs.FancyRegexOptions(size_limit=1_000_000)


def check_output_schema(schema: dict[str, Any]) -> Iterator[None]:
    """Check a schema in steps, each of which takes less than about a tenth of a second.

    Raises InvalidOutputSchema, which names the place of the error.
    """
    size = len(orjson.dumps(schema))
    if size > _MOST_BYTES:
        raise InvalidOutputSchema(f"outputSchema: must have at most {_MOST_BYTES} bytes", _WHOLE)
    patterns = list(_patterns(schema))
    _check_patterns(patterns)
    whole, kind = _with_dialect(schema)
    if not jsonschema_rs.meta.is_valid(whole):
        _explain(whole, size)
    yield
    with _refused():
        kind(_without_patterns(whole), retriever=_refuse)
    for pattern in patterns:
        yield
        with _refused(pattern.place):
            kind({"pattern": pattern.text}, pattern_options=_PATTERN_OPTIONS)


def takes_long_to_compile(schema: dict[str, Any]) -> bool:
    """Return whether compiling a schema may take long: it has regular expressions, or keywords for
    which the library follows every way through the schema's references."""
    return next(_patterns(schema), None) is not None or _has_unevaluated(schema)


def _has_unevaluated(schema: dict[str, Any]) -> bool:
    return b'"unevaluated' in orjson.dumps(schema)


def refuse_slow_schema(schema: dict[str, Any], seconds: float) -> None:
    """Raise InvalidOutputSchema if compiling a schema has taken so long that the run's child, which
    compiles it again, would need too much memory: a gigabyte in ten seconds."""
    if _has_unevaluated(schema) and seconds > _MOST_COMPILE_SECONDS:
        raise InvalidOutputSchema(
            "outputSchema: has too many combinations of references for unevaluatedProperties and"
            " unevaluatedItems",
            _WHOLE,
        )


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A regular expression of a schema, and its place there."""

    text: str
    place: str


def _explain(schema: dict[str, Any], size: int) -> NoReturn:
    """Raise InvalidOutputSchema, with the place of the error where the schema is small."""
    if size <= _EXPLAINED_BYTES and _depth(schema) <= _EXPLAINED_DEPTH:
        with _refused():
            jsonschema_rs.meta.validate(schema)
    raise InvalidOutputSchema(
        f"outputSchema: is not valid by {schema['$schema']}. The place is reported for schemas of"
        f" at most {_EXPLAINED_BYTES} bytes and {_EXPLAINED_DEPTH} levels; validate it in parts",
        _WHOLE,
    )


@contextmanager
def _refused(place: str | None = None) -> Iterator[None]:
    """Turn the library's ValidationError into InvalidOutputSchema."""
    try:
        yield
    except jsonschema_rs.ValidationError as error:
        about = _about(error, "outputSchema", None)
        if place is not None:
            about = {**about, "path": place, "keyword": "pattern"}
        raise InvalidOutputSchema(f"outputSchema: {_short(error.message)}", about) from error


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _check_patterns(patterns: list[_Pattern]) -> None:
    if len(patterns) > _MOST_PATTERNS:
        raise InvalidOutputSchema(
            f"outputSchema: must have at most {_MOST_PATTERNS} regular expressions", _WHOLE
        )
    for pattern in patterns:
        about = {"path": pattern.place, "keyword": "pattern", "actual": _shown(pattern.text)}
        if len(pattern.text) > _LONGEST_PATTERN:
            raise InvalidOutputSchema(
                "outputSchema: a regular expression must have at most"
                f" {_LONGEST_PATTERN} characters",
                about,
            )
        if _INLINE_FLAGS.search(pattern.text):
            raise InvalidOutputSchema(
                "outputSchema: a regular expression of JSON Schema has no inline flags", about
            )


def _patterns(schema: Any, place: str = "outputSchema") -> Iterator[_Pattern]:
    """Yield the values of the keywords that have regular expressions, at any depth."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _patterns(item, f"{place}[{index}]")
    elif isinstance(schema, dict):
        named = schema.get("patternProperties")
        for text in named if isinstance(named, dict) else ():
            yield _Pattern(text, f"{place}.patternProperties")
        if isinstance(schema.get("pattern"), str):
            yield _Pattern(schema["pattern"], f"{place}.pattern")
        for key, value in schema.items():
            yield from _patterns(value, f"{place}.{key}")


def _without_patterns(schema: Any) -> Any:
    """Return a copy of the schema with trivial regular expressions in place of its own."""
    if isinstance(schema, list):
        return [_without_patterns(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bare = {key: _without_patterns(value) for key, value in schema.items()}
    if isinstance(bare.get("pattern"), str):
        bare["pattern"] = ""
    if isinstance(bare.get("patternProperties"), dict):
        named = enumerate(bare["patternProperties"].values())
        bare["patternProperties"] = {str(index): value for index, value in named}
    return bare


def is_match(schema: dict[str, Any], value: Any) -> bool:
    """Return whether an output is valid. Needs little memory, but may take long."""
    return _compiled(schema).is_valid(value)


def explain(schema: dict[str, Any], value: Any) -> dict[str, str]:
    """Return the first mismatch of an invalid output as its run's error. May need any time and any
    memory."""
    try:
        _compiled(schema).validate(value)
    except jsonschema_rs.ValidationError as error:
        about = _about(error, "structured", schema)
        what = _short(error.message)
        return _mismatch(f"{about['path']} does not match outputSchema: {what}", about)
    raise ValueError("the output is valid")


def unexplained() -> dict[str, str]:
    """Return the error of a run whose output is invalid, if the place cannot be located."""
    return _mismatch(
        "structured does not match outputSchema. The schema is too complex to locate the place",
        {"path": "structured"},
    )


def _mismatch(message: str, about: dict[str, str]) -> dict[str, str]:
    return {"error": "OutputSchemaMismatch", "message": message, **about}


def _compiled(schema: dict[str, Any]) -> _Validator:
    whole, kind = _with_dialect(schema)
    return kind(whole, retriever=_refuse, pattern_options=_PATTERN_OPTIONS)


def _with_dialect(schema: dict[str, Any]) -> tuple[dict[str, Any], type[_Validator]]:
    """Return the schema with its dialect's canonical name, and the dialect's validator."""
    named = schema.get("$schema", f"https://{_DEFAULT}")
    bare = named.partition("://")[2].removesuffix("#") if isinstance(named, str) else ""
    found = _DIALECTS.get(bare)
    if found is None:
        raise InvalidOutputSchema(
            "outputSchema: $schema must be draft-07, 2019-09 or 2020-12",
            {"path": "outputSchema.$schema", "keyword": "$schema", "actual": _shown(named)},
        )
    canonical, kind = found
    return {**schema, "$schema": canonical}, kind


def _refuse(uri: str) -> NoReturn:
    raise ValueError(f"{uri} is not in the schema, and is not fetched")


def _about(error: Any, root: str, schema: dict[str, Any] | None) -> dict[str, str]:
    """Return the error's path below `root`, its keyword and its values, as clients get them."""
    keywords = [step for step in error.schema_path if isinstance(step, str)]
    about = {
        "path": _path(root, error.instance_path),
        "keyword": keywords[-1] if keywords else "$ref",
        "actual": _shown(error.instance),
    }
    expected = _at(schema, error.schema_path)
    return about if expected is None else {**about, "expected": _shown(expected)}


def _path(root: str, steps: Sequence[str | int]) -> str:
    """Return a path like `structured.companies[0].name`."""
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


def _at(schema: Any, steps: Sequence[str | int]) -> Any:
    """Return the schema's value at a path. Return None if the path leads through a reference."""
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
