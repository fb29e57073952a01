"""The functions of Python that start processes and threads, so that hosts can replace them.

A project may import such a function by name (`from os import fork`). Replacing it in its module has
no effect on that name. So the worker's parent process puts a `StartFunction` in its place before it
loads the project, and a host changes what that calls.
"""

from __future__ import annotations

import _posixsubprocess
import _thread
import os
import posix
import subprocess
from collections.abc import Callable
from functools import update_wrapper
from types import ModuleType
from typing import Any

#: The functions, with the modules that have them. They are the same object in all of these.
_FUNCTIONS: dict[str, tuple[ModuleType, ...]] = {
    "fork": (os, posix),
    "forkpty": (os, posix),
    "posix_spawn": (os, posix),
    "posix_spawnp": (os, posix),
    "system": (os, posix),
    "fork_exec": (_posixsubprocess,),
    "_fork_exec": (subprocess,),
    "start_new_thread": (_thread,),
    "start_new": (_thread,),
}


class StartFunction:
    """A function that starts a process or a thread, by calling one that can be replaced."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> str:
        """Pickle it as the function, by its name."""
        return str(self.__name__)  # type: ignore[attr-defined]

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Call what `wrapper` returns for the present function from now on."""
        self._function = wrapper(self._function)


def make_replaceable() -> dict[str, StartFunction]:
    """Replace each function by a `StartFunction`. Return these by name.

    A further call in the same process replaces nothing.
    """
    made: dict[int, StartFunction] = {}
    found: dict[str, StartFunction] = {}
    for name, modules in _FUNCTIONS.items():
        for module in modules:
            function = getattr(module, name)
            if not isinstance(function, StartFunction):
                function = made.setdefault(id(function), StartFunction(function))
                setattr(module, name, function)
            found[name] = function
    return found
