"""Functions of Python that concern the whole process, so that hosts can replace them.

They start processes and threads, set timers, return the tasks of all runs, or cancel what they wait
for. A project may import such a function by name (`from os import fork`). Replacing it in its
module has no effect on that name. So the worker's parent process puts a `ReplaceableFunction` in
its place before it loads the project, and a host changes what that calls.
"""

from __future__ import annotations

import _posixsubprocess
import _signal
import _thread
import asyncio
import faulthandler
import os
import posix
import signal
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
    "setitimer": (signal, _signal),
    "alarm": (signal, _signal),
    "dump_traceback_later": (faulthandler,),
    "cancel_dump_traceback_later": (faulthandler,),
    "register": (faulthandler,),
    "all_tasks": (asyncio, asyncio.tasks),
    "gather": (asyncio, asyncio.tasks),
    "wait_for": (asyncio, asyncio.tasks),
}


class ReplaceableFunction:
    """A function that calls one that can be replaced."""

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


def make_replaceable() -> dict[str, ReplaceableFunction]:
    """Replace each function by a `ReplaceableFunction`. Return these by name.

    A further call in the same process replaces nothing.
    """
    made: dict[int, ReplaceableFunction] = {}
    found: dict[str, ReplaceableFunction] = {}
    for name, modules in _FUNCTIONS.items():
        for module in modules:
            function = getattr(module, name)
            if not isinstance(function, ReplaceableFunction):
                function = made.setdefault(id(function), ReplaceableFunction(function))
                setattr(module, name, function)
            found[name] = function
    return found
