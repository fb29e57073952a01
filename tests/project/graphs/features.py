"""One small graph for each feature of LangGraph besides running nodes in order.

Nodes append a word to `log`. Where tests count how often a node ran, it also writes a beat.
"""

from __future__ import annotations

import operator
import os
import time
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import redis
from langchain_core.messages import trim_messages
from langgraph.cache.memory import InMemoryCache
from langgraph.cache.redis import RedisCache
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.managed import RemainingSteps
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt

from graphs.beats import beat
from graphs.steps import chain

_GATE_SECONDS = 60


class State(TypedDict, total=False):
    beats: str
    log: Annotated[list[str], operator.add]


def _says(name: str):
    def node(state: dict) -> dict:
        beat(state.get("beats"), name)
        return {"log": [name]}

    return node


# --- interrupts -----------------------------------------------------------------------------


def _asks(name: str):
    def node(state: dict) -> dict:
        beat(state.get("beats"), name)
        return {"log": [f"{name}:{interrupt(f'{name}?')}"]}

    return node


#: Two of three nodes interrupt in the same step; the third one does not.
panel = (
    StateGraph(State)
    .add_node("ann", _asks("ann"))
    .add_node("ben", _asks("ben"))
    .add_node("cleo", _says("cleo"))
    .add_node("close", _says("close"))
    .add_edge(START, "ann")
    .add_edge(START, "ben")
    .add_edge(START, "cleo")
    .add_edge(["ann", "ben", "cleo"], "close")
    .compile()
)


# --- Send -----------------------------------------------------------------------------------


class Numbers(TypedDict, total=False):
    numbers: list[int]
    ask: bool
    squares: Annotated[list[int], operator.add]
    total: int


class Number(TypedDict, total=False):
    number: int
    ask: bool


def _square(state: Number) -> Numbers:
    number = state["number"]
    if state.get("ask"):
        number = interrupt({"number": number})
    return {"squares": [number * number]}


def _each_number(state: Numbers) -> list[Send]:
    ask = state.get("ask", False)
    return [Send("square", {"number": number, "ask": ask}) for number in state["numbers"]]


def _add_up(state: Numbers) -> Numbers:
    return {"total": sum(state["squares"])}


#: A task for each number by Send, and a node that adds up the results.
squares = (
    StateGraph(Numbers)
    .add_node("square", _square)
    .add_node("add_up", _add_up)
    .add_conditional_edges(START, _each_number, ["square"])
    .add_edge("square", "add_up")
    .compile()
)


# --- commands -------------------------------------------------------------------------------


class Call(State, total=False):
    about: str
    by: str


def _triage(state: Call) -> Command[Literal["sales", "repair", "__end__"]]:
    about = state.get("about")
    if about is None:
        return Command(goto=END, update={"log": ["triage"]})
    goto = ["sales", "repair"] if about == "both" else about
    return Command(goto=goto, update={"log": ["triage"], "by": "triage"})


def _give_up(state: Call) -> Command:
    return Command(graph=Command.PARENT, goto="sales", update={"log": ["handed over"]})


_repair = StateGraph(Call).add_node("give_up", _give_up).add_edge(START, "give_up").compile()

#: Nodes return commands with `goto`, one of them from within a subgraph.
desk = (
    StateGraph(Call)
    .add_node("triage", _triage)
    .add_node("sales", _says("sales"))
    .add_node("repair", _repair, destinations=("sales",))
    .add_edge(START, "triage")
    .compile()
)


# --- subgraphs ------------------------------------------------------------------------------


class Visits(TypedDict, total=False):
    name: str
    visits: Annotated[list[str], operator.add]


class Guests(TypedDict, total=False):
    name: str
    counts: Annotated[dict[str, int], operator.or_]


def _visit(state: Visits) -> Visits:
    return {"visits": [state["name"]]}


def _house(**options):
    return (
        StateGraph(Visits)
        .add_node("visit", _visit)
        .add_node("leave", lambda state: {})
        .add_edge(START, "visit")
        .add_edge("visit", "leave")
        .compile(**options)
    )


def _enters(house: str, graph):
    def node(state: Guests) -> Guests:
        visits = graph.invoke({"name": state["name"]})["visits"]
        return {"counts": {house: len(visits)}}

    return node


#: Three subgraphs: one keeps its state between runs, one has the parent's checkpointer for a single
#: run, one has no checkpoints.
houses = (
    StateGraph(Guests)
    .add_node("keeps", _enters("keeps", _house(checkpointer=True)))
    .add_node("inherits", _enters("inherits", _house()))
    .add_node("forgets", _enters("forgets", _house(checkpointer=False)))
    .add_edge(START, "keeps")
    .add_edge("keeps", "inherits")
    .add_edge("inherits", "forgets")
    .compile()
)


def _with_new(known: list[str], words: list[str]) -> list[str]:
    """Add only new words, because a subgraph returns all that it was given."""
    return [*known, *(word for word in words if word not in known)]


class Layer(TypedDict, total=False):
    log: Annotated[list[str], _with_new]


def _wraps(name: str, inner):
    return (
        StateGraph(Layer)
        .add_node(f"before_{name}", _says(f"before_{name}"))
        .add_node(name, inner)
        .add_node(f"after_{name}", _says(f"after_{name}"))
        .add_edge(START, f"before_{name}")
        .add_edge(f"before_{name}", name)
        .add_edge(name, f"after_{name}")
        .compile()
    )


def _only_asks(name: str):
    return StateGraph(Layer).add_node(name, _asks(name)).add_edge(START, name).compile()


#: An interrupt three graphs deep.
onion = _wraps("skin", _wraps("core", _only_asks("seed")))

#: Two subgraphs that interrupt in the same step.
twins = (
    StateGraph(Layer)
    .add_node("left", _only_asks("eye"))
    .add_node("right", _only_asks("ear"))
    .add_edge(START, "left")
    .add_edge(START, "right")
    .compile()
)


# --- deferred, cached and retried nodes -----------------------------------------------------


def _relay(*, defer: bool):
    return (
        StateGraph(State)
        .add_node("short", _says("short"))
        .add_node("long", _says("long"))
        .add_node("longer", _says("longer"))
        .add_node("finish", _says("finish"), defer=defer)
        .add_edge(START, "short")
        .add_edge(START, "long")
        .add_edge("short", "finish")
        .add_edge("long", "longer")
        .add_edge("longer", "finish")
        .compile()
    )


#: Two branches of unequal length meet; without `defer` each of them runs `finish`.
patient_relay = _relay(defer=True)
hasty_relay = _relay(defer=False)


class Word(TypedDict, total=False):
    word: str
    beats: str


class Words(Word, total=False):
    words: list[str]
    meanings: Annotated[list[str], operator.add]


def _next_word(state: Words) -> Command[Literal["look_up", "__end__"]]:
    if not state["words"]:
        return Command(goto=END)
    word, *rest = state["words"]
    return Command(goto="look_up", update={"word": word, "words": rest})


def _look_up(state: Word) -> Words:
    beat(state.get("beats"), state["word"])
    return {"meanings": [f"meaning of {state['word']}"]}


_dictionary = (
    StateGraph(Words)
    .add_node("next_word", _next_word)
    .add_node("look_up", _look_up, input_schema=Word, cache_policy=CachePolicy())
    .add_edge(START, "next_word")
    .add_edge("look_up", "next_word")
)
#: Looks up one word after the other; a cached word is not looked up again.
dictionary = _dictionary.compile(cache=InMemoryCache())
#: The same with a cache that all processes share.
shared_dictionary = _dictionary.compile(
    cache=RedisCache(redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://unused")))
)


class Attempts(State, total=False):
    failures: int
    kind: Literal["connection", "value"]


def _try(state: Attempts) -> Attempts:
    beats = Path(state["beats"])
    beat(state["beats"], "try")
    tries = len(beats.read_text().splitlines())
    if tries <= state["failures"]:
        kind = {"connection": ConnectionError, "value": ValueError}[state["kind"]]
        raise kind(f"failure {tries}")
    return {"log": [f"try {tries}"]}


#: Tries three times in all, and only after connection errors.
stubborn = (
    StateGraph(Attempts)
    .add_node(
        "try",
        _try,
        retry_policy=RetryPolicy(
            initial_interval=0.01, jitter=False, max_attempts=3, retry_on=ConnectionError
        ),
    )
    .add_node("rest", _says("rest"))
    .add_edge(START, "try")
    .add_edge("try", "rest")
    .compile()
)


# --- message trimming -----------------------------------------------------------------------


def _what_it_remembers(state: MessagesState) -> dict:
    kept = trim_messages(
        state["messages"], max_tokens=3, token_counter=len, strategy="last", start_on="human"
    )
    return {"messages": [("ai", " ".join(str(message.content) for message in kept))]}


#: Answers with the messages that fit into its window.
forgetful = (
    StateGraph(MessagesState)
    .add_node("answer", _what_it_remembers)
    .add_edge(START, "answer")
    .compile()
)


# --- durability and the recursion limit -----------------------------------------------------


class Gate(State, total=False):
    gate: str
    fails: bool
    steps: Annotated[list[str], operator.add]


def _gated_step(name: str):
    def step(state: Gate) -> Gate:
        beat(state.get("beats"), name)
        if name == "s3":
            _wait_for(state["gate"])
            if state.get("fails"):
                raise ValueError("closed")
        return {"steps": [name]}

    return step


def _wait_for(gate: str) -> None:
    until = time.monotonic() + _GATE_SECONDS
    while not Path(gate).exists():
        if time.monotonic() > until:
            raise TimeoutError(gate)
        time.sleep(0.01)


#: Four steps; the third one waits until a file exists.
gated = chain(Gate, _gated_step)


class Laps(TypedDict, total=False):
    goal: int
    heeds: bool
    laps: Annotated[int, operator.add]


class Runner(Laps, total=False):
    remaining: RemainingSteps


def _lap(state: Runner) -> Laps:
    return {"laps": 1}


def _goes_on(state: Runner) -> str:
    tired = state.get("heeds") and state["remaining"] <= 1
    return END if tired or state["laps"] >= state["goal"] else "lap"


#: One step per lap until the goal; with `heeds` it ends before the recursion limit.
track = (
    StateGraph(Runner)
    .add_node("lap", _lap)
    .add_edge(START, "lap")
    .add_conditional_edges("lap", _goes_on, ["lap", END])
    .compile()
)
