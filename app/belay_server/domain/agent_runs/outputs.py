"""Make an agent run's output from the `text`, `structured` and `grounding` of its graph's values.

A graph may return anything there. Entries that the API's schema does not allow are left out,
because its clients reject the whole response for one unexpected entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NO_OUTPUT: dict[str, Any] = {"text": "", "structured": None, "grounding": []}
_CONFIDENCES = ("low", "medium", "high")


def output_of(values: Any, *, structured: bool) -> dict[str, Any]:
    """Return the output. `structured` is whether the request has an `outputSchema`.

    Without one the output's `structured` is None.
    """
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
