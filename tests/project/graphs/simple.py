from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from typing import TypedDict

import psutil
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.runtime import Runtime


class Count(TypedDict, total=False):
    count: int
    by: int
    note: str


def _counter(by: int = 1) -> StateGraph:
    def inc(state: Count, config) -> Count:
        step = config["configurable"].get("by", by)
        return {"count": state.get("count", 0) + step}

    return StateGraph(Count).add_node("inc", inc).add_edge(START, "inc").add_edge("inc", END)


counter = _counter().compile()
uncompiled = _counter()


def make_sync():
    return _counter(by=10).compile()


async def make_async():
    return _counter(by=20)


def make_with_config(config):
    return _counter(by=config["configurable"].get("start_by", 30)).compile()


def make_named(config):
    """Name the only node as the config says."""
    name = config["configurable"]["node"]
    return (
        StateGraph(Count)
        .add_node(name, lambda state: {"count": state["count"] + 1})
        .add_edge(START, name)
        .compile()
    )


@contextlib.asynccontextmanager
async def make_in_context(config):
    yield _counter(by=40).compile()


def _raise(state: Count) -> Count:
    raise ValueError("boom from bad node")


def _leave(state: Count) -> Count:
    raise SystemExit(3)


async def _leave_async(state: Count) -> Count:
    raise SystemExit(3)


leaves = StateGraph(Count).add_node("leave", _leave).add_edge(START, "leave").compile()
leaves_async = StateGraph(Count).add_node("leave", _leave_async).add_edge(START, "leave").compile()
bad = StateGraph(Count).add_node("bad", _raise).add_edge(START, "bad").compile()


async def _echo(state: MessagesState) -> dict:
    return {"messages": [AIMessage(f"echo: {state['messages'][-1].content}")]}


chat = StateGraph(MessagesState).add_node("echo", _echo).add_edge(START, "echo").compile()


def _worker() -> int:
    """Return the process id of the worker. Its zygote has forked this child."""
    return psutil.Process(os.getppid()).ppid()


def _where(state: Count) -> Count:
    return {"note": f"{_worker()} {os.environ.get('BELAY_TEST_PROJECT')}"}


heavy = StateGraph(Count).add_node("where", _where).add_edge(START, "where").compile()


async def _speak(state: MessagesState) -> dict:
    model = GenericFakeChatModel(messages=iter([AIMessage("one two three")]))
    return {"messages": [await model.ainvoke(state["messages"])]}


#: Its model streams word by word.
speaker = StateGraph(MessagesState).add_node("speak", _speak).add_edge(START, "speak").compile()


class Tale(TypedDict, total=False):
    topic: str
    chatter: int
    draft: str
    told: str


class Told(TypedDict, total=False):
    told: str


class Voice(TypedDict, total=False):
    voice: str


async def _tell(state: Tale, runtime: Runtime[Voice]) -> Tale:
    voice = (runtime.context or {}).get("voice", "plain")
    runtime.stream_writer({"telling": state["topic"]})
    for n in range(state.get("chatter", 0)):
        runtime.stream_writer(n)
    return {"draft": "not for others", "told": f"{voice} {state['topic']}"}


#: Has a context, custom events, and an output that is smaller than its state.
teller = (
    StateGraph(Tale, context_schema=Voice, output_schema=Told)
    .add_node("tell", _tell)
    .add_edge(START, "tell")
    .compile()
)


def _show(state: Count, config) -> Count:
    shown = {k: v for k, v in config["configurable"].items() if k.startswith(("x-", "auth"))}
    return {"note": json.dumps(shown, sort_keys=True)}


#: Returns the headers in its config.
headers = StateGraph(Count).add_node("show", _show).add_edge(START, "show").compile()


def _whoami(state: Count, config) -> Count:
    configurable = config["configurable"]
    user = configurable.get("langgraph_auth_user") or {}
    told = [configurable.get("langgraph_auth_user_id"), user.get("plan"), configurable["user_id"]]
    return {"note": json.dumps([*told, configurable["langgraph_auth_permissions"]])}


#: Returns the user in its config.
whoami = StateGraph(Count).add_node("say", _whoami).add_edge(START, "say").compile()


def _talk(state: Count) -> Count:
    logging.getLogger("project").warning("talker says %d", state.get("count", 0))
    return {}


async def _talk_async(state: Count) -> Count:
    logging.getLogger("project").warning("talker says it again")
    return {}


talker = (
    StateGraph(Count)
    .add_node("talk", _talk)
    .add_node("talk_again", _talk_async)
    .add_edge(START, "talk")
    .add_edge("talk", "talk_again")
    .compile()
)


@dataclass
class Tone:
    tone: str = "plain"


def _toned(state: Count, runtime: Runtime[Tone]) -> Count:
    return {"note": repr(runtime.context)}


#: Returns its context, which is a dataclass with a default.
toned = (
    StateGraph(Count, context_schema=Tone).add_node("say", _toned).add_edge(START, "say").compile()
)
