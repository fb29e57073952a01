"""Determine the team of a request from its API key. A request sees its team's agent runs only."""

from __future__ import annotations

import hashlib

from belay_server.api.security.authentication import caller, key_of_request
from belay_server.domain.agent_runs.errors import TeamNotFound


def team_of_request() -> str:
    """Return the team of the authenticated caller. Without authentication, each key stands for a
    separate team, named by the key's hash; the key is not stored or logged. Raises TeamNotFound."""
    if (known := caller()) is not None:
        return known.team
    key = key_of_request()
    if not key:
        raise TeamNotFound
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
