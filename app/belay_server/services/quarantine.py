"""Keep one failing item from stopping a background loop that serves all callers.

A loop handles each of its items through a quarantine. An item that fails is retried after a delay,
which doubles each time. After `TRIES` failures it is set aside for an hour, logged at level ERROR
and counted. An outage is not an item's failure; its error is raised, and the loop waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from belay_server.db.postgres.outages import in_short, is_outage

log = logging.getLogger(__name__)

_T = TypeVar("_T")
TRIES = 5
_FIRST_SECONDS = 1.0
_ASIDE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _PutOff:
    """How often an item has failed, and when it is retried (monotonic seconds)."""

    failures: int
    again_at: float


class Quarantine:
    """The failed items of one loop in one process. Other processes retry them independently."""

    def __init__(
        self,
        what: str,
        *,
        on_set_aside: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` names an item in log messages, such as "the lost run". `on_set_aside` is called
        when an item is set aside."""
        self._what = what
        self._on_set_aside = on_set_aside
        self._clock = clock
        self._items: dict[UUID, _PutOff] = {}

    def put_off(self) -> list[UUID]:
        """Return the items to leave out of the next query; they would displace others in its
        batch."""
        now = self._clock()
        return [item for item, put_off in self._items.items() if put_off.again_at > now]

    def handle(self, item: UUID, work: Callable[[], _T]) -> _T | None:
        """Do the work of one item, and return its result. Return None when the item is put off or
        has just failed. Raises only the error of an outage."""
        put_off = self._items.get(item)
        if put_off is not None and put_off.again_at > self._clock():
            return None
        try:
            result = work()
        except Exception as error:
            if is_outage(error):
                raise
            self._note_failure(item, error)
            return None
        self._items.pop(item, None)
        return result

    def _note_failure(self, item: UUID, error: Exception) -> None:
        before = self._items.get(item)
        failures = 1 if before is None else before.failures + 1
        aside = failures % TRIES == 0
        seconds = _ASIDE_SECONDS if aside else _FIRST_SECONDS * 2 ** (failures % TRIES - 1)
        self._items[item] = _PutOff(failures, self._clock() + seconds)
        if not aside:
            log.warning(
                "%s %s failed, retrying in %.0f s: %s",
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
