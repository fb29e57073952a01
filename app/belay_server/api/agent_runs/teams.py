"""Whose agent runs a request may see: the team that its key stands for."""

from __future__ import annotations

import hashlib

from belay_server.api.security.authentication import caller, key_of_request
from belay_server.domain.agent_runs.errors import TeamNotFound


def team_of_request() -> str:
    """The team of whoever asks. Where nobody is asked who they are, any key names a team of its
    own, and is neither kept nor logged. Raises TeamNotFound."""
    if (known := caller()) is not None:
        return known.team
    key = key_of_request()
    if not key:
        raise TeamNotFound
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
