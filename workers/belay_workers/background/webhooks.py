"""Make the queued webhook calls, independently of the runs.

Every worker does so. A call is leased to the worker that took it. A call that is not answered with
2xx is retried with exponential backoff, up to `BELAY_WEBHOOK_ATTEMPTS` attempts.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from belay_server.configuration.settings import Settings
from belay_server.db import webhooks as call_rows
from belay_server.db.postgres.connection import Connection, connect
from belay_server.db.postgres.outages import is_outage
from belay_server.db.webhooks import WebhookCall
from belay_server.services.webhooks.calls import CALL_SECONDS, CallFailed, CallSettings, make_call
from belay_server.services.webhooks.host_names import HostNames
from belay_workers.background_thread import BackgroundThread

log = logging.getLogger(__name__)

_AT_ONCE = 16
#: Calls at once for one caller, and for one host, of all workers together: a slow receiver delays
#: only calls of its own callers, unless four of them have it.
_AT_ONCE_EACH = 2
_AT_ONCE_PER_HOST = 8
_POLL_SECONDS = 0.5
#: Longer than a call can take, DNS look-ups included.
_LEASE_SECONDS = CALL_SECONDS * 4
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 3600.0


class Webhooks:
    """A thread in each worker's parent process, and a thread pool that waits for the answers."""

    def __init__(self, settings: Settings, calls: CallSettings) -> None:
        self._settings = settings
        self._calls = calls
        self._names = HostNames(at_once=_AT_ONCE)
        self._stopping = threading.Event()
        self._callers = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="belay-webhook")
        self._thread = BackgroundThread(
            "webhooks", self._make_calls_while_connected, self._stopping
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop. A call whose outcome was not written is made again once its lease has expired."""
        self._stopping.set()
        self._thread.join(3.0)
        self._callers.shutdown(wait=False, cancel_futures=True)

    def _make_calls_while_connected(self) -> None:
        under_way: dict[Future[None], WebhookCall] = {}
        with connect(
            self._settings.database_url, pgbouncer=self._settings.pgbouncer, name="belay webhooks"
        ) as conn:
            while not self._stopping.is_set():
                free = _AT_ONCE - len(under_way)
                taken = call_rows.take_calls(
                    conn,
                    limit=free,
                    each=_AT_ONCE_EACH,
                    host=_AT_ONCE_PER_HOST,
                    lease_seconds=_LEASE_SECONDS,
                )
                for call in taken:
                    under_way[self._callers.submit(self._make, call)] = call
                if not under_way:
                    self._stopping.wait(_POLL_SECONDS)
                    continue
                done, _ = wait(under_way, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    self._try_to_settle(conn, under_way.pop(future), future)

    def _make(self, call: WebhookCall) -> None:
        make_call(call, self._calls, self._names)

    def _try_to_settle(self, conn: Connection, call: WebhookCall, future: Future[None]) -> None:
        """Write the outcome of a call. Raises only the error of an outage.

        If it cannot be written, the call is made again when its lease has expired.
        """
        try:
            self._settle(conn, call, future)
        except Exception as error:
            if is_outage(error):
                raise
            log.exception(
                "cannot write the outcome of webhook call %s; it is made again after its lease",
                call.call_id,
            )

    def _settle(self, conn: Connection, call: WebhookCall, future: Future[None]) -> None:
        error = future.exception()
        if error is None:
            call_rows.delete_call(conn, call.call_id)
            return
        if not isinstance(error, CallFailed):
            log.error("webhook of run %s failed", call.run.get("run_id"), exc_info=error)
        if call.attempts >= self._settings.webhook_attempts:
            log.error(
                "webhook of run %s failed %d times; dropped it: %s",
                call.run.get("run_id"),
                call.attempts,
                error,
            )
            call_rows.delete_call(conn, call.call_id)
            return
        seconds = min(_FIRST_WAIT_SECONDS * 2.0 ** (call.attempts - 1), _LONGEST_WAIT_SECONDS)
        log.warning(
            "webhook of run %s failed; retrying in %.0f s: %s",
            call.run.get("run_id"),
            seconds,
            error,
        )
        call_rows.retry_call(conn, call.call_id, seconds=seconds)
