"""Define the errors of the Agent runs API, with its own codes.

AgentError
├── TeamNotFound                401
├── MissingBeta, InvalidBeta    400
├── InvalidOutputSchema         400, with the place and the keyword
├── PreviousRunNotFound         400: Exa's documentation has no 404 for a create
├── PreviousRunNotCompleted     400
├── RunNotFound                 404
└── TooManyRuns                 429

A class's docstring is the message that clients get. `belay_server.api.agent_runs.errors` gives each
class its status and type. Errors that any request may have (an invalid field, an unavailable
database) are in `belay_server.domain.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from belay_server.domain.errors import BelayError


class AgentError(BelayError):
    """The agent run is not available."""

    code: ClassVar[str]

    def __init__(self, detail: str | None = None, about: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        #: Further fields of the error in the response.
        self.about = dict(about or {})


class TeamNotFound(AgentError):
    """Team context or authentication was not found."""

    code = "TEAM_NOT_FOUND"


class MissingBeta(AgentError):
    """The Exa-Beta header is required."""

    code = "MISSING_BETA_HEADER"


class InvalidBeta(AgentError):
    """The Exa-Beta header does not have the required token."""

    code = "INVALID_BETA_HEADER"


class InvalidOutputSchema(AgentError):
    """outputSchema is not a JSON Schema."""

    code = "INVALID_OUTPUT_SCHEMA"


class PreviousRunNotFound(AgentError):
    """The run of previousRunId was not found."""

    code = "PREVIOUS_RUN_NOT_FOUND"


class PreviousRunNotCompleted(AgentError):
    """The run of previousRunId has not completed."""

    code = "PREVIOUS_RUN_NOT_COMPLETED"


class RunNotFound(AgentError):
    """Run not found."""

    code = "RUN_NOT_FOUND"


class TooManyRuns(AgentError):
    """Agent run concurrency limit reached."""

    code = "CONCURRENCY_LIMIT_REACHED"
