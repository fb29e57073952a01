"""How a worker consumes from its broker.

The doorbells of graphs that share hosts have queues of their own, and a channel of their own. So a
worker that has no place for further runs of one kind goes on taking those of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from celery import bootsteps
from celery.app.amqp import AMQP
from kombu import Connection, Queue
from kombu.common import ignore_errors
from kombu.transport.virtual import Message

from belay_server.doorbell import hosted_queue


class PromptConnection(Connection):
    """A consumer's connection that is re-established soon after the broker is available again.

    By default Celery waits up to half a minute between two tries. It also ends the worker when
    Redis refuses a command (because it is full, or has become a replica) without closing the
    connection.
    """

    @property
    def connection_errors(self) -> tuple[type[Exception], ...]:
        return (*super().connection_errors, *super().channel_errors)

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        prompt = {"interval_start": 0.2, "interval_step": 0.2, "interval_max": 2.0}
        return super().ensure_connection(*args, **{**kwargs, **prompt})  # type: ignore[no-untyped-call]


class _Unacknowledged(Message):
    """A message of a consumer without acknowledgements.

    kombu's own message removes itself from Redis' set of unacknowledged messages, in which it never
    was: a round trip for nothing.
    """

    def ack(self, multiple: bool = False) -> None:
        del multiple
        self._state = "ACK"


class PromptAMQP(AMQP):
    """Celery's AMQP with a PromptConnection and, on Redis, without acknowledgements."""

    Connection = PromptConnection

    def TaskConsumer(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  (Celery's name)
        """Consume without acknowledgements if the broker is Redis.

        The sweeper rings a lost doorbell again, and tracking unacknowledged messages in Redis costs
        two round trips each. Other brokers need acknowledgements to limit what they send.
        """
        if _is_redis(self.app):
            consumer = super().TaskConsumer(*args, **{**kwargs, "no_ack": True})
            consumer.channel.Message = _Unacknowledged
            return consumer
        return super().TaskConsumer(*args, **kwargs)


class Doorbells(bootsteps.StartStopStep):
    """Consumes the doorbells for hosts beside Celery's consumer of the others, and takes none from
    Redis for which the pool has no place."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._hosted: Any = None

    def start(self, consumer: Any) -> None:
        """Begin to consume. Called again for each connection to the broker."""
        channel = consumer.connection.channel()
        self._hosted = consumer.app.amqp.TaskConsumer(
            channel, queues=_hosted_queues(consumer.app), on_decode_error=consumer.on_decode_error
        )
        self._hosted.on_message = consumer.create_task_handler()
        if _is_redis(consumer.app):
            _limit(consumer.task_consumer.channel, partial(consumer.pool.takes, hosted=False))
            _limit(channel, partial(consumer.pool.takes, hosted=True))
        else:
            channel.basic_qos(0, consumer.initial_prefetch_count, False)
        self._hosted.consume()

    def stop(self, consumer: Any) -> None:
        """Take no more doorbells."""
        if self._hosted is not None:
            ignore_errors(consumer, self._hosted.cancel)  # type: ignore[no-untyped-call]

    def shutdown(self, consumer: Any) -> None:
        """Close the channel."""
        self.stop(consumer)
        if self._hosted is not None:
            ignore_errors(consumer, self._hosted.channel.close)  # type: ignore[no-untyped-call]
            self._hosted = None


def _is_redis(app: Any) -> bool:
    return bool(app.conf.broker_url.startswith("redis"))


def _hosted_queues(app: Any) -> list[Queue]:
    """Return the queues for hosts of the worker's queues, without that of its pings."""
    queues = app.amqp.queues
    consumed = [queue for queue in queues.consume_from.values() if not queue.auto_delete]
    return [queues.new_missing(hosted_queue(queue.name)) for queue in consumed]


def _limit(channel: Any, takes: Callable[[], bool]) -> None:
    """Take messages from a channel of Redis only while `takes` returns True."""
    can_consume = channel.qos.can_consume
    channel.qos.can_consume = lambda: takes() and can_consume()
