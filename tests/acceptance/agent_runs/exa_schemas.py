"""Schemas of the agent runs API's responses in Exa's documents, independent of Belay's document.

Errors and the response to a delete are validated against the published document
(`exa_openapi.yaml`). It lacks the other bodies. Their schemas here are written from what is known
of Exa's other documents of that time, and contain nothing of Belay's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

_DOCUMENT = yaml.safe_load((Path(__file__).parent / "exa_openapi.yaml").read_text())


def _closed(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**closed, "required": required}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_MOMENT = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"}
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_AMOUNT = {"type": "number", "minimum": 0}
_STATUSES = ["queued", "running", "completed", "failed", "cancelled"]
_REASONS = ["schema_satisfied", "budget_reached", "error", "cancelled", "stopped", None]
_CITATION = _closed({"url": _TEXT, "title": _TEXT}, ("title",))
_GROUNDING = _closed(
    {
        "field": _TEXT,
        "citations": {"type": "array", "items": _CITATION},
        "score": {"type": "number"},
        "confidence": {"enum": ["low", "medium", "high", None]},
    },
    ("score", "confidence"),
)
_RUN = _closed(
    {
        "id": _ref("AgentRunId"),
        "object": {"const": "agent_run"},
        "status": {"enum": _STATUSES},
        "stopReason": {"enum": _REASONS},
        "createdAt": _MOMENT,
        "completedAt": {"anyOf": [_MOMENT, {"type": "null"}]},
        "request": {"type": ["object", "null"]},
        "output": _closed(
            {
                "text": _TEXT,
                "structured": _ref("JsonValue"),
                "grounding": {"type": "array", "items": _GROUNDING},
            }
        ),
        "usage": _closed(
            {
                "agentComputeUnits": _AMOUNT,
                **dict.fromkeys(("searches", "emails", "phoneNumbers"), _COUNT),
            }
        ),
        "costDollars": _closed(
            dict.fromkeys(("total", "agentCompute", "search", "emails", "phoneNumbers"), _AMOUNT)
        ),
        "error": _ref("AgentError"),
    },
    ("error",),
)
_EVENT = _closed(
    {
        "id": {"type": "string", "pattern": "^[1-9][0-9]*$"},
        "event": {
            "enum": [
                f"agent_run.{name}"
                for name in ("created", "started", "completed", "failed", "cancelled")
            ]
        },
        "data": {"type": "object"},
        "createdAt": _MOMENT,
    }
)


def _list_of(item: dict[str, Any]) -> dict[str, Any]:
    return _closed(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "hasMore": {"type": "boolean"},
            "nextCursor": {"type": ["string", "null"]},
        }
    )


def _validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    whole = {"components": _DOCUMENT["components"], **schema}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


_ERROR = _validator(_ref("AgentErrorResponse"))
RUN = _validator(_RUN)
#: The schemas of responses with status 200, by method and path.
_BODIES = {
    "POST /agent/runs": RUN,
    "GET /agent/runs": _validator(_list_of(_RUN)),
    "GET /agent/runs/[^/]+": RUN,
    "DELETE /agent/runs/[^/]+": _validator(_ref("DeleteAgentRunResponse")),
    "POST /agent/runs/[^/]+/(?:cancel|stop)": RUN,
    "GET /agent/runs/[^/]+/events": _validator(_list_of(_EVENT)),
}
#: The statuses of all routes. Only a request for a single run or an unknown route may return 404.
STATUSES = (200, 400, 401, 404, 429, 500)


def check_answer(method: str, path: str, status: int, headers: Any, body: bytes) -> None:
    """Raise AssertionError if the documents do not allow the response."""
    name = f"{method} {path}"
    assert status in STATUSES, f"{name}: {status}"
    assert headers.get("x-request-id"), name
    assert headers["cache-control"] == "no-store", name
    if status == 200 and headers["content-type"].startswith("text/event-stream"):
        return
    assert headers["content-type"] == "application/json", name
    validator = _ERROR
    if status == 200:
        validator = next(v for pattern, v in _BODIES.items() if re.fullmatch(pattern, name))
    check(validator, json.loads(body), name)


def check(validator: jsonschema_rs.Draft202012Validator, body: Any, name: str) -> None:
    error = next(iter(validator.iter_errors(body)), None)
    if error is not None:
        where = "/".join(map(str, error.instance_path))
        raise AssertionError(f"{name} at {where!r}: {error.message[:500]}")
