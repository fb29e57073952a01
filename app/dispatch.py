"""The doorbell: a Celery message that says "run N may be claimable". It may be lost or doubled.

Sent by task NAME, so that no web process imports the workers. No result backend, no late acks,
JSON only: the row in Postgres decides everything, and the sweeper rings again.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from typing import Any
from uuid import UUID

from celery import Celery
from kombu.exceptions import OperationalError

from app.settings import DEFAULT_QUEUE, Settings

log = logging.getLogger(__name__)

RUN_TASK = "belay.run"
#: After a failed ring, do not try the broker again for this long: every create would wait for it.
_PAUSE_SECONDS = 1.0


def celery_config(settings: Settings) -> dict[str, Any]:
    """Celery's settings, the same in the web processes, the workers and the sweeper."""
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
        "worker_disable_prefetch": settings.broker_url.startswith("redis"),
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 2.0,
        "worker_proc_alive_timeout": 30.0,
    }
    if settings.broker_url.startswith("redis"):
        config["broker_transport_options"] = {
            "socket_timeout": 30.0,
            "socket_connect_timeout": 2.0,
            "socket_keepalive": True,
            # A doorbell is acknowledged before the run starts, so this only bounds how long one
            # sits in a dead worker's hands.
            "visibility_timeout": 60,
            "global_keyprefix": settings.redis_prefix,
        }
    if settings.broker_url.startswith("rediss"):
        verify = ssl.CERT_REQUIRED if settings.redis_verify_tls else ssl.CERT_NONE
        config["broker_use_ssl"] = {"ssl_cert_reqs": verify}
    return config


class Doorbell:
    """Rings for runs. A ring that fails is logged and left to the sweeper."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._paused_until = 0.0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings) -> Doorbell:
        """A doorbell with a Celery app of its own, for processes that are not workers."""
        celery = Celery("belay", set_as_current=False)
        celery.conf.update(celery_config(settings))
        return cls(celery)

    def ring(self, run_id: UUID, queue: str) -> bool:
        """Send the message. False when the broker could not be reached."""
        if time.monotonic() < self._paused_until:
            return False
        try:
            self._celery.send_task(
                RUN_TASK, args=(str(run_id),), queue=queue, retry=False, ignore_result=True
            )
        except (OperationalError, OSError) as error:
            log.warning("doorbell of run %s not rung, the sweeper will: %s", run_id, error)
            with self._lock:
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
            return False
        return True
