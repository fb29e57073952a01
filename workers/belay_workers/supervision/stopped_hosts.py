"""Find hosts that a signal has stopped (SIGSTOP) and that nothing has continued.

The supervisor renews the leases of their runs, so no other worker would take these. A host that is
continued within a minute goes on with its runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from belay_workers.slots import Kind, Reading
from belay_workers.supervision.processes import is_stopped

_LONGEST_SECONDS = 60.0


class StoppedHosts:
    """The hosts of one worker that are stopped. Call `look` regularly."""

    def __init__(
        self,
        is_stopped: Callable[[int], bool] = is_stopped,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_stopped` returns whether a signal has stopped the process with an id; `clock` returns
        the time in seconds."""
        self._is_stopped = is_stopped
        self._clock = clock
        #: Since when each is known to be stopped, by process.
        self._since: dict[int, float] = {}

    def look(self, readings: Iterable[Reading]) -> None:
        """Note which hosts are stopped now."""
        hosts = {reading.pid for reading in readings if reading.kind is Kind.HOST}
        now = self._clock()
        self._since = {pid: self._since.get(pid, now) for pid in hosts if self._is_stopped(pid)}

    def is_given_up(self, pid: int) -> bool:
        """Return whether a host has been stopped for a minute."""
        since = self._since.get(pid)
        return since is not None and self._clock() - since > _LONGEST_SECONDS
