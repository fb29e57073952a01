"""Give a run's code access to the server, for as long as the child has the run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from uuid import UUID

from belay_server.graphs.project.loopback import RUN_HEADER, Loopback


class RunAccess:
    """The credential of the child's current run. The server accepts it while the claim lasts."""

    def __init__(self, url: str) -> None:
        """`url` is that of the web process."""
        self._headers: dict[str, str] = {}
        self._loopback = Loopback(url, self.headers)

    def install(self) -> None:
        """Give it to clients of `langgraph_sdk` without a URL. Call it before the project is
        imported."""
        self._loopback.install()

    @staticmethod
    def new_token() -> str:
        return secrets.token_urlsafe(24)

    def begin(self, run_id: UUID, token: str) -> None:
        self._headers = {RUN_HEADER: f"{run_id}.{token}"}

    def end(self) -> None:
        self._headers = {}

    def headers(self) -> Mapping[str, str]:
        """Return the headers that authenticate the code of the current run."""
        return self._headers
