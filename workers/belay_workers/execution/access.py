"""Give a run's code access to the server, for as long as the child has the run."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from uuid import UUID

from belay_server.graphs.project.loopback import RUN_HEADER, Loopback

#: The headers that authenticate the code of the current context. A thread that a node has started
#: by itself has none: it may outlive its run, beneath another tenant's.
_OF_CODE: ContextVar[Mapping[str, str] | None] = ContextVar("belay_run_access", default=None)


class RunAccess:
    """The credential of the child's current run. The server accepts it while the claim lasts."""

    def __init__(self, url: str) -> None:
        """`url` is that of the web process."""
        self._headers: dict[str, str] = {}
        self._loopback = Loopback(url, lambda: _OF_CODE.get() or {})

    def install(self) -> None:
        """Give it to clients of `langgraph_sdk` without a URL. Call it before the project is
        imported."""
        self._loopback.install()

    def of_one_run(self) -> RunAccess:
        """Return a credential for one of several runs of this process."""
        made = copy.copy(self)
        made._headers = {}
        return made

    @staticmethod
    def new_token() -> str:
        return secrets.token_urlsafe(24)

    def begin(self, run_id: UUID, token: str) -> None:
        """Set the credential of a claimed run."""
        self._headers = {RUN_HEADER: f"{run_id}.{token}"}

    def enter(self) -> None:
        """Give the current context, in which the run's graph is executed, the run's access."""
        _OF_CODE.set(self._headers)

    def end(self) -> None:
        self._headers = {}
