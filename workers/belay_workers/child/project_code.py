"""Distinguish callbacks and hooks of the project's own code from those of libraries."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any


class ProjectCode:
    """The code of a project, by its files."""

    def __init__(self, is_file: Callable[[str], bool]) -> None:
        """`is_file` returns whether a file has code of the project."""
        self._is_file = is_file

    def has(self, callback: Any) -> bool:
        """Return whether a function, method or object with `__call__` is the project's."""
        while isinstance(callback, functools.partial):
            callback = callback.func
        function = getattr(callback, "__func__", callback)
        if callable(function) and not hasattr(function, "__code__"):
            function = type(function).__call__
        code = getattr(function, "__code__", None)
        return code is not None and self._is_file(code.co_filename)

    def has_methods_of(self, thing: object) -> bool:
        """Return whether one of the object's methods is the project's."""
        names = (name for name in dir(type(thing)) if not name.startswith("__"))
        return any(self.has(getattr(type(thing), name, None)) for name in names)

    def remove_hooks(self) -> None:
        """Remove the profile and trace functions that the project has set on this thread, and those
        for threads to come. Debuggers and coverage set their own, which stay."""
        if self.has(sys.getprofile()):
            sys.setprofile(None)
        if self.has(sys.gettrace()):
            sys.settrace(None)
        if self.has(threading.getprofile()):
            threading.setprofile(None)
        if self.has(threading.gettrace()):
            threading.settrace(None)
