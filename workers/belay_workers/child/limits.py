"""Undo what a node does to the limits of its process, in which the next run may be another's."""

from __future__ import annotations

import resource
import sys

_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})


class NodeLimits:
    """The limits of a child before any node has run."""

    def __init__(self) -> None:
        self._recursion = sys.getrecursionlimit()
        self._resources = {limit: resource.getrlimit(limit) for limit in _LIMITS}

    def restore(self) -> bool:
        """Restore all limits. Return False if that is not possible: a process without privileges
        cannot raise a limit whose maximum it has lowered."""
        sys.setrecursionlimit(self._recursion)
        try:
            for limit, values in self._resources.items():
                if resource.getrlimit(limit) != values:
                    resource.setrlimit(limit, values)
        except (OSError, ValueError):
            return False
        return True
