"""Ids that clients choose may have been used before: by a thread or run that was deleted.

Its event log can be read for a while longer, by those who were following it. A new thread or run
must not begin with it: the events are not its own, and may be another caller's.
"""

from __future__ import annotations

import logging
from uuid import UUID

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import EventLog

log = logging.getLogger(__name__)


def drop_old_log(event_log: EventLog, chosen_id: UUID) -> None:
    """Delete what is left of the log of an earlier holder of this id.

    To be called in the transaction that has inserted the row: then nobody else holds the id, and no
    worker has written a new event yet.
    """
    try:
        event_log.drop(chosen_id)
    except RedisError as error:
        log.warning("an old event log of %s is left to expire: %s", chosen_id, error)
