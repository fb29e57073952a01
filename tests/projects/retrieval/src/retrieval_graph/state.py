"""States with documents, which reducers replace, add to and delete."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Annotated, Any, Literal

from langchain_core.documents import Document
from langchain_core.messages import AnyMessage
from langgraph.graph import add_messages


def reduce_docs(
    existing: Sequence[Document] | None, new: Sequence[Any] | str | Literal["delete"]
) -> Sequence[Document]:
    if new == "delete":
        return []
    if isinstance(new, str):
        return [Document(new, id=str(uuid.uuid4()))]
    made = [
        one if isinstance(one, Document) else Document(**{"id": str(uuid.uuid4()), **one})
        for one in new
    ]
    return [*(existing or []), *made]


@dataclass(kw_only=True)
class IndexState:
    docs: Annotated[Sequence[Document], reduce_docs]


@dataclass(kw_only=True)
class InputState:
    messages: Annotated[Sequence[AnyMessage], add_messages]


@dataclass(kw_only=True)
class State(InputState):
    queries: Annotated[list[str], add] = field(default_factory=list)
    retrieved_docs: list[Document] = field(default_factory=list)
