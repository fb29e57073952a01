"""Read named SQL queries from `app/belay_server/db/sql/<noun>.sql`.

A query starts at a line `-- name: <name>` and ends at the next one. Its name is the name of the
Python function that runs it.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


class Queries:
    """The queries of one noun as attributes."""

    def __init__(self, queries: dict[str, str]) -> None:
        self.__dict__.update(queries)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> str: ...


def load_queries(noun: str) -> Queries:
    """Return all queries of one noun as attributes. Raises ValueError for a duplicate name."""
    text = (files("belay_server.db") / "sql" / f"{noun}.sql").read_text()
    _, *parts = _NAME.split(text)
    names, bodies = parts[0::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{noun}.sql: a query name occurs twice")
    return Queries({name: body.strip() for name, body in zip(names, bodies, strict=True)})
