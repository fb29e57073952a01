"""Notice changes of the project's code and configuration, for `belay dev`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import watchfiles

from belay_server.dev.process_tree import say

_SHOWN = 3


class CodeChanges(watchfiles.DefaultFilter):
    """Selects Python files, `.env` and `langgraph.json`. A run may write other files."""

    def __init__(self, config: Path, data_dir: Path) -> None:
        """Ignore folders such as `.venv` and `node_modules`, and the servers' data."""
        super().__init__(ignore_paths=[data_dir])
        self._config = config.resolve()

    def __call__(self, change: watchfiles.Change, path: str) -> bool:
        file = Path(path)
        is_ours = file.suffix == ".py" or file.name.startswith(".env") or file == self._config
        return is_ours and super().__call__(change, path)


def watch(
    folders: Iterable[Path],
    changes: CodeChanges,
    on_change: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Call `on_change` with the names of changed files, in a thread that ends with `stop`."""
    existing = [folder for folder in folders if folder.is_dir()]

    def run() -> None:
        found = watchfiles.watch(
            *existing, watch_filter=changes, stop_event=stop, raise_interrupt=False
        )
        try:
            for batch in found:
                on_change(_named(sorted({Path(path).name for _, path in batch})))
        except (OSError, RuntimeError) as error:  # such as the system's limit of watched folders
            say("belay", f"cannot watch the project, so it is not loaded again: {error}")

    threading.Thread(target=run, name="belay-reload", daemon=True).start()


def _named(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
