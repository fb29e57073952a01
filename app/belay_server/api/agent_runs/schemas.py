"""The schemas of agent runs: the components of Exa's OpenAPI document, and request bodies."""

from __future__ import annotations

import re
from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import Body, Integer, List, Object, ObjectList, one_of
from belay_server.domain.agent_runs.runs import (
    ID_PATTERN,
    LONGEST_ID,
    AgentRunStatus,
    StopReason,
    is_any_id,
)

BETA = "agent-2026-05-07"
#: The values in all revisions of Exa's documentation, and in its clients.
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "auto", "ultra", "max")
_TYPES = ("INVALID_REQUEST", "AUTHENTICATION_ERROR", "RATE_LIMIT_ERROR", "NOT_FOUND")
_CODES = (
    "INVALID_REQUEST",
    "MISSING_BETA_HEADER",
    "INVALID_BETA_HEADER",
    "TEAM_NOT_FOUND",
    "RUN_NOT_FOUND",
    "PREVIOUS_RUN_NOT_FOUND",
    "PREVIOUS_RUN_NOT_COMPLETED",
    "CONCURRENCY_LIMIT_REACHED",
    "INVALID_OUTPUT_SCHEMA",
    "TIMEOUT",
    "SERVER_ERROR",
)
_STRING = {"type": "string"}
_MOMENT = {"type": "string", "format": "date-time"}
_COUNT = {"type": "integer", "minimum": 0}
_AMOUNT = {"type": "number", "minimum": 0}


def ref(name: str) -> dict[str, str]:
    """Return a JSON reference to a component of the OpenAPI document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: dict[str, Any], *optional: str, closed: bool = True) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False if closed else ref("JsonValue"),
    }


def _list_of(name: str) -> dict[str, Any]:
    return _object(
        {
            "object": {"type": "string", "const": "list"},
            "data": {"type": "array", "items": ref(name)},
            "hasMore": {"type": "boolean"},
            "nextCursor": _or_null(_STRING),
        }
    )


AGENT_RUN_ID = {
    "type": "string",
    "minLength": 1,
    "maxLength": LONGEST_ID,
    "pattern": ID_PATTERN,
    "description": "Agent run ID. New run IDs are returned with the `agent_run_` prefix.",
    "example": "agent_run_01j7x9v0m2n4p6q8r0s2t4v6w8",
}
#: Schemas in the OpenAPI document that the server publishes.
COMPONENTS: dict[str, dict[str, Any]] = {
    "AgentRunId": AGENT_RUN_ID,
    "JsonValue": {
        "description": "Any JSON value.",
        "oneOf": [
            {"type": "null"},
            {"type": "boolean"},
            {"type": "number"},
            {"type": "string"},
            {"type": "array", "items": ref("JsonValue")},
            {"type": "object", "additionalProperties": ref("JsonValue")},
        ],
    },
    "AgentError": _object(
        {
            "type": {"type": "string", "enum": [*_TYPES, "SERVER_ERROR"]},
            "code": {"type": "string", "enum": list(_CODES)},
            "message": _STRING,
        },
        closed=False,
    ),
    "AgentErrorResponse": _object({"error": ref("AgentError")}),
    "AgentCitation": _object({"url": _STRING, "title": _STRING}, "title"),
    "AgentGrounding": _object(
        {
            "field": _STRING,
            "citations": {"type": "array", "items": ref("AgentCitation")},
            "score": {"type": "number"},
            "confidence": {"type": "string", "enum": ["low", "medium", "high"]},
        },
        "score",
        "confidence",
    ),
    "AgentOutput": _object(
        {
            "text": _STRING,
            "structured": ref("JsonValue"),
            "grounding": {"type": "array", "items": ref("AgentGrounding")},
        }
    ),
    "AgentUsage": _object(
        {
            "agentComputeUnits": _AMOUNT,
            "searches": _COUNT,
            "emails": _COUNT,
            "phoneNumbers": _COUNT,
        }
    ),
    "AgentCostDollars": _object(
        dict.fromkeys(("total", "agentCompute", "search", "emails", "phoneNumbers"), _AMOUNT)
    ),
    "AgentRun": _object(
        {
            "id": ref("AgentRunId"),
            "object": {"type": "string", "const": "agent_run"},
            "status": {"type": "string", "enum": list(AgentRunStatus)},
            "stopReason": _or_null({"type": "string", "enum": list(StopReason)}),
            "createdAt": _MOMENT,
            "completedAt": _or_null(_MOMENT),
            "request": {"type": "object", "additionalProperties": ref("JsonValue")},
            "output": ref("AgentOutput"),
            "usage": ref("AgentUsage"),
            "costDollars": ref("AgentCostDollars"),
            "error": ref("AgentError"),
        },
        "error",
    ),
    "AgentRunList": _list_of("AgentRun"),
    "AgentRunEvent": _object(
        {
            "id": _STRING,
            "event": {
                "type": "string",
                "enum": [
                    f"agent_run.{name}"
                    for name in ("created", "started", "completed", "failed", "cancelled")
                ],
            },
            "data": {"type": "object", "additionalProperties": ref("JsonValue")},
            "createdAt": _MOMENT,
        }
    ),
    "AgentRunEventList": _list_of("AgentRunEvent"),
    "DeleteAgentRunResponse": _object(
        {
            "id": ref("AgentRunId"),
            "object": {"type": "string", "const": "agent_run.deleted"},
            "deleted": {"type": "boolean", "const": True},
        }
    ),
}


def _validate_id(text: str) -> None:
    if not is_any_id(text):
        raise ma.ValidationError("is not an agent run ID")


def _validate_user(text: str) -> None:
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) is None:
        raise ma.ValidationError("must be 1 to 64 letters, digits, '_' or '-'")


class AgentRunInput(Body):
    """The data to work on, and the data to exclude."""

    data = ObjectList(allow_none=True)
    exclusion = ObjectList(allow_none=True)


class AgentDataSource(Body):
    """An entry of `dataSources`, which is stored and returned, but not used."""

    provider = ma.fields.String(required=True, validate=ma.validate.Length(1, 200))


class CreateAgentRun(Body):
    """The body of a create. A null field is treated as missing."""

    query = ma.fields.String(required=True, validate=ma.validate.Length(min=1))
    systemPrompt = ma.fields.String(allow_none=True)  # noqa: N815
    input = ma.fields.Nested(AgentRunInput, allow_none=True)
    outputSchema = Object(  # noqa: N815
        allow_none=True,
        metadata={
            "description": "JSON Schema: draft-07, 2019-09 or 2020-12, as its `$schema` names it."
        },
    )
    effort = ma.fields.String(allow_none=True, validate=one_of(*EFFORTS))
    previousRunId = ma.fields.String(  # noqa: N815
        allow_none=True,
        validate=_validate_id,
        metadata={"pattern": ID_PATTERN, "minLength": 1, "maxLength": LONGEST_ID},
    )
    metadata = Object(allow_none=True)
    budget = Object(
        allow_none=True, metadata={"description": "Stored and returned, but not enforced."}
    )
    dataSources = List(  # noqa: N815
        ma.fields.Nested(AgentDataSource),
        allow_none=True,
        validate=ma.validate.Length(max=5),
        metadata={"description": "Stored and returned, but not used."},
    )
    userIdentifier = ma.fields.String(  # noqa: N815
        allow_none=True, validate=_validate_user, metadata={"pattern": "^[A-Za-z0-9_-]{1,64}$"}
    )


class AgentPageQuery(Body):
    """The query of a list: at most `limit` items (by default 20), from after `cursor`."""

    limit = Integer(
        load_default=20, validate=ma.validate.Range(1, 100), metadata={"in_query": True}
    )
    cursor = ma.fields.String(metadata={"description": "The `nextCursor` of the previous page."})
