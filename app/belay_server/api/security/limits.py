"""Limit the rate and the number of open requests of each caller.

Cancels have separate limits, so that a caller who has reached the others can still cancel runs.
"""

from __future__ import annotations

from collections.abc import Callable

from flask import has_request_context, request

from belay_server.api.context import ApiContext, context
from belay_server.api.security.authentication import CALLER, caller
from belay_server.bus.rate_limits import CANCELS, REQUESTS
from belay_server.domain.errors import TooMany


def count_request(found: ApiContext, *, is_cancel: bool = False) -> None:
    """Count a request of the caller. Raises TooMany."""
    if found.rate_limits is None:
        return
    lane = CANCELS if is_cancel else REQUESTS
    if wait := found.rate_limits.seconds_to_wait(lane, asker()):
        raise TooMany(f"Too many {lane}; try again later", retry_after=wait)


def take_place(found: ApiContext, *, is_cancel: bool = False) -> Callable[[], None] | None:
    """Count an open request of the caller. Return a function to call when it has ended; None
    without a limit. Raises TooMany."""
    if found.open_requests is None:
        return None
    return found.open_requests.enter(f"{CANCELS} of {asker()}" if is_cancel else asker())


def connection_owner() -> str | None:
    """Return the caller that a database connection is used for; None outside of a request, and
    before the request is authenticated."""
    if not has_request_context():
        return None
    if context().authentication is not None and CALLER not in request.environ:
        return None
    return asker()


def asker() -> str:
    """Return the name that limits count by: the caller's, or without authentication the address."""
    who = caller()
    return f"address:{request.remote_addr}" if who is None else who.name
