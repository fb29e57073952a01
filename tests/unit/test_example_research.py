"""Test the example's research graph, which serves its Agent runs, and the form of its output."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from belay_server.domain.agent_runs.output_schemas import check_output_schema
from belay_server.domain.agent_runs.outputs import output_of
from belay_server.example.graphs.research import graph
from belay_server.services.agent_runs.output_mismatch import output_mismatch


def research(**asked: Any) -> dict[str, Any]:
    return asyncio.run(graph.ainvoke(cast(Any, asked)))


def test_the_example_returns_its_findings_with_citations():
    found = research(query="What is a belay, and what is a run?")
    assert "order back" in found["text"]
    assert "one request" in found["text"]
    cited = [citation["title"] for citation in found["grounding"][0]["citations"]]
    assert cited == ["belay", "run"]
    assert output_of(found, structured=False)["grounding"] == found["grounding"]
    assert found["structured"] is None
    nothing = research(query="What is love?")
    assert (nothing["text"], nothing["grounding"]) == ("Nothing found.", [])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"topic": {"type": "string"}}, "required": ["topic"]},
        {
            "type": "object",
            "properties": {
                "summary": {"type": "string"},
                "count": {"type": "integer"},
                "found": {"type": "boolean"},
                "kind": {"enum": ["word", "name"]},
                "notes": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"topic": {"type": "string"}}},
                },
            },
            "required": ["summary", "count", "found", "kind", "notes"],
            "additionalProperties": False,
        },
        {"type": "string"},
    ],
)
def test_the_structured_output_of_the_example_matches_its_schema(schema):
    check_output_schema(schema)
    for query in ("a belay and a run", "nothing of the kind"):
        assert (
            output_mismatch(schema, research(query=query, outputSchema=schema)["structured"])
            is None
        )
