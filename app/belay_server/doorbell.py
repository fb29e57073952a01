"""Send doorbells: Celery messages that a run may be claimable. One may be lost or duplicated.

The doorbells of each queue have two queues in the broker: one for graphs that share hosts, and one
for the others. So a worker can take messages of only that kind for which it has a place. A message
in the other queue, from a sender with another `BELAY_ISOLATION`, starts the run as well.

A message names its task, so the web process does not import the workers. There is no result backend
and no late acknowledgement, and messages are JSON only: the run's row in Postgres decides, and the
sweeper sends the doorbell again.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu import Queue
from kombu.transport import redis

from belay_server.configuration.settings import DEFAULT_QUEUE, Settings
from belay_server.db.runs import Ringable

log = logging.getLogger(__name__)

RUN_TASK = "belay.run"
PING_TASK = "belay.ping"
#: What the body of each message has, besides the arguments of the task.
_NO_CALLBACKS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: What follows a queue's name in that of the broker's queue for graphs that share hosts.
_HOSTED = ":hosted"
#: How long sending waits for a broker that does not respond.
_SEND_SECONDS = 2.0
#: How long after a failure the broker is not tried again, because every create would wait for it.
_PAUSE_SECONDS = 1.0


def hosted_queue(queue: str) -> str:
    """Return the name of the broker's queue for the runs of graphs that share hosts."""
    return f"{queue}{_HOSTED}"


def is_hosted_queue(name: str) -> bool:
    """Return whether this is the broker's queue for the runs of graphs that share hosts."""
    return name.endswith(_HOSTED)


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings, the same in the web processes, the workers and the sweeper."""
    config: dict[str, Any] = {
        "broker_url": settings.broker_url,
        "task_ignore_result": True,
        "result_backend": None,
        "task_default_queue": DEFAULT_QUEUE,
        "task_create_missing_queues": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 2.0,
    }
    if settings.broker_url.startswith("redis"):
        config["broker_transport_options"] = {
            "socket_timeout": 5.0,
            "socket_connect_timeout": 2.0,
            "socket_keepalive": True,
            # In seconds. A consumer closes a half-open connection after twice this.
            "health_check_interval": 4,
            # In seconds. A doorbell is acknowledged before the run starts, so this only bounds how
            # long a message stays reserved by a dead worker.
            "visibility_timeout": 60,
            "global_keyprefix": settings.redis_prefix,
        }
    if settings.broker_url.startswith("rediss"):
        verify = ssl.CERT_REQUIRED if settings.redis_verify_tls else ssl.CERT_NONE
        config["broker_use_ssl"] = {"ssl_cert_reqs": verify}
    return config


class SendingChannel(redis.Channel):
    """A channel that sends all messages by one client of Redis, not by a new one for each."""

    _sender: Any = None

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        if client is None:
            if self._sender is None or self._sender.connection_pool is not self.pool:
                self._sender = self._create_client()  # type: ignore[no-untyped-call]
            client = self._sender
        yield client


class SendingTransport(redis.Transport):
    """kombu's transport for Redis, for senders."""

    Channel = SendingChannel


class Doorbell:
    """Sends the doorbells of runs. A failure is logged and left to the sweeper.

    The run's row is committed by then, so a failure must not change the response to a create.
    """

    def __init__(self, celery: Celery, shared_graphs: Collection[str] = ()) -> None:
        """`shared_graphs` are those whose runs share hosts."""
        self._celery = celery
        self._shared_graphs = frozenset(shared_graphs)
        # The headers of a message without arguments, which are the same in each.
        self._headers = celery.amqp.as_task_v2("", "", ignore_result=True).headers
        self._paused_until = 0.0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings, shared_graphs: Collection[str] = ()) -> Doorbell:
        """Make a doorbell with its own Celery app, whose waits for a Redis broker are short."""
        celery = Celery("belay", set_as_current=False)
        celery.conf.update(celery_config(settings))
        if "broker_transport_options" in celery.conf:
            celery.conf.broker_transport_options["socket_timeout"] = _SEND_SECONDS
            celery.conf.broker_transport = "belay_server.doorbell:SendingTransport"
        return cls(celery, shared_graphs)

    def queue_of(self, queue: str, graph_id: str) -> str:
        """Return the broker's queue for the doorbells of a graph's runs."""
        return hosted_queue(queue) if graph_id in self._shared_graphs else queue

    def ring(self, run: Ringable) -> bool:
        """Send a run's doorbell. Return False if it could not be sent."""
        queue = self.queue_of(run.queue, run.graph_id)
        return self._send(
            f"doorbell of run {run.run_id}", RUN_TASK, queue, str(uuid.uuid4()), str(run.run_id)
        )

    def ping(self, ping_id: str, queue: Queue) -> bool:
        """Send a ping to a worker's own queue. Return False if it could not be sent."""
        return self._send("ping", PING_TASK, queue, ping_id)

    def _send(self, what: str, task: str, queue: str | Queue, task_id: str, *args: str) -> bool:
        """Publish a task's message. `Celery.send_task` publishes the same one, but takes four times
        as long: it looks for a route, and makes a client of Redis and representations for events.
        """
        if time.monotonic() < self._paused_until:
            return False
        try:
            declared = self._celery.amqp.queues[queue] if isinstance(queue, str) else queue
            with self._celery.producer_or_acquire() as producer:
                producer.publish(
                    (args, {}, _NO_CALLBACKS),
                    serializer="json",
                    exchange="",
                    routing_key=declared.name,
                    declare=[declared],
                    delivery_mode="persistent",
                    headers={**self._headers, "task": task, "id": task_id, "root_id": task_id},
                    correlation_id=task_id,
                )
        except Exception as error:  # noqa: BLE001  (each broker's library has its own errors)
            log.warning("%s not sent, the broker is unavailable: %s", what, error)
            self._pause()
            return False
        return True

    def waiting(self, queue: str) -> int | None:
        """Return how many messages wait in a queue of the broker; None if that is unavailable."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            with self._celery.connection_for_write() as connection:
                # Declared as Celery declares it. With a key prefix, a passive declaration makes
                # kombu look for the queue under the wrong name.
                channel = connection.default_channel
                return int(
                    channel.queue_declare(queue, durable=True, auto_delete=False).message_count
                )
        except Exception as error:  # noqa: BLE001  (as above)
            log.warning("length of queue %s unknown, the broker is unavailable: %s", queue, error)
            self._pause()
            return None

    def _pause(self) -> None:
        with self._lock:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
