"""Find the nodes of a graph that have no asynchronous implementation.

LangGraph executes them on threads, or on the event loop, which waits for them. What a node calls is
not looked at, nor are the functions of conditional edges: these decide by the state, without waits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from langchain_core.runnables import Runnable, RunnableBinding, RunnableLambda, RunnableParallel
from langchain_core.runnables.config import run_in_executor
from langgraph.constants import START
from langgraph.pregel import Pregel


def synchronous_node(graph: Pregel[Any, Any, Any, Any]) -> str | None:
    """Return the name of a node that has no asynchronous implementation, or None. The name of a
    subgraph's node follows that of the subgraph, as in `outer:inner`."""
    for name, node in graph.nodes.items():
        if name == START:
            continue
        if isinstance(node.bound, Pregel):
            if (inner := synchronous_node(node.bound)) is not None:
                return f"{name}:{inner}"
        elif _is_synchronous(node.bound):
            return name
    return None


def _is_synchronous(runnable: Any) -> bool:
    """Return whether `ainvoke` of a runnable executes synchronous code."""
    if isinstance(runnable, Pregel):
        return synchronous_node(runnable) is not None
    if parts := _parts_of(runnable):
        return any(map(_is_synchronous, parts))
    if tools := getattr(runnable, "tools_by_name", None):  # a ToolNode
        return any(map(_is_synchronous_tool, tools.values()))
    if isinstance(runnable, RunnableLambda):
        return not hasattr(runnable, "afunc")
    if hasattr(runnable, "afunc"):  # LangGraph's RunnableCallable, whose module is private
        made = runnable.afunc
        return made is None or (isinstance(made, partial) and made.func is run_in_executor)
    return _inherits(runnable, Runnable, "ainvoke")


def _parts_of(runnable: Any) -> list[Any]:
    """Return what a runnable is composed of, which may be nothing else."""
    if isinstance(runnable, RunnableBinding):
        return [runnable.bound]
    if isinstance(runnable, RunnableParallel):
        return list(runnable.steps__.values())
    return list(getattr(runnable, "steps", ()))  # a sequence: LangChain's, or LangGraph's own


def _is_synchronous_tool(tool: Any) -> bool:
    from langchain_core.tools import BaseTool  # noqa: PLC0415  (loaded by whoever has tools)

    if hasattr(tool, "coroutine"):  # made of functions
        return tool.coroutine is None
    return _inherits(tool, BaseTool, "_arun")


def _inherits(instance: Any, base: type, method: str) -> bool:
    """Return whether an object has the method of the base class, not one of its own."""
    return getattr(type(instance), method) is getattr(base, method)
