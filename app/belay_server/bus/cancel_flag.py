"""The cancel flag: what makes a cancel fast. The column on the run row is what makes it sure.

`raise_flags` is called after the cancel has committed; `raised_flags` is the poll of a worker's
supervisor, one MGET for all its runs; `CancelNudges` hears the pub/sub nudge in between.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from uuid import UUID

import redis

from belay_server.bus.client import Keys

log = logging.getLogger(__name__)

#: A flag outlives any poll; the lease renewal reads the column, so it need not live longer.
_FLAG_SECONDS = 600


class CancelFlags:
    """Raise, poll and lower flags. Losing Redis loses only speed."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    def raise_flags(self, run_ids: Iterable[UUID], action: str) -> None:
        """Flag running runs and nudge their workers. Never raises: the row already says it."""
        run_ids = list(run_ids)
        if not run_ids:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for run_id in run_ids:
                    pipe.set(self._keys.cancel_flag(run_id), action, ex=_FLAG_SECONDS)
                    pipe.publish(self._keys.cancels, str(run_id))
                pipe.execute()
        except redis.RedisError as error:
            log.warning("cancel flags not raised, the lease renewal will see the rows: %s", error)

    def raised_flags(self, run_ids: Sequence[UUID]) -> set[UUID]:
        """Those of the runs whose flag is up. Raises redis.RedisError."""
        if not run_ids:
            return set()
        values = self._client.mget([self._keys.cancel_flag(run_id) for run_id in run_ids])
        return {run_id for run_id, value in zip(run_ids, values, strict=True) if value is not None}

    def lower_flags(self, run_ids: Sequence[UUID]) -> None:
        """Tidy up after the end; a flag would expire anyway."""
        try:
            self._client.delete(*[self._keys.cancel_flag(run_id) for run_id in run_ids])
        except redis.RedisError as error:
            log.debug("cancel flags of %d runs left to expire: %s", len(run_ids), error)


class CancelNudges:
    """A subscription to the nudge channel. A nudge is a hint: anyone may have published it."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._pubsub = client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe(keys.cancels)

    def wait(self, seconds: float) -> set[UUID]:
        """Run ids nudged within `seconds`, returning at the first. Raises redis.RedisError."""
        nudged = set()
        message = self._pubsub.get_message(timeout=seconds)
        while message is not None:
            nudged |= _run_ids(message.get("data"))
            message = self._pubsub.get_message(timeout=0)
        return nudged

    def close(self) -> None:
        self._pubsub.close()


def _run_ids(data: object) -> set[UUID]:
    if not isinstance(data, bytes):
        return set()
    try:
        return {UUID(data.decode())}
    except ValueError:
        return set()
