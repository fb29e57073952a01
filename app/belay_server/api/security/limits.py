"""What one caller may ask of the server: how often, and how much at once.

Cancels are counted apart and have places of their own: whoever has used up everything else can
still stop what they have started.
"""

from __future__ import annotations

from collections.abc import Callable

from flask import has_request_context, request

from belay_server.api.context import parts
from belay_server.api.security.authentication import CALLER, caller
from belay_server.bus.rate_limits import CANCELS, REQUESTS
from belay_server.domain.errors import TooMany
from belay_server.services.parts import Parts


def count_request(found: Parts, *, is_cancel: bool = False) -> None:
    """One more request of the one who asks. Raises TooMany."""
    if found.rate_limits is None:
        return
    lane = CANCELS if is_cancel else REQUESTS
    if wait := found.rate_limits.seconds_to_wait(lane, asker()):
        raise TooMany(f"Too many {lane}; try again later", retry_after=wait)


def take_place(found: Parts, *, is_cancel: bool = False) -> Callable[[], None] | None:
    """One more open request of the one who asks; what is returned is to be called when it has
    ended. Raises TooMany."""
    if found.open_requests is None:
        return None
    return found.open_requests.enter(f"{CANCELS} of {asker()}" if is_cancel else asker())


def connection_owner() -> str | None:
    """Return for whom a database connection is wanted. None outside of a request, and before it
    is known who sent it."""
    if not has_request_context():
        return None
    if parts().authentication is not None and CALLER not in request.environ:
        return None
    return asker()


def asker() -> str:
    """Return what limits count by: the caller's name, or the address without authentication."""
    who = caller()
    return f"address:{request.remote_addr}" if who is None else who.name
