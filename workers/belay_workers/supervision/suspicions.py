"""Isolate graphs for a while whose runs were in hosts that died for an unknown reason."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds within which a second host has to die that has runs of a graph, without a run being known
#: as the cause, before the graph is isolated; and for which it is isolated then.
_SUSPECT_SECONDS = 600.0


class Suspicions:
    """The graphs of which a run may be the cause of the deaths of hosts.

    `isolate` is called with the position of a graph and the reason, `share_again` when its
    isolation has expired.
    """

    def __init__(
        self, isolate: Callable[[int, str], None], share_again: Callable[[int], None]
    ) -> None:
        self._isolate = isolate
        self._share_again = share_again
        #: When a host last died that had runs of a graph.
        self._died_at: dict[int, float] = {}
        self._isolated_until: dict[int, float] = {}

    def add(self, graphs: set[int]) -> None:
        """Note that a host has died by itself, which had runs of these graphs. Isolate those of
        which another host has died before."""
        now = time.monotonic()
        for graph in graphs:
            if self._died_at.get(graph, -_SUSPECT_SECONDS) > now - _SUSPECT_SECONDS:
                self._isolate(graph, "two hosts died that had runs of it (for ten minutes)")
                self._isolated_until[graph] = now + _SUSPECT_SECONDS
            self._died_at[graph] = now

    def expire(self) -> None:
        """Let graphs share hosts again whose isolation has expired."""
        now = time.monotonic()
        for graph in [one for one, until in self._isolated_until.items() if until < now]:
            del self._isolated_until[graph]
            self._share_again(graph)
