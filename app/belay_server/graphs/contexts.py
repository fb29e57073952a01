"""Fit a run's context to the schema that a graph, or a factory, declares for it.

A run's `configurable` is its context too, so it may have keys of which a graph knows nothing. As in
LangGraph's server, a dataclass or a pydantic model gets its own fields alone, and its defaults for
a run without a context. Any other schema gets the context as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from pydantic import BaseModel


def fitted(context: dict[str, Any], schema: Any) -> dict[str, Any] | None:
    """Return the part of the context that the schema has. Without a schema, and for an empty
    context whose schema has no defaults, return None."""
    names = _fields_of(schema)
    if names is None:
        return context or None if schema is not None else None
    return {name: value for name, value in context.items() if name in names}


def is_made(schema: Any) -> bool:
    """Return whether a context is an object of the schema's class, not a dict."""
    is_model = inspect.isclass(schema) and issubclass(schema, BaseModel)
    return is_model or dataclasses.is_dataclass(schema)


def _fields_of(schema: Any) -> frozenset[str] | None:
    """Return the names that a dataclass or a model accepts. None if it accepts any."""
    if not is_made(schema):
        return None
    if dataclasses.is_dataclass(schema):
        return frozenset(field.name for field in dataclasses.fields(schema) if field.init)
    if schema.model_config.get("extra") == "allow":
        return None
    names: set[str] = set()
    for name, field in schema.model_fields.items():
        aliases = (field.alias, field.validation_alias)
        names |= {name, *(alias for alias in aliases if isinstance(alias, str))}
    return frozenset(names)
