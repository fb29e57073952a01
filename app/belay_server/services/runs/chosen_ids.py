"""Handle ids that clients choose, which a deleted thread or run may have had before.

The event log of a deleted thread or run stays readable for 30 seconds, for streams that are still
reading it. A new thread or run with the same id must not begin with these events, which may be
another caller's.
"""

from __future__ import annotations

import logging
from uuid import UUID

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import EventLog

log = logging.getLogger(__name__)


def drop_old_log(event_log: EventLog, chosen_id: UUID) -> None:
    """Delete the event log of an earlier thread or run with this id, if there is one.

    Call it in the transaction that has inserted the new row: no other row has the id then, and no
    worker has written an event yet. A Redis error is logged, and the log expires by itself.
    """
    try:
        event_log.drop(chosen_id)
    except RedisError as error:
        log.warning("cannot delete an old event log of %s, it will expire: %s", chosen_id, error)
