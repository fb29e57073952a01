"""Describe fields in the OpenAPI document whose type apispec cannot derive from their class."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import JsonObject, ObjectList, StringList


def describe_field(
    _converter: Any, field: ma.fields.Field[Any], ret: dict[str, Any]
) -> dict[str, Any]:
    """Return additional properties of a field's schema. apispec passes its own properties in `ret`,
    which is changed in place."""
    if isinstance(field, StringList):
        _one_or_many(field, ret)
    if isinstance(field, JsonObject):
        ret.pop("default", None)
        return {"type": "string", "contentMediaType": "application/json"}
    if isinstance(field, ObjectList):
        kinds = ["array", "null"] if field.allow_none else "array"
        return {"type": kinds, "items": {"type": "object"}}
    for validator in field.validators:
        if isinstance(validator, ma.validate.Range) and not validator.min_inclusive:
            ret["exclusiveMinimum"] = ret.pop("minimum")
    return {}


def _one_or_many(field: StringList, ret: dict[str, Any]) -> None:
    """Describe a field that is a list of strings or one string."""
    item = {"type": "string", **({"enum": list(field.choices)} if field.choices else {})}
    ret.pop("type")
    ret["anyOf"] = [{"type": "array", "items": item}, item]
    ret.pop("items")
    if field.allow_none:
        ret["anyOf"].append({"type": "null"})
