"""The common parts of the agent runs API's routes: authentication, headers and error responses."""

from __future__ import annotations

from typing import Any

import flask_smorest
from flask import g, request

from belay_server.api.agent_runs.schemas import BETA, ref
from belay_server.api.agent_runs.teams import team_of_request
from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import BelayParser
from belay_server.domain.agent_runs.errors import InvalidBeta, MissingBeta

_BETA_HEADER = {
    "in": "header",
    "name": "Exa-Beta",
    "required": True,
    "description": "Required beta token for the Agent.",
    "schema": {"type": "string", "enum": [BETA]},
}
_ID = {"in": "path", "name": "id", "required": True, "schema": ref("AgentRunId")}
#: An API key is accepted in either of two headers.
SECURITY_SCHEMES = {
    "apiKey": {"type": "apiKey", "name": "x-api-key", "in": "header"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


class AgentParser(BelayParser):
    """Reports invalid requests with status 400."""

    DEFAULT_VALIDATION_STATUS = 400


class AgentBlueprint(flask_smorest.Blueprint):
    """Requires a key and the beta header on every route, before the request is validated."""

    ARGUMENTS_PARSER = AgentParser()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare_doc_cbks.append(_with_common_answers)
        self.before_request(_admit)

    def add_url_rule(self, rule: str, *args: Any, **kwargs: Any) -> None:
        kwargs["parameters"] = [_BETA_HEADER, *([_ID] if "<id>" in rule else [])]
        super().add_url_rule(rule, *args, **kwargs)
        for name, operation in self._docs[self._endpoints[-1]].items():
            if name != "parameters":
                operation["is_of_one_run"] = "<id>" in rule


def team() -> str:
    """Return the team of the current request."""
    found: str = g.agent_team
    return found


def _admit() -> None:
    """Set the team of the request, and check the beta header.

    Raises TeamNotFound, MissingBeta, InvalidBeta.
    """
    g.agent_team = team_of_request()
    if not parts().settings.exa_beta_required:
        return
    tokens = [token.strip() for token in request.headers.get("Exa-Beta", "").split(",")]
    if not any(tokens):
        raise MissingBeta
    if BETA not in tokens:
        raise InvalidBeta(f"Exa-Beta must have {BETA}.")


def _with_common_answers(doc: dict[str, Any], doc_info: dict[str, Any], **_: Any) -> dict[str, Any]:
    errors = {
        400: "Invalid request.",
        401: "Team context or authentication was not found.",
        500: "Server error.",
    }
    if doc_info["is_of_one_run"]:
        errors[404] = "Run not found."
    if "requestBody" in doc:
        errors[429] = "Agent run concurrency limit reached."
    refused = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": ref("AgentErrorResponse")}},
        }
        for status, text in errors.items()
    }
    security: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]
    return {**doc, "responses": {**doc.get("responses", {}), **refused}, "security": security}
