"""Group the files of the quick suite for pytest-xdist by the servers that they share.

A group runs in one process, one file after the other. Files that use the same costly fixture are in
one group: each further process would start that server again. The other parts of the suite run
longer than a server takes to start, so they are distributed by file.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from zlib import crc32

from xdist.scheduler import LoadScopeScheduling

#: Folders whose files all share servers.
_WHOLE = {"tests/faults", "tests/integration", "tests/attacks"}
#: Files of `acceptance` that do not use its common server.
_SEPARATE = {
    "test_agent_run_servers.py",
    "test_attacks.py",
    "test_auth.py",
    "test_cancel_guide.py",
    "test_docs_blocks.py",
    "test_keys.py",
    "test_large_states.py",
    "test_limits.py",
    "test_loopback.py",
    "test_middleware.py",
    "test_project_commands.py",
    "test_project_routes.py",
    "test_projects.py",
    "test_watching.py",
}
#: How many groups use the common server. More distribute more evenly, but cost a start each.
_COMMON = 3


class ByServers(LoadScopeScheduling):
    """Distribute groups of files that share servers."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])


def group_of(file: str) -> str:
    """Return the name of the group of a test file, given by its path below the project."""
    path = PurePosixPath(file)
    folder = str(path.parent)
    if folder in _WHOLE:
        return folder
    if folder == "tests/acceptance" and path.name not in _SEPARATE:
        return f"{folder}/{crc32(path.name.encode()) % _COMMON}"
    return file
