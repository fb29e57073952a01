"""What a web process remembers of assistants, so that a create need not ask."""

from __future__ import annotations

from app.domain.assistants import Assistant


class KnownAssistants:
    """Assistants that this process has seen, by what runs call them.

    What is known here may have been changed elsewhere since: whoever uses it has the database check
    that `updated_at` is still the same, in the statement that relies on it.
    """

    _MOST = 1_000

    def __init__(self) -> None:
        self._known: dict[str, Assistant] = {}

    def get(self, named: str) -> Assistant | None:
        return self._known.get(named)

    def keep(self, named: str, assistant: Assistant) -> None:
        if len(self._known) >= self._MOST:
            self._known.clear()
        self._known[named] = assistant
