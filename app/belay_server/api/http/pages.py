"""The common parts of search endpoints: paging headers with the exact total, and `select`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Response

from belay_server.api.http.bodies.json_body import json_response

#: The response schema of the count endpoints.
COUNT = {"type": "integer"}


def shown(row: Any, fields: Sequence[str]) -> dict[str, Any]:
    """Return these fields of a row, with timestamps in the format of LangGraph's server."""
    document = {name: getattr(row, name) for name in fields}
    return {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in document.items()
    }


def page_response(items: list[dict[str, Any]], *, total: int, limit: int, offset: int) -> Response:
    """Return a page with the total, and the next offset if there is another page, in headers."""
    headers = {"x-pagination-total": str(total)}
    if offset + len(items) < total:
        headers["x-pagination-next"] = str(offset + limit)
    return json_response(items, headers=headers)
