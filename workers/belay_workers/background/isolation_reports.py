"""Report to Redis which graphs this worker has isolated, while they are isolated."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from belay_server.bus.client import RedisError
from belay_server.bus.isolated_graphs import IsolatedGraphs
from belay_workers.background_thread import BackgroundThread

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0


class IsolationReports:
    """Reports the isolated graphs every 5 seconds. `reasons` returns why each is isolated, by graph
    id."""

    def __init__(
        self, graphs: IsolatedGraphs, worker: str, reasons: Callable[[], Mapping[str, str]]
    ) -> None:
        self._graphs = graphs
        self._worker = worker
        self._reasons = reasons
        self._stopping = threading.Event()
        self._thread = BackgroundThread("isolation reports", self._report, self._stopping)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(_INTERVAL_SECONDS)

    def _report(self) -> None:
        if reasons := self._reasons():
            try:
                self._graphs.report(self._worker, reasons)
            except RedisError as error:
                log.debug("cannot report the isolated graphs: %s", error)
        self._stopping.wait(_INTERVAL_SECONDS)
