"""Encoding of graph values as JSON: messages, pydantic models, dataclasses, tuples, bytes.

`to_json` encodes them for responses, columns and events alike, so a value has the same form
wherever it is read.
"""

from __future__ import annotations

import base64
import dataclasses
import decimal
import uuid
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import orjson

_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_PASSTHROUGH_DATACLASS
_NUL = b"\\u0000"
#: U+FFFD, escaped: Postgres' jsonb holds no NUL, and dropping it could make two keys one.
_REPLACEMENT = b"\\ufffd"


def to_json(value: Any) -> bytes:
    """Return the JSON of any value of a graph. A value that has no JSON form becomes its `repr`."""
    try:
        encoded = orjson.dumps(value, default=_default, option=_OPTIONS)
    except (orjson.JSONEncodeError, TypeError):
        encoded = orjson.dumps(_plain(value, 0), option=orjson.OPT_NON_STR_KEYS)
    if _NUL in encoded:
        encoded = _without_nul(encoded)
    return encoded


def to_plain(value: Any) -> Any:
    """Return the same as dicts, lists, strings and numbers."""
    return orjson.loads(to_json(value))


def _default(value: Any) -> Any:  # noqa: PLR0911
    if hasattr(value, "model_dump") and callable(value.model_dump):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (uuid.UUID, PurePath)):
        return str(value)
    if isinstance(value, orjson.Fragment):
        return orjson.loads(orjson.dumps(value))
    if isinstance(value, BaseException):
        return {"error": type(value).__name__, "message": str(value)}
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "_asdict"):
        return value._asdict()
    return repr(value)


_MAX_DEPTH = 200
#: Python refuses to write longer integers in decimal (4,300 digits).
_MAX_BITS = 14_000


def _plain(value: Any, depth: int) -> Any:  # noqa: PLR0911
    """Convert, slowly, what orjson rejects: lone surrogates, huge integers, endless nesting."""
    if depth > _MAX_DEPTH:
        return "…"
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else _large(value)
    if isinstance(value, Mapping):
        return {str(_plain(k, depth + 1)): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, depth + 1) for item in value]
    plain = _default(value)
    return plain if isinstance(plain, str) else _plain(plain, depth + 1)


def _large(value: int) -> float | str:
    """Return an integer beyond 64 bits as a float, or as a string if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return hex(value) if value.bit_length() > _MAX_BITS else str(value)


def _without_nul(encoded: bytes) -> bytes:
    """Replace NUL escapes. A backslash that is itself escaped does not start one."""
    parts = encoded.split(b"\\\\")
    return b"\\\\".join(part.replace(_NUL, _REPLACEMENT) for part in parts)
