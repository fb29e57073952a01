"""Which headers of a request a project wants to see in its graphs. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

#: Of these a pattern with a star does not speak; they go in only by their own names.
_SECRET = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})


@dataclass(frozen=True, slots=True)
class HeaderPatterns:
    """Names of headers, `*` for any part of one. What is excluded stays out in any case."""

    includes: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: Any) -> HeaderPatterns:
        """From `{"includes": [...], "excludes": [...]}`. Raises ValueError."""
        if not isinstance(document, dict):
            raise ValueError("must be an object")
        return cls(_patterns(document, "includes"), _patterns(document, "excludes"))

    def pick(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers that are wanted, under their names in small letters."""
        if not self.includes:
            return {}
        named = {name.lower(): value for name, value in headers.items()}
        return {name: value for name, value in named.items() if self._wants(name)}

    def _wants(self, name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in self.excludes):
            return False
        if name in _SECRET:
            return name in self.includes
        return any(fnmatchcase(name, pattern) for pattern in self.includes)


def _patterns(document: dict[str, Any], key: str) -> tuple[str, ...]:
    names = document.get(key) or document.get(key.removesuffix("s")) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"must have a list of header names in '{key}'")
    return tuple(name.lower() for name in names)
