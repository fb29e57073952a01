"""Find doorbells that the broker has lost: runs are pending, and their queue has no message.

A pending run is rung for again at growing intervals, because its message is usually still in the
queue behind busy workers. If the broker was flushed or unavailable there is no such message, and
idle workers would leave a due run waiting for up to a minute. So the length of the queue is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.connection import Connection
from belay_server.doorbell import Doorbell

#: Runs made due for a ring at once; more would flood a queue that workers are emptying.
_BATCH = 1_000


class LostDoorbells:
    """Checks the queues at most every `seconds`, and again immediately after a full batch."""

    def __init__(
        self, doorbell: Doorbell, *, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._doorbell = doorbell
        self._seconds = seconds
        self._clock = clock
        self._look_at = 0.0

    def find(self, conn: Connection) -> bool:
        """Make runs whose doorbell is lost due for a ring. Return False if the broker failed."""
        if self._clock() < self._look_at:
            return True
        put_off = {
            one: self._doorbell.queue_of(one.queue, one.graph_id)
            for one in claim_rows.queues_put_off(conn)
        }
        waiting = {queue: self._doorbell.waiting(queue) for queue in set(put_off.values())}
        empty = [one for one, queue in put_off.items() if waiting[queue] == 0]
        found = claim_rows.ring_again_at_once(conn, empty, limit=_BATCH) if empty else 0
        if found < _BATCH:
            self._look_at = self._clock() + self._seconds
        return None not in waiting.values()
