"""Describe the caller of a request and the resources that it may access. No I/O.

A filter is what an authorization handler of `langgraph_sdk.Auth` returns: metadata fields with the
values they must have. It becomes part of each SQL statement that reads a resource for a client. So
a resource that the caller may not access is not found, and gets the same response as a missing one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from belay_server.domain.headers import SECRET_HEADERS

Filter = Mapping[str, Any]
#: The key in a run's `configurable` of its user's fields.
AUTH_USER = "langgraph_auth_user"
#: The fields of a user that all who may read the run may read. Others, such as a token for a
#: graph, are for the run's own code.
_PUBLIC_FIELDS = ("identity", "display_name", "is_authenticated", "permissions")
#: An `$or` without alternatives never matches: no resource may be accessed.
NOTHING: Filter = {"$or": []}


def hash_of(token: str) -> str:
    """Return the hash that is stored of a random token."""
    return hashlib.sha256(token.encode()).hexdigest()


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config for clients: without the credentials of its request's headers, and
    with the public fields of its user only."""
    configurable = without_secrets(config.get("configurable") or {})
    if user := configurable.get(AUTH_USER):
        configurable[AUTH_USER] = {name: user[name] for name in _PUBLIC_FIELDS if name in user}
    return {**config, "configurable": configurable}


def without_secrets(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's config or a checkpoint's metadata has besides headers with
    credentials."""
    return {name: value for name, value in fields.items() if name not in SECRET_HEADERS}


def necessary_path(filter_: Any) -> str | None:
    """Return a jsonpath predicate that is true for all metadata that a filter matches, and that
    Postgres finds in an index; None if there is none. It may be true for other metadata too."""
    if not isinstance(filter_, Mapping):
        return None
    parts: list[str | None] = []
    for name, wanted in filter_.items():
        if name == "$and" and isinstance(wanted, list):
            parts += map(necessary_path, wanted)
        elif name == "$or" and isinstance(wanted, list):
            alternatives = [necessary_path(one) for one in wanted]
            if alternatives and None not in alternatives:
                parts.append(" || ".join(f"({one})" for one in alternatives))
        elif not name.startswith("$"):
            parts += _comparisons(name, wanted)
    return " && ".join(f"({part})" for part in parts if part is not None) or None


def _comparisons(name: str, wanted: Any) -> list[str | None]:
    if not isinstance(wanted, Mapping):
        return [_equals(name, wanted)]
    found = [_equals(name, wanted["$eq"])] if "$eq" in wanted else []
    elements = wanted.get("$contains", [])
    # An equality in a jsonpath is true for a list, too, if it is true for one of its elements.
    return found + [
        _equals(name, one) for one in (elements if isinstance(elements, list) else [elements])
    ]


def _equals(name: str, value: Any) -> str | None:
    try:
        if not (value is None or isinstance(value, (str, int, float))):
            return None
        f"{name}{value}".encode()  # fails for half a surrogate pair, which has no JSON
        return f"$.{json.dumps(name)} == {json.dumps(value, allow_nan=False)}"
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Access:
    """The filter of each kind of resource. None allows all of that kind."""

    threads: Filter | None = None
    assistants: Filter | None = None
    crons: Filter | None = None


EVERYTHING = Access()
#: The access of a request before an authorization handler has allowed anything.
NO_ACCESS = Access(NOTHING, NOTHING, NOTHING)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller. Limits count by `name`; `team` owns the Agent runs that the caller may access."""

    name: str
    team: str
    #: Whether the caller may use the whole API, not only the Agent runs.
    everything: bool = True
    #: The user that the project's own authentication returned. It goes into the graphs' config.
    user: Mapping[str, Any] | None = field(default=None, repr=False)

    def as_creator(self) -> dict[str, Any]:
        """Return the JSON that is stored with the runs that this caller creates."""
        return {"name": self.name, "team": self.team, "everything": self.everything}

    @classmethod
    def of_creator(cls, creator: Mapping[str, Any], user: Mapping[str, Any] | None) -> Self:
        """Return the caller that `as_creator` has described."""
        return cls(creator["name"], creator["team"], everything=creator["everything"], user=user)
