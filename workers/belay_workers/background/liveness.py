"""Liveness: asserts that this worker really consumes, not only that its process is up.

A consumer that lost its broker may come back without consuming, and look healthy for ever. So the
worker sends itself a message, over the broker and through the consumer like any doorbell. While a
child is idle it must arrive; when several in a row do not, the worker is of no use, and says so by
ending itself: whoever runs it starts a new one.

A broker that cannot be reached proves nothing about the consumer, and neither does a worker whose
children are all busy: it takes no messages then.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable

from celery import Celery
from kombu import Exchange, Queue

from belay_server.doorbell import Doorbell
from belay_workers.slots import Phase, SlotTable

log = logging.getLogger(__name__)

#: Unanswered pings in a row that mean that the consumer has stalled.
_MISSES = 3


class Liveness:
    """One thread in the worker's parent. `received` is called for every ping that arrives, and
    `on_stall` once, when the consumer has stalled."""

    def __init__(
        self,
        doorbell: Doorbell,
        slots: SlotTable,
        owner: str,
        *,
        seconds: float,
        on_stall: Callable[[], None],
    ) -> None:
        # The anonymous exchange: no binding of ours stays in the broker when we are gone.
        name = f"belay.worker.{owner}"
        self.queue = Queue(  # type: ignore[no-untyped-call]
            name,
            Exchange(""),  # type: ignore[no-untyped-call]
            routing_key=name,
            auto_delete=True,
        )
        self._doorbell = doorbell
        self._slots = slots
        self._seconds = seconds
        self._on_stall = on_stall
        self._arrived = threading.Event()
        self._expected = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="belay-liveness", daemon=True)

    def consume_with(self, app: Celery) -> None:
        """Have the worker consume our queue besides its own. Before the consumer starts."""
        app.amqp.queues.select_add(self.queue)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._arrived.set()

    def received(self, ping_id: str) -> None:
        """A ping came through the consumer."""
        if ping_id == self._expected:
            self._arrived.set()

    def _watch(self) -> None:
        missed = 0
        while not self._stopping.wait(self._seconds):
            if self._ping_arrives():
                missed = 0
                continue
            missed += 1
            log.warning("liveness: %d of our own messages did not arrive", missed)
            if missed == _MISSES:
                log.error("this worker does not consume any more; ending it, to be started anew")
                self._on_stall()
                return

    def _ping_arrives(self) -> bool:
        """False only when it should have arrived and did not."""
        self._expected = str(uuid.uuid4())
        self._arrived.clear()
        if not self._has_idle_child() or not self._doorbell.ping(self._expected, self.queue):
            return True
        return self._arrived.wait(self._seconds) or not self._has_idle_child()

    def _has_idle_child(self) -> bool:
        return any(reading.phase is Phase.IDLE for reading in self._slots.read_all())
