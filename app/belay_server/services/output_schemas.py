"""Checks the schemas that clients ask an output to have, without holding up other requests."""

from __future__ import annotations

import threading
import time
from typing import Any

from belay_server.domain.errors import Unavailable
from belay_server.domain.output_schemas import check_output_schema

_WAIT_SECONDS = 10.0


class OutputSchemaChecks:
    """One for a web process. It checks one schema at a time, in steps: between two of them, every
    other request has its turn, so what it waits for is one step, however many schemas come."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def check(self, schema: dict[str, Any]) -> None:
        """Raises InvalidOutputSchema; Unavailable after ten seconds behind other schemas."""
        if not self._turn.acquire(timeout=_WAIT_SECONDS):
            raise Unavailable("Too many output schemas are being checked; try again")
        try:
            for _ in check_output_schema(schema):
                time.sleep(0)
        finally:
            self._turn.release()
