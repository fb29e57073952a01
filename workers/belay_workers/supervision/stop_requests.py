"""The claims whose runs are to be stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from belay_server.domain.runs import Claim
from belay_workers.slots import StopReason


class StopRequests:
    """The claims to be stopped, with the reasons. Adding one wakes the stopper."""

    def __init__(self) -> None:
        self._reasons: dict[Claim, StopReason] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, claim: Claim, reason: StopReason) -> bool:
        """Request a stop. Return False if one is already requested.

        Any reason replaces DRAIN.
        """
        is_new = self._reasons.get(claim) in (None, StopReason.DRAIN)
        if is_new:
            self._reasons[claim] = reason
            self.wake()
        return is_new

    def reason_for(self, claim: Claim) -> StopReason:
        return self._reasons.get(claim, StopReason.NONE)

    def __contains__(self, claim: Claim) -> bool:
        return claim in self._reasons

    @property
    def any_left(self) -> bool:
        return bool(self._reasons)

    def forget_all_but(self, current: Callable[[], set[Claim]]) -> None:
        """Drop the requests for claims that are not in `current()`.

        A claim is in its slot before its stop is requested. So the requests are listed before the
        slots are read.
        """
        requested = list(self._reasons)
        still_here = current() if requested else set()
        for claim in requested:
            if claim not in still_here:
                self._reasons.pop(claim, None)

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def fileno(self) -> int:
        """Return a descriptor that is readable after a call of `wake`."""
        return self._wake_read

    def drain_wakeups(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
