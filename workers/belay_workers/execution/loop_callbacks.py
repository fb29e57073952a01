"""Find code of the project in the callbacks that wait on an event loop.

A callback may call the project's code indirectly: a timer that sets the result of a future, for
which a function of the project waits, or one that consumes a `map` of it. Such wrappers of the
standard library are looked through. Objects of other libraries are not.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextvars import Context
from types import BuiltinMethodType, CellType, FunctionType, MethodType
from typing import Any

from belay_workers.execution.project_code import ProjectCode, unwrapped

#: asyncio's two implementations of futures and of tasks.
_FUTURES = (asyncio.Future, asyncio.futures._PyFuture)  # type: ignore[attr-defined]
TASKS = (asyncio.Task, asyncio.tasks._PyTask)  # type: ignore[attr-defined]
_BOUND = (MethodType, BuiltinMethodType)
#: The most objects that are looked at for one callback.
_MOST = 200


def is_of_project(project: ProjectCode, handle: asyncio.Handle, *, is_io: bool = False) -> bool:
    """Return whether a callback that waits to be called is the project's own code, or calls it."""
    return next(reached(project, handle, is_io=is_io), None) is not None


def reached(project: ProjectCode, handle: asyncio.Handle, *, is_io: bool = False) -> Iterator[Any]:
    """Yield the functions and methods of the project that a callback calls, and transports' methods
    that call a protocol of the project; then what a timer calls, or with `is_io` a reader or
    writer, if it is not a library's."""
    if handle.cancelled():
        return
    yield from _reached(project, handle)
    if (is_io or isinstance(handle, asyncio.TimerHandle)) and not project.is_librarys(
        first := callback_of(handle)
    ):
        yield first


def _reached(project: ProjectCode, handle: asyncio.Handle) -> Iterator[Any]:
    called: list[Any] = [handle._callback, *(handle._args or ())]  # type: ignore[attr-defined]
    if isinstance(called[0], operator.methodcaller):
        yield from filter(project.has_methods_of, called[1:])
    #: What was looked at, by identity: the callbacks of `asyncio.shield` refer to each other.
    seen: dict[int, Any] = {}
    while called and len(seen) < _MOST:
        one = called.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        try:
            if project.has(one) or _has_protocol(project, one):
                yield one
            elif (look := _look_into(type(one))) is not None:  # type: ignore[arg-type]
                called += look(one)
        except Exception:  # noqa: BLE001, S112  (an attribute of an object of the project's)
            continue


def callback_of(handle: asyncio.Handle) -> Any:
    """Return the function or method that a handle of the event loop calls, also by a partial or in
    a context of its own."""
    called = unwrapped(handle._callback)  # type: ignore[attr-defined]
    arguments = handle._args
    is_in_context = isinstance(owner_of(called), Context) and arguments
    return unwrapped(arguments[0]) if is_in_context else called


def owner_of(callback: Any) -> Any:
    """Return the object of a method, None for other callbacks."""
    return callback.__self__ if isinstance(callback, _BOUND) else None


def identity(callback: Any) -> tuple[int, int]:
    """Return the object of a method, and the function. Methods are made anew for each call of
    `add_reader` and the like, also when a transport pauses and resumes."""
    of = owner_of(callback)
    if isinstance(of, asyncio.BaseTransport):
        return id(of), 0
    return id(of), id(callback if of is None else getattr(callback, "__func__", callback))


def _closure(function: Any) -> Iterable[Any]:
    """Return what a function of asyncio or `concurrent.futures` has in its closure."""
    is_wrapper = function.__module__.partition(".")[0] in ("asyncio", "concurrent")
    return function.__closure__ or () if is_wrapper else ()


#: Types of the standard library that wrap what is called, and what they wrap. A task wraps nothing:
#: it is known itself.
_WRAPPERS: tuple[tuple[Any, Callable[[Any], Iterable[Any]]], ...] = (
    (TASKS, lambda _: ()),
    (_BOUND, lambda method: (method.__self__,)),
    (_FUTURES, lambda future: [] if future.done() else [of for of, _ in future._callbacks or ()]),
    (futures.Future, lambda future: [] if future.done() else list(future._done_callbacks)),
    (asyncio.Handle, lambda handle: (handle._callback, *(handle._args or ()))),
    (functools.partial, lambda call: (call.func, *call.args, *call.keywords.values())),
    ((map, filter), gc.get_referents),
    (list, lambda values: list.__getitem__(values, slice(_MOST))),
    (tuple, lambda values: tuple.__getitem__(values, slice(_MOST))),
    (CellType, lambda cell: (cell.cell_contents,)),
    (FunctionType, _closure),
)


@functools.cache
def _look_into(kind: Any) -> Callable[[Any], Iterable[Any]] | None:
    """Return the function that returns what objects of a type wrap, None if they wrap nothing."""
    return next((look for kinds, look in _WRAPPERS if issubclass(kind, kinds)), None)


def _has_protocol(project: ProjectCode, callback: Any) -> bool:
    """Return whether a callback is a transport's that calls a protocol of the project."""
    if not isinstance(callback, _BOUND) or not isinstance(
        transport := callback.__self__, asyncio.BaseTransport
    ):
        return False
    protocol = getattr(transport, "_protocol", None)
    return protocol is not None and (
        project.has_methods_of(protocol)
        or project.has_methods_of(getattr(protocol, "_app_protocol", None))
    )
