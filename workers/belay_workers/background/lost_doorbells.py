"""Finds doorbells that the broker has lost: runs wait, and their queue has no message.

A run that was rung for is rung for again later and later, because usually its message waits behind
busy workers. A broker that was flushed, or was away, has no such message; then an idle worker would
stand beside a due run for up to a minute. So the queue itself is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from belay_server.db import run_claims as claim_rows
from belay_server.db.connection import Connection
from belay_server.doorbell import Doorbell

#: How many runs are made due for a ring at once: more would flood a queue that is being drained.
_BATCH = 1_000


class LostDoorbells:
    """Looks at most every `seconds`, and again at once while it finds any."""

    def __init__(
        self, doorbell: Doorbell, *, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._doorbell = doorbell
        self._seconds = seconds
        self._clock = clock
        self._look_at = 0.0

    def find(self, conn: Connection) -> bool:
        """Make what waits in vain due for a ring. False when the broker could not be asked."""
        if self._clock() < self._look_at:
            return True
        waiting = {
            queue: self._doorbell.waiting(queue) for queue in claim_rows.queues_put_off(conn)
        }
        empty = [queue for queue, messages in waiting.items() if messages == 0]
        found = claim_rows.ring_again_at_once(conn, empty, limit=_BATCH) if empty else 0
        if found < _BATCH:
            self._look_at = self._clock() + self._seconds
        return None not in waiting.values()
