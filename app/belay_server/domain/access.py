"""Describe the caller of a request and the resources that it may access. No I/O.

A filter is what an authorization handler of `langgraph_sdk.Auth` returns: metadata fields with the
values they must have. It becomes part of each SQL statement that reads a resource for a client. So
a resource that the caller may not access is not found, and gets the same response as a missing one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

Filter = Mapping[str, Any]
#: The key in a run's `configurable` of its user's fields.
AUTH_USER = "langgraph_auth_user"
#: The fields of a user that whoever may read the run may read. Others, such as a token for a
#: graph, are for the run's own code.
_PUBLIC_FIELDS = ("identity", "display_name", "is_authenticated", "permissions")
#: An `$or` without alternatives never matches: no resource may be accessed.
NOTHING: Filter = {"$or": []}


def hash_of(token: str) -> str:
    """Return the hash that is stored of a random token."""
    return hashlib.sha256(token.encode()).hexdigest()


def with_public_user(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's config for clients: with the public fields of its user only."""
    configurable = config.get("configurable") or {}
    user = configurable.get(AUTH_USER)
    if user is None:
        return config
    public = {name: user[name] for name in _PUBLIC_FIELDS if name in user}
    return {**config, "configurable": {**configurable, AUTH_USER: public}}


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
