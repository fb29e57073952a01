"""Select the request headers that a project's graphs get. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

#: The server's own credentials (`graphs.project.loopback`), which no pattern matches.
_OWN = frozenset({"x-belay-run", "x-belay-server"})
#: A pattern with a star does not match these headers. They are included by full name only, and for
#: the run's own code alone: no response, stream or checkpoint has them.
SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})


@dataclass(frozen=True, slots=True)
class HeaderPatterns:
    """Patterns of header names, where `*` matches any part. `excludes` takes precedence."""

    includes: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: Any) -> HeaderPatterns:
        """Read `{"includes": [...], "excludes": [...]}`. Raises ValueError."""
        if not isinstance(document, dict):
            raise ValueError("must be an object")
        return cls(_patterns(document, "includes"), _patterns(document, "excludes"))

    def pick(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the selected headers by their names in lower case."""
        if not self.includes:
            return {}
        named = {name.lower(): value for name, value in headers.items()}
        return {name: value for name, value in named.items() if self._selects(name)}

    def _selects(self, name: str) -> bool:
        if name in _OWN:
            return False
        if any(fnmatchcase(name, pattern) for pattern in self.excludes):
            return False
        if name in SECRET_HEADERS:
            return name in self.includes
        return any(fnmatchcase(name, pattern) for pattern in self.includes)


def _patterns(document: dict[str, Any], key: str) -> tuple[str, ...]:
    names = document.get(key) or document.get(key.removesuffix("s")) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"must have a list of header names in '{key}'")
    return tuple(name.lower() for name in names)
