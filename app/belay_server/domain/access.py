"""Who asks, and what of the server's things they may see. No I/O.

A filter is what an authorization handler of `langgraph_sdk.Auth` returns: fields of the metadata
with the values they must have. It becomes part of each SQL statement that finds something for a
client, so what may not be seen is not found, and is answered like what is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Filter = Mapping[str, Any]
#: None of its alternatives holds: nothing may be seen.
NOTHING: Filter = {"$or": []}


@dataclass(frozen=True, slots=True)
class Access:
    """What may be seen, by kind; None: everything."""

    threads: Filter | None = None
    assistants: Filter | None = None
    crons: Filter | None = None


EVERYTHING = Access()
#: Of a request that nobody has authorized for anything yet.
NO_ACCESS = Access(NOTHING, NOTHING, NOTHING)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `name` is what limits count by; `team` is whose Agent runs they see."""

    name: str
    team: str
    #: May use the whole API, not only the Agent runs.
    everything: bool = True
    #: As the project's own authentication describes them: goes into the graphs' config.
    user: Mapping[str, Any] | None = field(default=None, repr=False)
