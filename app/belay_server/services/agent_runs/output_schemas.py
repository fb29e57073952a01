"""Validates clients' output schemas without blocking other requests."""

from __future__ import annotations

import threading
import time
from typing import Any

from belay_server.domain.agent_runs.output_schemas import check_output_schema, has_patterns
from belay_server.domain.errors import BadRequest, StateTooLarge, TooMany
from belay_server.states import jobs as state_jobs
from belay_server.states.process import StateProcess

_WAIT_SECONDS = 10.0


class OutputSchemaChecks:
    """Validates one schema at a time in a web process, and yields to other requests between two
    steps of it. Compiling a regular expression may take long and is one step, so schemas that have
    any are validated by a process of their own."""

    def __init__(self, states: StateProcess) -> None:
        self._states = states
        self._turn = threading.Lock()

    def check(self, schema: dict[str, Any]) -> None:
        """Validate a schema.

        Raises InvalidOutputSchema; TooMany when other schemas take more than ten seconds.
        """
        if has_patterns(schema):
            self._check_aside(schema)
            return
        if not self._turn.acquire(timeout=_WAIT_SECONDS):
            raise TooMany("Too many output schemas are being checked; try again")
        try:
            for _ in check_output_schema(schema):
                time.sleep(0)
        finally:
            self._turn.release()

    def _check_aside(self, schema: dict[str, Any]) -> None:
        try:
            self._states.run_aside(state_jobs.check_schema, schema)
        except StateTooLarge as error:
            raise BadRequest("outputSchema: takes too long to be checked") from error
