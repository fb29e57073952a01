"""An agent of `create_agent` with the middleware that people use most."""

from __future__ import annotations

import os

from langchain.agents import create_agent
from langchain.agents.middleware import (
    HumanInTheLoopMiddleware,
    ModelCallLimitMiddleware,
    SummarizationMiddleware,
    ToolCallLimitMiddleware,
    dynamic_prompt,
    wrap_model_call,
)
from langchain.chat_models import init_chat_model
from langchain_core.tools import tool
from langgraph.types import interrupt

from react_agent.context import Context


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def ask(question: str) -> str:
    """Ask the user, from within a tool."""
    return f"the user says {interrupt({'question': question})}"


@tool
def pay(amount: int) -> str:
    """Pay an amount, which a person must approve."""
    return f"paid {amount}"


@dynamic_prompt
def prompt(request) -> str:
    return f"Be {os.environ['TONE']}."


@wrap_model_call
async def choose_model(request, handler):
    """Use the model that the caller has chosen."""
    return await handler(request.override(model=init_chat_model(request.runtime.context.model)))


graph = create_agent(
    "openai:stand-in",
    tools=[add, ask, pay],
    context_schema=Context,
    middleware=[
        prompt,
        choose_model,
        SummarizationMiddleware("openai:stand-in", trigger=("messages", 12), keep=("messages", 4)),
        ModelCallLimitMiddleware(run_limit=5),
        ToolCallLimitMiddleware(run_limit=5),
        HumanInTheLoopMiddleware(interrupt_on={"pay": True}),
    ],
)
