"""Keeps one item's failure from stopping a background loop that serves everybody.

A loop handles each of its items through a quarantine. An item that fails is put off, longer each
time; after `TRIES` failures it is set aside for an hour, logged at level ERROR and counted. An
outage is no item's failure and passes: the loop waits for the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from belay_server.db.outages import in_short, is_outage

log = logging.getLogger(__name__)

_T = TypeVar("_T")
TRIES = 5
_FIRST_SECONDS = 1.0
_ASIDE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _PutOff:
    """An item that has failed, how often, and when it is tried again (monotonic seconds)."""

    failures: int
    again_at: float


class Quarantine:
    """Of one loop, in one process: another process tries for itself."""

    def __init__(
        self,
        what: str,
        *,
        on_set_aside: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` names an item in the log: "the lost run"."""
        self._what = what
        self._on_set_aside = on_set_aside
        self._clock = clock
        self._items: dict[UUID, _PutOff] = {}

    def put_off(self) -> list[UUID]:
        """The items not to be looked for now: they would take the place of others in a batch."""
        now = self._clock()
        return [item for item, put_off in self._items.items() if put_off.again_at > now]

    def handle(self, item: UUID, work: Callable[[], _T]) -> _T | None:
        """Do the work of one item. None when it is put off or has just failed; raises an outage."""
        put_off = self._items.get(item)
        if put_off is not None and put_off.again_at > self._clock():
            return None
        try:
            result = work()
        except Exception as error:
            if is_outage(error):
                raise
            self._has_failed(item, error)
            return None
        self._items.pop(item, None)
        return result

    def _has_failed(self, item: UUID, error: Exception) -> None:
        before = self._items.get(item)
        failures = 1 if before is None else before.failures + 1
        aside = failures % TRIES == 0
        seconds = _ASIDE_SECONDS if aside else _FIRST_SECONDS * 2 ** (failures % TRIES - 1)
        self._items[item] = _PutOff(failures, self._clock() + seconds)
        if not aside:
            log.warning(
                "%s %s failed, tried again in %.0f s: %s",
                self._what,
                item,
                seconds,
                in_short(error),
                exc_info=failures == 1,
            )
            return
        log.error(
            "%s %s failed %d times and is set aside for an hour",
            self._what,
            item,
            failures,
            exc_info=error,
        )
        self._on_set_aside()
