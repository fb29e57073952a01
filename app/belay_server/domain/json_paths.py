"""Extract parts of a thread by paths like `values.messages[-1].content`."""

from __future__ import annotations

import re
from typing import Any

_ROOTS = ("config", "interrupts", "metadata", "values")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?[0-9]{1,9})\]", re.ASCII)


def check_path(path: str) -> None:
    """Raise ValueError if the text is not a valid path."""
    root = re.match(r"[a-z]*", path)
    if root is None or root.group() not in _ROOTS:
        raise ValueError(f"{path!r} must start with one of {', '.join(_ROOTS)}")
    rest = path[root.end() :]
    if _STEP.sub("", rest):
        raise ValueError(f"{path!r} is not a path like values.messages[-1].content")


def extract(document: dict[str, Any], path: str) -> Any:
    """Return the value at a path. Return None if there is none."""
    root = re.split(r"[.\[]", path, maxsplit=1)[0]
    found: Any = document.get(root)
    for key, index in _STEP.findall(path[len(root) :]):
        found = _step(found, key, index)
    return found


def _step(value: Any, key: str, index: str) -> Any:
    if key:
        return value.get(key) if isinstance(value, dict) else None
    at = int(index)
    within = isinstance(value, list) and -len(value) <= at < len(value)
    return value[at] if within else None
