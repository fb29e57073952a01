"""Define the errors of requests. `belay_server.api.errors` gives each its HTTP status.

A class's docstring is the message that clients get if the error has no other.

BelayError
├── InvalidRequest        422
│   ├── BadRequest        400
│   ├── TooMuch           422: the response would be too large
│   ├── StateTooLarge     422: the API does not read a state of this size
│   └── StateUnreadable   422: the graph's own code fails on the state, or it is encrypted
├── Unauthorized          401
├── Forbidden             403
├── NotFound              404
├── Conflict              409
├── TooSlow               408
├── TooLarge              413
├── TooMany               429, with Retry-After
├── Refused               the status that the project's own authentication chose
└── Unavailable           503, with Retry-After
    └── Interrupted       503: the database became unavailable during the request
"""

from __future__ import annotations

from collections.abc import Mapping


class BelayError(Exception):
    """Something went wrong."""

    def __init__(self, detail: str | None = None) -> None:
        self.detail = detail or (self.__doc__ or "").strip()
        super().__init__(self.detail)


class InvalidRequest(BelayError):
    """The request is not valid."""


class BadRequest(InvalidRequest):
    """The request cannot be carried out as it stands."""


class NotFound(BelayError):
    """Not Found"""


class Conflict(BelayError):
    """Conflict"""


class TooMuch(InvalidRequest):
    """The response would be too large; request fewer items at once (limit)."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(
            f"The response would have more than {most_bytes:,} bytes: request fewer items at once "
            "(BELAY_MAX_ANSWER_BYTES)"
        )
        self._most_bytes = most_bytes

    def __reduce__(self) -> tuple[type[TooMuch], tuple[int]]:
        return TooMuch, (self._most_bytes,)


class StateTooLarge(InvalidRequest):
    """The thread's state is too large to be read or updated by the API; runs can still use it."""


class StateUnreadable(InvalidRequest):
    """The thread's state cannot be read: the graph's own code fails on it, or it is encrypted."""


class Unauthorized(BelayError):
    """Unauthorized"""


class Forbidden(BelayError):
    """Forbidden"""


class OutOfReach(Forbidden):
    """A create or a change whose metadata the caller's own filter does not match."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"The metadata of this {kind} does not match what you may access. Nothing was changed."
        )


class Refused(BelayError):
    """The response of the project's own authentication, with the status that it chose."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str]) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers


class TooMany(BelayError):
    """Too many requests; try again later."""

    def __init__(self, detail: str | None = None, *, retry_after: float = 1.0) -> None:
        super().__init__(detail)
        #: After how many seconds the client may try again.
        self.retry_after = retry_after


class TooSlow(BelayError):
    """The request body took too long to come in."""


class TooLarge(BelayError):
    """The request body is too large."""


class Unavailable(BelayError):
    """The database is unavailable. Nothing was accepted; try again."""


class Interrupted(Unavailable):
    """The database became unavailable during the request; try again."""
