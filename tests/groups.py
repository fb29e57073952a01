"""Group the files of the quick suite for pytest-xdist by the servers that they share.

A group runs in one process, one file after the other. Files that use the same costly fixture are in
one group: each further process would start that server again. The other parts of the suite run
longer than a server takes to start, so they are distributed by file.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

#: Suites whose files all share servers.
_WHOLE = {"tests/faults", "tests/integration", "tests/attacks"}
#: Files of `acceptance` that share another server than its common one, and the group's name.
_SHARED = {
    "test_agent_run_servers.py": "tests/acceptance/keys",
    "test_agent_run_users.py": "tests/attacks",
    "test_attacks.py": "tests/attacks",
    "test_auth.py": "tests/attacks",
    "test_cancel_guide.py": "tests/acceptance/newcomers",
    "test_cancel_leftovers.py": "tests/acceptance/patient",
    "test_docs_blocks.py": "tests/acceptance/newcomers",
    "test_keys.py": "tests/acceptance/keys",
    "test_watching.py": "tests/acceptance/patient",
    "test_webhooks.py": "tests/acceptance/patient",
}
#: Files of `acceptance` that do not use its common server.
_SEPARATE = {
    "test_large_states.py",
    "test_limits.py",
    "test_loopback.py",
    "test_middleware.py",
    "test_project_commands.py",
    "test_project_routes.py",
    "test_projects.py",
}
#: The groups that take longest. They start first, so that none of them is left at the end.
_LONGEST = [
    "tests/faults",
    "tests/acceptance/m-z",
    "tests/acceptance/a-l",
    "tests/attacks",
    "tests/integration",
    "tests/acceptance/patient",
    "tests/acceptance/keys",
    "tests/acceptance/projects/test_project_commands.py",
    "tests/acceptance/projects/test_projects.py",
]


class ByServers(LoadScopeScheduling):
    """Distribute groups of files that share servers."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])


def group_of(file: str) -> str:
    """Return the name of the group of a test file, given by its path below the project."""
    path = PurePosixPath(file)
    suite = "/".join(path.parts[:2])
    if suite in _WHOLE:
        return suite
    if suite != "tests/acceptance" or path.name in _SEPARATE:
        return file
    if path.name in _SHARED:
        return _SHARED[path.name]
    # Two halves use the common server. More would distribute more evenly, but cost a start each.
    return f"{suite}/a-l" if path.name < "test_m" else f"{suite}/m-z"


def order_of(file: str) -> int:
    """Return the place of a test file's group: the longest ones, acceptance, and the rest."""
    group = group_of(file)
    if group in _LONGEST:
        return _LONGEST.index(group)
    return len(_LONGEST) + (not group.startswith("tests/acceptance"))
