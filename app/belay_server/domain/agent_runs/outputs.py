"""An agent run's output: `text`, `structured` and `grounding` of what its graph has left.

A graph may return anything there. What the API has no form for is left out, because its clients
refuse a whole answer for one entry that is not as they expect it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NO_OUTPUT: dict[str, Any] = {"text": "", "structured": None, "grounding": []}
_CONFIDENCES = ("low", "medium", "high")


def output_of(values: Any, *, structured: bool) -> dict[str, Any]:
    """`structured`: the request has an `outputSchema`; without one there is no such output."""
    if not isinstance(values, Mapping):
        return NO_OUTPUT
    return {
        "text": _text(values.get("text")),
        "structured": values.get("structured") if structured else None,
        "grounding": _grounding(values.get("grounding")),
    }


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _grounding(value: Any) -> list[dict[str, Any]]:
    entries = value if isinstance(value, list) else []
    return [entry for item in entries if (entry := _entry(item)) is not None]


def _entry(item: Any) -> dict[str, Any] | None:
    if not isinstance(item, Mapping) or not isinstance(item.get("field"), str):
        return None
    cited = item.get("citations")
    citations = [_citation(c) for c in cited if _is_citation(c)] if isinstance(cited, list) else []
    entry: dict[str, Any] = {"field": item["field"], "citations": citations}
    if _is_number(item.get("score")):
        entry["score"] = item["score"]
    if item.get("confidence") in _CONFIDENCES:
        entry["confidence"] = item["confidence"]
    return entry


def _is_citation(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("url"), str)


def _citation(value: Mapping[str, Any]) -> dict[str, str]:
    title = value.get("title")
    titled = {"title": title} if isinstance(title, str) else {}
    return {"url": value["url"], **titled}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
