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
    MethodWrapperType,
    ModuleType,
)
from typing import Any

#: Packages of the standard library with callbacks that event loops and futures add themselves.
_OF_LOOPS = ("asyncio", "_asyncio", "concurrent")
#: Libraries whose callables may call anything, as those of the rest of the standard library.
_CALL_ANYTHING = ("greenlet",)


class ProjectCode:
    """The code of a project, by its files."""

    def __init__(self, is_file: Callable[[str], bool]) -> None:
        """`is_file` returns whether a file has code of the project. It is called once for each
        file: a host looks at every callback on its event loop."""
        self._is_file = functools.cache(is_file)

    def has(self, called: Any) -> bool:
        """Return whether a function, method, class, coroutine, generator or object with `__call__`
        or `__await__` is the project's, also when a library's decorator wraps it."""
        function = called.__func__ if type(called) is MethodType else called
        if type(function) is FunctionType and not function.__dict__:  # the usual case, fast
            return self._is_file(function.__code__.co_filename)
        if isinstance(called, BuiltinFunctionType):
            return False
        if isinstance(called, type):
            return self._has_module(called.__module__)
        code = _code_of(called)
        return code is not None and self._is_file(code.co_filename)

    def has_code(self, code: CodeType) -> bool:
        """Return whether compiled code is the project's."""
        return self._is_file(code.co_filename)

    def is_librarys(self, called: Any) -> bool:
        """Return whether a callable is one of asyncio or of an installed library. Those of the rest
        of the standard library may call anything: `Thread.start`, `ExitStack.close`, `Popen`."""
        if isinstance(called, BuiltinFunctionType | MethodWrapperType):
            of = called.__self__
            called = called if of is None or isinstance(of, ModuleType) else type(of)
        function = called.__func__ if type(called) is MethodType else called
        module = object.__getattribute__(function, "__module__")
        if not isinstance(module, str):
            return False
        package = module.partition(".")[0]
        if _is_standard(package) or package in _CALL_ANYTHING:
            return package in _OF_LOOPS
        return not self._has_module(module)

    def _has_module(self, name: str) -> bool:
        """Return whether a module is the project's. One that is not known by its name is."""
        if _is_standard(name.partition(".")[0]):
            return False
        module = sys.modules.get(name)
        return module is None or self._is_file(getattr(module, "__file__", None) or "")

    def has_methods_of(self, thing: object) -> bool:
        """Return whether one of the object's methods is the project's."""
        names = (name for name in dir(type(thing)) if not name.startswith("__"))
        return any(self.has(getattr(type(thing), name, None)) for name in names)

    def restore_methods(self, thing: object) -> None:
        """Remove functions of the project that are in the place of an object's methods."""
        for name, value in list(getattr(thing, "__dict__", {}).items()):
            if callable(getattr(type(thing), name, None)) and self.has(value):
                delattr(thing, name)

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


def _code_of(called: Any) -> CodeType | None:
    """Return the code of a coroutine or generator, of an awaitable's `__await__`, or of a callable
    within partials and decorators."""
    if isinstance(called, CoroutineType):
        return called.cr_code
    if isinstance(called, GeneratorType):
        return called.gi_code
    if not callable(called):
        return getattr(getattr(type(called), "__await__", None), "__code__", None)
    function = inspect.unwrap(getattr(unwrapped(called), "__func__", unwrapped(called)))
    if callable(function) and not hasattr(function, "__code__"):
        function = type(function).__call__
    return getattr(function, "__code__", None)


def _is_standard(package: str) -> bool:
    return package in sys.stdlib_module_names


def unwrapped(called: Any) -> Any:
    """Return what a `functools.partial` calls."""
    while isinstance(called, functools.partial):
        called = called.func
    return called
