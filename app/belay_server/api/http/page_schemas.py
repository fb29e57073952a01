"""The schemas of paging and sorting."""

from __future__ import annotations

import marshmallow as ma

from belay_server.api.http.fields import Integer, one_of


class Paged(ma.Schema):
    """A page: at most `limit` items (by default 10), after the first `offset` items."""

    limit = Integer(load_default=10, validate=ma.validate.Range(1, 1000))
    offset = Integer(load_default=0, validate=ma.validate.Range(0, 2**31))


class Sorted(Paged):
    """A page with a sort order. Each search defines its own `sort_by`."""

    sort_order = ma.fields.String(
        allow_none=True, load_default="desc", validate=one_of("asc", "desc")
    )
