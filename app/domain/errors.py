"""What may be wrong with a request, by kind. `app.api.errors` gives each its HTTP status.

BelayError
├── InvalidRequest        422
│   └── BadRequest        400
├── NotFound              404
├── Conflict              409
├── TooLarge              413
└── Unavailable           503, with Retry-After
    └── Interrupted       503: went away in the middle of it
"""

from __future__ import annotations


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


class TooLarge(BelayError):
    """The request body is too large."""


class Unavailable(BelayError):
    """The database cannot be reached. Nothing was accepted; try again."""


class Interrupted(Unavailable):
    """The database went away in the middle of it; try again."""
