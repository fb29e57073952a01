"""How a worker consumes from its broker."""

from __future__ import annotations

from typing import Any

from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport.virtual import Message


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
        if self.app.conf.broker_url.startswith("redis"):
            consumer = super().TaskConsumer(*args, **{**kwargs, "no_ack": True})
            consumer.channel.Message = _Unacknowledged
            return consumer
        return super().TaskConsumer(*args, **kwargs)
