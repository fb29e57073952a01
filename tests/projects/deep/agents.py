"""A deepagents agent with an asynchronous subagent on this same server."""

from __future__ import annotations

from deepagents import create_deep_agent

researcher = create_deep_agent(model="anthropic:stand-in", name="researcher")

lead = create_deep_agent(
    model="anthropic:stand-in",
    name="lead",
    subagents=[
        {
            "name": "researcher",
            "description": "Researches a question in the background.",
            "graph_id": "researcher",
        }
    ],
)
