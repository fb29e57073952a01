"""Remember the callers that the project's `authenticate` has returned (`auth.cache`)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable

from werkzeug.datastructures import Headers

from belay_server.domain.access import Caller
from belay_server.graphs.project.auth_section import AuthCacheConfig


class AuthCache:
    """The callers of one web process, by the values of the headers that identify them.

    A refusal is not remembered. A caller whose access ends is accepted until the entry expires.
    """

    def __init__(
        self, config: AuthCacheConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._known: dict[str, tuple[Caller, float]] = {}

    def caller(self, headers: Headers, authenticate: Callable[[], Caller]) -> Caller:
        """Return the caller of a request with these headers. Call `authenticate` if it is not
        remembered, or if the request has none of the headers."""
        values = [headers.get(name) for name in self._config.headers]
        if not any(values):
            return authenticate()
        key = hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()
        caller, until = self._known.get(key, (None, 0.0))
        if caller is not None and until > self._clock():
            return _copy(caller)
        caller = authenticate()
        if len(self._known) >= self._config.most_callers:
            self._known.clear()
        self._known[key] = _copy(caller), self._clock() + self._config.seconds
        return caller


def _copy(caller: Caller) -> Caller:
    """Return a copy: handlers of one request may change the user's data, but not that of others."""
    return dataclasses.replace(caller, user=copy.deepcopy(caller.user))
