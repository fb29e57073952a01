"""A research graph without a network. It looks topics up in a small dictionary.

It serves the example's Agent runs (`agent_runs` in `langgraph.json`), so its input is the fields of
such a request, and its `text`, `structured` and `grounding` are the output. The outer graph plans
and reports; a subgraph looks each topic up. Input: `{"query": "…"}`.
"""

from __future__ import annotations

import asyncio
import operator
import re
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph

_SHELF = {
    "belay": "To belay is to hold a climber safe, and to take an order back.",
    "run": "A run is one request to execute an assistant on a thread.",
    "thread": "A thread holds the state of a conversation between runs.",
}
_SOURCES = "https://example.com/shelf/"


class Note(TypedDict):
    """A topic, and the text that the dictionary has for it."""

    topic: str
    text: str


class LookUp(TypedDict, total=False):
    """The state of the subgraph: the topics to look up, and the notes found."""

    topics: list[str]
    notes: Annotated[list[Note], operator.add]


async def read(state: LookUp) -> LookUp:
    """Return a note for each topic. Raises KeyError for an unknown one."""
    await asyncio.sleep(0.05)
    return {"notes": [{"topic": topic, "text": _SHELF[topic]} for topic in state["topics"]]}


look_up = StateGraph(LookUp).add_node("read", read).add_edge(START, "read").compile()


class State(TypedDict, total=False):
    """The state of the graph: the request's fields, the plan, and the output's fields."""

    query: str
    outputSchema: dict[str, Any]
    topics: list[str]
    notes: Annotated[list[Note], operator.add]
    text: str
    structured: Any
    grounding: list[dict[str, Any]]


def plan(state: State) -> State:
    """Return the topics in the query that the dictionary has, without duplicates."""
    words = re.findall(r"\w+", state.get("query", "").lower())
    return {"topics": [word for word in dict.fromkeys(words) if word in _SHELF]}


def report(state: State) -> State:
    """Return the output: the notes' text, their citations and, with a schema, the structure."""
    notes = state.get("notes", [])
    text = " ".join(note["text"] for note in notes) or "Nothing found."
    schema = state.get("outputSchema")
    citations = [{"url": _SOURCES + note["topic"], "title": note["topic"]} for note in notes]
    grounding = [{"field": "text", "citations": citations, "confidence": "high"}] if notes else []
    return {
        "text": text,
        "structured": None if schema is None else shaped(schema, text, notes),
        "grounding": grounding,
    }


def shaped(schema: dict[str, Any], text: str, notes: list[Note]) -> Any:
    """Return the report in the schema's form, as far as its types determine it.

    A string is the text (a field named `topic` is the first topic), a number is the count of notes,
    and a list has an item for each note. Anything else is null. A real model would do better.
    """
    kind = schema.get("type")
    if "enum" in schema:
        return schema["enum"][0]
    if kind == "object" or "properties" in schema:
        return {
            name: notes[0]["topic"] if name == "topic" and notes else shaped(part, text, notes)
            for name, part in schema.get("properties", {}).items()
        }
    if kind == "array":
        items = schema.get("items", {})
        return [shaped(items, note["text"], [note]) for note in notes]
    simple = {"string": text, "integer": len(notes), "number": len(notes), "boolean": bool(notes)}
    return simple.get(kind) if isinstance(kind, str) else None


graph = (
    StateGraph(State)
    .add_node("plan", plan)
    .add_node("look_up", look_up)
    .add_node("report", report)
    .add_edge(START, "plan")
    .add_edge("plan", "look_up")
    .add_edge("look_up", "report")
    .add_edge("report", END)
    .compile(name="research")
)
