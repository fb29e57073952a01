"""Describe assistants: a graph with configuration, in versions. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

#: LangGraph's server derives the ids of its system assistants from this namespace (the RFC 4122 URL
#: namespace). With the same ids, a client that has one stored can use either server.
_SYSTEM_NAMESPACE = UUID("6ba7b821-9dad-11d1-80b4-00c04fd430c8")


def system_assistant_id(graph_id: str) -> UUID:
    """Return the id of a graph's system assistant, which is the same in every installation and on
    LangGraph's server."""
    return uuid5(_SYSTEM_NAMESPACE, graph_id)


@dataclass(frozen=True, slots=True)
class AssistantVersion:
    """One version of an assistant. It never changes."""

    assistant_id: UUID
    graph_id: str
    name: str
    description: str | None
    config: dict[str, Any]
    context: dict[str, Any]
    metadata: dict[str, Any]
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Assistant(AssistantVersion):
    """An assistant's current version."""

    updated_at: datetime
    #: Whether the server made it. Every caller of the API may read and run it.
    is_system: bool


ASSISTANT_FIELDS = (
    "assistant_id",
    "graph_id",
    "config",
    "context",
    "metadata",
    "name",
    "created_at",
    "updated_at",
    "version",
    "description",
)

VERSION_FIELDS = tuple(name for name in ASSISTANT_FIELDS if name != "updated_at")
