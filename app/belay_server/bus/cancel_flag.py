"""Set and poll the cancel flags, which make a cancel fast. The run's row makes it certain.

`raise_flags` is called after the cancel has been committed. The supervisor of a worker polls with
`raised_flags`, one MGET for all its runs, and receives pub/sub notifications from `CancelNudges`
between two polls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from uuid import UUID

import redis

from belay_server.bus.client import Keys

log = logging.getLogger(__name__)

#: Expiry of a flag. It exceeds any poll interval; after it, the lease renewal reads the row.
_FLAG_SECONDS = 600


class CancelFlags:
    """Raises, polls and lowers flags. Without Redis, cancels are slower but not lost."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    def raise_flags(self, run_ids: Iterable[UUID], action: str) -> None:
        """Set the flags of running runs and notify their workers. Redis errors are logged: the
        cancel is already in the row."""
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
            log.warning("cannot raise cancel flags, workers will read the rows: %s", error)

    def raised_flags(self, run_ids: Sequence[UUID]) -> set[UUID]:
        """Return those of the runs whose flag is set. Raises redis.RedisError."""
        if not run_ids:
            return set()
        values = self._client.mget([self._keys.cancel_flag(run_id) for run_id in run_ids])
        return {run_id for run_id, value in zip(run_ids, values, strict=True) if value is not None}

    def lower_flags(self, run_ids: Sequence[UUID]) -> None:
        """Delete the flags of ended runs; they would expire otherwise."""
        try:
            self._client.delete(*[self._keys.cancel_flag(run_id) for run_id in run_ids])
        except redis.RedisError as error:
            log.debug(
                "cannot delete the cancel flags of %d runs, they will expire: %s",
                len(run_ids),
                error,
            )


class CancelNudges:
    """A subscription to the channel of cancels. A message is only a hint: any client of Redis may
    have published it."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._pubsub = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._pubsub.subscribe(keys.cancels)

    def wait(self, seconds: float) -> set[UUID]:
        """Return the run ids received within `seconds`, as soon as there is one. Raises
        redis.RedisError."""
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
