"""Marshmallow fields without type coercion: marshmallow's own convert "5" to 5 and 1 to True."""

from __future__ import annotations

import re
from collections.abc import Sequence, Sized
from typing import Any
from uuid import UUID

import marshmallow as ma
import orjson
from flask import request

from belay_server.api.http.bodies.json_documents import parse_document
from belay_server.domain.errors import InvalidRequest
from belay_server.domain.ids import parse_uuid

#: The most elements of a list in a body, and the most values of a JSON document in a query string.
_MOST = 10_000


class Body(ma.Schema):
    """The base of request schemas. Unknown fields are ignored, as by LangGraph's server."""

    class Meta:
        unknown = ma.EXCLUDE


class Selected(ma.Schema):
    """A mixin for responses whose fields a client may select, so that any field may be missing."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(partial=True, **kwargs)


_DIGITS = re.compile(r"-?[0-9]{1,18}", re.ASCII)


class Uuid(ma.fields.UUID):
    """A UUID in one of the notations that LangGraph's server accepts."""

    def _validated(self, value: Any) -> UUID:
        try:
            return value if isinstance(value, UUID) else parse_uuid(value)
        except ValueError as error:
            raise self.make_error("invalid_uuid") from error


class Integer(ma.fields.Integer):
    """A JSON integer; in a query string (`metadata={"in_query": True}`), ASCII digits."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if self.metadata.get("in_query"):
            if _DIGITS.fullmatch(value) is None:
                raise ma.ValidationError(f'{value!r} is not of type "integer"')
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ma.ValidationError(f'{value!r} is not of type "integer"')
        return value


class Number(ma.fields.Float):
    """A JSON number."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ma.ValidationError(f'{value!r} is not of type "number"')
        return value


class Boolean(ma.fields.Boolean):
    """A JSON boolean."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if not isinstance(value, bool):
            raise ma.ValidationError(f'{value!r} is not of type "boolean"')
        return value


class Object(ma.fields.Dict):
    """Any JSON object. Its keys are not validated, as JSON keys are always strings."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if not isinstance(value, dict):
            raise self.make_error("invalid")
        return value


#: Postgres compares each element of a filter's lists with each of a row's, and cannot be cancelled
#: while it does.
_MOST_IN_LISTS = 50


def validate_filter(value: dict[str, Any]) -> None:
    """Validate a containment filter. Raises ValidationError for long lists."""
    if _count_in_lists(value) > _MOST_IN_LISTS:
        raise ma.ValidationError(
            f"a filter's lists may have at most {_MOST_IN_LISTS} elements, all together"
        )


def _count_in_lists(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_count_in_lists, value.values()))
    if isinstance(value, list):
        if len(value) > _MOST_IN_LISTS:
            return len(value)
        return len(value) + sum(map(_count_in_lists, value))
    return 0


class Filter(Object):
    """A containment filter: an object that every matching row contains."""

    def __init__(self) -> None:
        super().__init__(allow_none=True, validate=validate_filter)


class List(ma.fields.List[Any]):
    """A list whose length is validated before its elements, and is always limited."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, list):
            _refuse_long(self, value)
        return super()._deserialize(value, attr, data, **kwargs)


class Map(ma.fields.Dict):
    """An object with validated keys and values, whose length is validated first, like a list's."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, dict):
            _refuse_long(self, value)
        return super()._deserialize(value, attr, data, **kwargs)  # type: ignore[no-untyped-call]


def _refuse_long(field: ma.fields.Field[Any], value: Sized) -> None:
    """Raise ValidationError for more elements than the field's own validators, or _MOST, allow."""
    for validator in field.validators:
        if isinstance(validator, ma.validate.Length):
            validator(value)
    if len(value) > _MOST:
        raise ma.ValidationError(f"has more than {_MOST} elements")


class ObjectList(ma.fields.Field[list[dict[str, Any]]]):
    """A list of any JSON objects, limited only by the body's size: their contents are not
    validated."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise ma.ValidationError("Not a valid list.")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise ma.ValidationError({index: ["Not a valid mapping type."]})
        return value


class JsonObject(ma.fields.Field[dict[str, Any]]):
    """Any JSON object, encoded as JSON in a query string."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            document = parse_document(value, most_values=_MOST)
        except InvalidRequest as error:
            raise ma.ValidationError(f"must be JSON ({error.detail})") from error
        if not isinstance(document, dict):
            raise ma.ValidationError('is not of type "object"')
        return document


class StringList(ma.fields.List[str]):
    """A list of strings, or one string. `choices` are for the OpenAPI document only; `validate`
    checks the values."""

    choices: Sequence[str] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ma.fields.String(), **kwargs)
        for validator in self.validators:
            if isinstance(validator, ma.validate.ContainsOnly):
                self.choices = tuple(validator.choices)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, list):
            _refuse_long(self, value)
        return super()._deserialize(
            [value] if isinstance(value, str) else value, attr, data, **kwargs
        )


def one_of(*choices: str) -> ma.validate.OneOf:
    """Return a validator for these choices."""
    return ma.validate.OneOf(choices, error="{input!r} is not one of {choices}")


def path_uuid(text: str, noun: str) -> UUID:
    """Return an id from the path. Raises InvalidRequest: `Invalid run ID: must be a UUID`."""
    try:
        return parse_uuid(text)
    except ValueError:
        raise InvalidRequest(f"Invalid {noun} ID: must be a UUID") from None


_TRUE = ("1", "true", "yes")


def query_flag(name: str, *also: str) -> bool:
    """Return a switch in the query string: true for 1, true, yes or a value in `also`, in any
    case."""
    value = request.args.get(name, "").strip().lower()
    return value in (*_TRUE, *also)


def query_list(values: list[str] | None) -> list[str]:
    """Return the values of a list in the query string: `mode=a&mode=b`, `mode=a,b` or a JSON list,
    which LangGraph's server accepts."""
    return [
        item.strip(" \"'")
        for value in values or []
        for item in value.strip("[] ").split(",")
        if item.strip(" \"'")
    ]


def query_names(values: list[str] | None) -> list[str]:
    """Return the names in `select=a&select=b`, or in a JSON list as the JavaScript SDK sends it."""
    return [name for value in values or [] for name in _names_of(value)]


def _names_of(value: str) -> list[str]:
    if not value.startswith("["):
        return [value]
    try:
        names = orjson.loads(value)
    except orjson.JSONDecodeError:
        return [value]
    return names if all(isinstance(name, str) for name in names) else [value]
