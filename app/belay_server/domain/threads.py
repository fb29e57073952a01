"""Describe threads, which hold a conversation's state between runs. No I/O.

`busy` is not stored: a thread is busy exactly while it has a pending or running run. Its resting
status is stored, the one that it has while no run is active.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID


class ThreadStatus(enum.StrEnum):
    """The statuses of a thread in LangGraph's API."""

    IDLE = "idle"
    BUSY = "busy"
    INTERRUPTED = "interrupted"
    ERROR = "error"


class TtlStrategy(enum.StrEnum):
    """What happens to a thread that has expired."""

    DELETE = "delete"
    KEEP_LATEST = "keep_latest"


@dataclass(frozen=True, slots=True)
class ThreadTtl:
    """How long an unused thread is kept, and what happens to it then."""

    minutes: float
    strategy: TtlStrategy = TtlStrategy.DELETE


@dataclass(frozen=True, slots=True)
class ThreadDefaults:
    """What a thread gives to each of its runs, unless the run sets it itself."""

    thread_id: UUID
    metadata: Mapping[str, Any] = field(default_factory=dict)
    #: The `configurable` of the assistant of the thread's first run.
    configurable: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread. The query derives `status` from its runs."""

    thread_id: UUID
    created_at: datetime
    updated_at: datetime
    state_updated_at: datetime
    metadata: dict[str, Any]
    config: dict[str, Any]
    status: str
    #: JSON, which may be large. None if the query has not read it.
    values: str | None
    #: JSON: the pending interrupts by task id.
    interrupts: str | None
    error: dict[str, str] | None
    values_known: bool
    ttl_minutes: float | None
    ttl_strategy: str | None
    #: None with a ttl: the thread has expired and was pruned.
    expires_at: datetime | None

    @property
    def asks(self) -> bool:
        """Whether the thread has a pending interrupt."""
        return self.interrupts not in (None, "null", "{}")


#: Fields of a thread that a client may select or sort by.
THREAD_FIELDS = (
    "thread_id",
    "created_at",
    "updated_at",
    "state_updated_at",
    "metadata",
    "config",
    "status",
    "values",
    "interrupts",
    "error",
)
