"""Notice changes of the project's code, configuration and packages, for `belay dev`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import watchfiles

from belay_server.dev.process_tree import say

_SHOWN = 3
_PACKAGES_SECONDS = 1.0
_TEST_FOLDERS = frozenset({"test", "tests"})


class CodeChanges(watchfiles.DefaultFilter):
    """Selects Python files, `.env` and `langgraph.json`. A run may write other files.

    Tests are left out, unless the configuration names them, and so are virtual environments.
    """

    def __init__(self, config: Path, data_dir: Path) -> None:
        """Ignore folders such as `.venv` and `node_modules`, and the servers' data."""
        super().__init__(ignore_paths=[data_dir])
        self._config = config.resolve()

    def __call__(self, change: watchfiles.Change, path: str) -> bool:
        file = Path(path)
        if not super().__call__(change, path):
            return False
        if file == self._config or file.name.startswith(".env"):
            return True
        if file.suffix == ".py":
            return not self._is_test(file) and not self._is_installed(file)
        # A folder that is copied here is watched only from now on: its files may be there already.
        is_new = change is watchfiles.Change.added and file.is_dir()
        return is_new and any(self(change, str(found)) for found in file.rglob("*.py"))

    def _is_test(self, file: Path) -> bool:
        root = self._config.parent
        parts = file.relative_to(root).parts if file.is_relative_to(root) else file.parts[-1:]
        names = set(parts[:-1]) & _TEST_FOLDERS
        if file.stem.startswith("test_") or file.stem.endswith("_test") or file.stem == "conftest":
            names.add(file.stem)
        return bool(names) and not any(name in self._config_text() for name in names)

    def _config_text(self) -> str:
        try:
            return self._config.read_text()
        except (OSError, UnicodeDecodeError):
            return ""  # the web process and the worker report the error

    def _is_installed(self, file: Path) -> bool:
        """Return whether the file is in a virtual environment, of any name."""
        root = self._config.parent
        above = [folder for folder in file.parents if folder.is_relative_to(root)]
        return any((folder / "pyvenv.cfg").is_file() for folder in above)


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


class InstalledPackages:
    """Notices that packages were installed, upgraded or removed in this environment.

    An installer adds and removes entries of a folder of packages, which changes its time.
    """

    def __init__(self, folders: Sequence[str] = sys.path) -> None:
        self._folders = [Path(name) for name in folders if name.endswith("-packages")]
        self._seen = self._times()
        self._is_changing = False

    def _times(self) -> list[int]:
        return [folder.stat().st_mtime_ns for folder in self._folders if folder.is_dir()]

    def have_changed(self) -> bool:
        """Return whether there was a change since the last True, and none since the last call.

        To be called every second or so: an installer may not have ended yet.
        """
        now = self._times()
        if now != self._seen:
            self._seen, self._is_changing = now, True
            return False
        changed, self._is_changing = self._is_changing, False
        return changed


def watch_packages(
    waits: Callable[[], bool], on_change: Callable[[str], None], stop: threading.Event
) -> None:
    """Call `on_change` when packages change while the project `waits` for what it lacks.

    In a thread that ends with `stop`.
    """
    packages = InstalledPackages()

    def run() -> None:
        while not stop.wait(_PACKAGES_SECONDS):
            if packages.have_changed() and waits():
                on_change("installed packages")

    threading.Thread(target=run, name="belay-packages", daemon=True).start()


def _named(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
