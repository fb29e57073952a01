"""An assistant is a graph plus configuration, versioned. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

#: The namespace LangGraph's own server derives its system assistants' ids from (the RFC 4122 URL
#: namespace), so that an id written into a client stays right when the server is exchanged.
_SYSTEM_NAMESPACE = UUID("6ba7b821-9dad-11d1-80b4-00c04fd430c8")


def system_assistant_id(graph_id: str) -> UUID:
    """The stable id of the assistant every graph has from the start."""
    return uuid5(_SYSTEM_NAMESPACE, graph_id)


@dataclass(frozen=True, slots=True)
class AssistantVersion:
    """An assistant as it was; it never changes."""

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
    """As it is now."""

    updated_at: datetime
    #: One of the server's own: whoever may call the API may read and run it.
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
