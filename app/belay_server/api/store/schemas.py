"""The schemas of the store's items."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import Body, Boolean, Integer, List, Number, Object
from belay_server.api.http.page_schemas import Paged


class Labels(List):
    """A namespace: a list of labels, from the root down."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ma.fields.String(), validate=ma.validate.Length(max=100), **kwargs)


def validate_index(value: Any) -> None:
    """Validate an index: False, or a list of paths into the value. Raises ValidationError."""
    if value is not False and not (
        isinstance(value, list) and all(isinstance(path, str) for path in value)
    ):
        raise ma.ValidationError("must be false or a list of paths")


class Item(ma.Schema):
    """An item of the store, as `Item.dict` of LangGraph's store returns it."""

    namespace = ma.fields.List(ma.fields.String(), required=True)
    key = ma.fields.String(required=True)
    value = Object(required=True)
    created_at = ma.fields.DateTime(required=True)
    updated_at = ma.fields.DateTime(required=True)


ITEM_OR_NULL = {"anyOf": [Item, {"type": "null"}]}


class FoundItem(Item):
    """An item of a search. `score` is its similarity; null without a semantic search."""

    score = ma.fields.Float(allow_none=True)


class FoundItems(ma.Schema):
    """A page of the items that match a search."""

    items = ma.fields.List(ma.fields.Nested(FoundItem), required=True)


class Namespaces(ma.Schema):
    """A page of namespaces, each a list of labels from the root down."""

    namespaces = ma.fields.List(ma.fields.List(ma.fields.String()), required=True)


class PutItem(Body):
    """The body of a put: an item, the paths to index and the TTL."""

    namespace = Labels(required=True)
    key = ma.fields.String(required=True, validate=ma.validate.Length(max=1000))
    value = Object(required=True)
    index = ma.fields.Raw(
        allow_none=True,
        validate=validate_index,
        metadata={
            "description": "The paths of the value to index for semantic search; false: none.",
            "anyOf": [
                {"type": "array", "items": {"type": "string"}},
                {"const": False},
                {"type": "null"},
            ],
        },
    )
    ttl = Number(
        allow_none=True,
        validate=ma.validate.Range(min=0, min_inclusive=False, max=100 * 365 * 24 * 60),
        metadata={"description": "In minutes; null: none, also if the project has a default."},
    )


class DeleteItem(Body):
    """The namespace, by default the empty one, and the key of an item to delete."""

    namespace = Labels(load_default=list)
    key = ma.fields.String(required=True)


class SearchItems(Body, Paged):
    """The body of a search: a namespace prefix, a filter, a text to compare with, and a page."""

    namespace_prefix = Labels(allow_none=True)
    filter = Object(
        allow_none=True,
        metadata={"description": "Values to compare with: equal, or by $eq $ne $gt $gte $lt $lte."},
    )
    query = ma.fields.String(
        allow_none=True,
        metadata={"description": "Text for semantic search, if the project has an index."},
    )
    refresh_ttl = Boolean(allow_none=True)


class ListNamespaces(Body):
    """The namespaces to list. Those with more than `max_depth` labels are truncated."""

    prefix = Labels(allow_none=True)
    suffix = Labels(allow_none=True)
    max_depth = Integer(allow_none=True, validate=ma.validate.Range(1, 100))
    limit = Integer(load_default=100, validate=ma.validate.Range(1, 1000))
    offset = Integer(load_default=0, validate=ma.validate.Range(0, 2**31))


def validate_storable(text: str) -> None:
    """Raise ValidationError for NUL characters. Bodies are checked as a whole, query strings are
    not."""
    if "\0" in text:
        raise ma.ValidationError("NUL characters cannot be stored")


class GetItemQuery(ma.Schema):
    """The namespace and the key of an item, and whether reading it renews its TTL."""

    namespace = ma.fields.List(
        ma.fields.String(validate=validate_storable),
        metadata={"description": "Labels joined by dots, or one label per parameter."},
    )
    key = ma.fields.String(validate=validate_storable)
    refresh_ttl = ma.fields.String()
