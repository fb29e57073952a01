"""Validate clients' output schemas without blocking other requests."""

from __future__ import annotations

import threading
from typing import Any

from belay_server.domain.agent_runs.output_schemas import check_output_schema, takes_long_to_compile
from belay_server.domain.errors import BadRequest, StateTooLarge, TooMany
from belay_server.runtime.turns import wait_for_turn
from belay_server.states import jobs as state_jobs
from belay_server.states.process import StateProcess

_WAIT_SECONDS = 10.0


class OutputSchemaChecks:
    """Validates one schema at a time in a web process, and yields to other requests between two
    steps. Compiling some schemas is one step and may take long, so they are validated in a separate
    process."""

    def __init__(self, states: StateProcess) -> None:
        self._states = states
        self._turn = threading.Lock()

    def check(self, schema: dict[str, Any]) -> None:
        """Validate a schema.

        Raises InvalidOutputSchema; TooMany after waiting ten seconds for other schemas; BadRequest
        when the separate process takes too long.
        """
        if takes_long_to_compile(schema):
            self._check_aside(schema)
            return
        if not self._turn.acquire(timeout=_WAIT_SECONDS):
            raise TooMany("Too many output schemas are being validated; try again")
        try:
            for _ in check_output_schema(schema):
                wait_for_turn()
        finally:
            self._turn.release()

    def _check_aside(self, schema: dict[str, Any]) -> None:
        try:
            self._states.run_aside(state_jobs.check_schema, schema)
        except StateTooLarge as error:
            raise BadRequest("outputSchema: takes too long to validate; simplify it") from error
