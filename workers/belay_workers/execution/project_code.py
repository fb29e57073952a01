"""Distinguish callbacks and hooks of the project's own code from those of libraries."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import (
    BuiltinFunctionType,
    CodeType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    MethodType,
)
from typing import Any


class ProjectCode:
    """The code of a project, by its files."""

    def __init__(self, is_file: Callable[[str], bool]) -> None:
        """`is_file` returns whether a file has code of the project. It is called once for each
        file: a host looks at every callback on its event loop."""
        self._is_file = functools.cache(is_file)

    def has(self, called: Any) -> bool:
        """Return whether a function, method, coroutine, generator or object with `__call__` is the
        project's, also when a library's decorator wraps it."""
        function = called.__func__ if type(called) is MethodType else called
        if type(function) is FunctionType and not function.__dict__:  # the usual case, fast
            return self._is_file(function.__code__.co_filename)
        if isinstance(called, CoroutineType):
            return self._is_file(called.cr_code.co_filename)
        if isinstance(called, GeneratorType):
            return self._is_file(called.gi_code.co_filename)
        if not callable(called) or isinstance(called, BuiltinFunctionType):
            return False
        function = inspect.unwrap(getattr(unwrapped(called), "__func__", unwrapped(called)))
        if callable(function) and not hasattr(function, "__code__"):
            function = type(function).__call__
        code = getattr(function, "__code__", None)
        return code is not None and self._is_file(code.co_filename)

    def has_code(self, code: CodeType) -> bool:
        """Return whether compiled code is the project's."""
        return self._is_file(code.co_filename)

    def has_methods_of(self, thing: object) -> bool:
        """Return whether one of the object's methods is the project's."""
        names = (name for name in dir(type(thing)) if not name.startswith("__"))
        return any(self.has(getattr(type(thing), name, None)) for name in names)

    def remove_hooks(self) -> None:
        """Remove the profile and trace functions that the project has set on this thread, and those
        for threads to come. Those of libraries, debuggers and coverage among them, stay."""
        if self.has(sys.getprofile()):
            sys.setprofile(None)
        if self.has(sys.gettrace()):
            sys.settrace(None)
        if self.has(threading.getprofile()):
            threading.setprofile(None)
        if self.has(threading.gettrace()):
            threading.settrace(None)


def unwrapped(called: Any) -> Any:
    """Return what a `functools.partial` calls."""
    while isinstance(called, functools.partial):
        called = called.func
    return called
