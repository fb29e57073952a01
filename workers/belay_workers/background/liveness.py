"""Liveness: check that this worker consumes messages, not only that its process is running.

A consumer that has lost its connection to the broker may reconnect without consuming, while the
process looks healthy. So the worker sends itself a message (a ping), which passes through the
broker and the consumer like a doorbell. Unless all children are busy, the ping must arrive. When
several in a row do not, the worker ends itself, for its process manager to start a new one.

An unavailable broker proves nothing about the consumer. Neither does a worker whose children are
all busy: it takes no messages then.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable

from celery import Celery
from kombu import Exchange, Queue

from belay_server.doorbell import Doorbell
from belay_workers.background_thread import BackgroundThread

log = logging.getLogger(__name__)

#: Pings in a row that did not arrive, after which the consumer counts as stalled.
_MISSES = 3


class Liveness:
    """A thread in the worker's parent process that sends a ping every `seconds`.

    Call `received` for every ping that arrives. `on_stall` is called once, when the consumer has
    stalled.
    """

    def __init__(
        self,
        doorbell: Doorbell,
        owner: str,
        *,
        seconds: float,
        takes_messages: Callable[[], bool],
        on_stall: Callable[[], None],
    ) -> None:
        # The default exchange: no binding stays in the broker after the worker has ended.
        name = f"belay.worker.{owner}"
        self.queue = Queue(  # type: ignore[no-untyped-call]
            name,
            Exchange(""),  # type: ignore[no-untyped-call]
            routing_key=name,
            auto_delete=True,
        )
        self._doorbell = doorbell
        self._takes_messages = takes_messages
        self._seconds = seconds
        self._on_stall = on_stall
        self._arrived = threading.Event()
        self._expected = ""
        self._stopping = threading.Event()
        self._thread = BackgroundThread("liveness", self._watch, self._stopping)

    def consume_with(self, app: Celery) -> None:
        """Have the worker consume the queue of pings, too. Call it before the consumer starts."""
        app.amqp.queues.select_add(self.queue)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._arrived.set()

    def received(self, ping_id: str) -> None:
        """Record that the consumer has received a ping."""
        if ping_id == self._expected:
            self._arrived.set()

    def _watch(self) -> None:
        missed = 0
        while not self._stopping.wait(self._seconds):
            if self._ping_arrives():
                missed = 0
                continue
            missed += 1
            log.warning("liveness: %d pings in a row did not arrive", missed)
            if missed == _MISSES:
                log.error("this worker does not consume any more; ending it for a restart")
                self._stopping.set()
                self._on_stall()

    def _ping_arrives(self) -> bool:
        """Send a ping and wait for it. Return False only if it had to arrive and did not.

        It does not have to if the broker was unavailable or all children were busy.
        """
        self._expected = str(uuid.uuid4())
        self._arrived.clear()
        if not self._takes_messages() or not self._doorbell.ping(self._expected, self.queue):
            return True
        return self._arrived.wait(self._seconds) or not self._takes_messages()
