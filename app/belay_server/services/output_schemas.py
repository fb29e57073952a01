"""Validates clients' output schemas without blocking other requests."""

from __future__ import annotations

import threading
import time
from typing import Any

from belay_server.domain.errors import Unavailable
from belay_server.domain.output_schemas import check_output_schema

_WAIT_SECONDS = 10.0


class OutputSchemaChecks:
    """Validates one schema at a time in a web process, and yields to other requests between two
    steps of it, so that no request waits for more than one step."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def check(self, schema: dict[str, Any]) -> None:
        """Validate a schema.

        Raises InvalidOutputSchema; Unavailable when other schemas take more than ten seconds.
        """
        if not self._turn.acquire(timeout=_WAIT_SECONDS):
            raise Unavailable("Too many output schemas are being checked; try again")
        try:
            for _ in check_output_schema(schema):
                time.sleep(0)
        finally:
            self._turn.release()
