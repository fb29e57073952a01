"""Call the functions of a project that make its graphs.

A factory takes nothing, the run's config, a `langgraph_sdk.runtime.ServerRuntime`, or both, in any
order. A parameter's annotation says which it is; one without an annotation is the config, or the
runtime if that is its name.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.store.base import BaseStore
from langgraph_sdk import runtime as sdk

from belay_server.graphs.contexts import fitted, is_made
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.project.user import ProjectUser

_RUNTIME = "runtime"
_CONFIG = "config"


@dataclass(frozen=True, slots=True)
class GraphUse:
    """What a graph is opened for. A factory may make a different graph for each use."""

    access: sdk.AccessContext
    config: dict[str, Any]
    #: Returns the project's store. Called only for a factory that takes a runtime.
    store: Callable[[], BaseStore]
    #: The authenticated user; None without the project's own authentication.
    user: Mapping[str, Any] | None = None
    #: The context of the run that is executed.
    context: Any = None


class GraphFactory:
    """A project's function that makes a graph, and how it is called."""

    def __init__(self, function: Callable[..., Any], who: str) -> None:
        """Raise ProjectError, which calls the factory `who`, if it needs another parameter."""
        self._function = function
        self._takes: list[tuple[inspect.Parameter, str]] = []
        self._context_type: Any = None
        annotations = _annotations_of(function)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ProjectError(f"{who}: cannot be called to make a graph: {error}") from error
        for parameter in parameters:
            annotation = annotations.get(parameter.name, parameter.annotation)
            role = self._role(parameter, annotation)
            if role is not None:
                self._takes.append((parameter, role))
                if role == _RUNTIME:
                    self._context_type = next(iter(typing.get_args(annotation)), None)
            elif parameter.default is parameter.empty and not _is_variadic(parameter):
                raise ProjectError(
                    f"{who}: its factory must take a config, a ServerRuntime, or both, not "
                    f"'{parameter.name}'"
                )

    def _role(self, parameter: inspect.Parameter, annotation: Any) -> str | None:
        """Return what is passed as this parameter. None: its default, if it has one."""
        taken = [role for _, role in self._takes]
        if _is_variadic(parameter):
            return None
        if _is_runtime(annotation) or (
            annotation is parameter.empty and parameter.name == _RUNTIME
        ):
            return None if _RUNTIME in taken else _RUNTIME
        return None if _CONFIG in taken else _CONFIG

    def __call__(self, use: GraphUse) -> Any:
        """Return what the factory returns: a graph, an awaitable or a context manager of one."""
        positional, named = [], {}
        for parameter, role in self._takes:
            value = use.config if role == _CONFIG else self._runtime(use)
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(value)
            else:
                named[parameter.name] = value
        return self._function(*positional, **named)

    def _runtime(self, use: GraphUse) -> sdk._ServerRuntimeBase[Any]:
        user = None if use.user is None else ProjectUser(use.user)
        given: dict[str, Any] = {"access_context": use.access, "user": user, "store": use.store()}
        if use.access != "threads.create_run":
            return sdk._ReadRuntime(**given)
        return sdk._ExecutionRuntime(**given, context=_typed(use.context, self._context_type))


def _annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function. Where one cannot be evaluated, because it is imported
    for type checkers alone, all are as they are written."""
    called = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(called)
    except (AttributeError, ImportError, NameError, SyntaxError, TypeError, ValueError):
        return dict(getattr(called, "__annotations__", {}))


def _is_runtime(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return "ServerRuntime" in annotation
    origin = typing.get_origin(annotation)
    if annotation is sdk.ServerRuntime or origin is sdk.ServerRuntime:
        return True
    if inspect.isclass(origin or annotation):
        return issubclass(origin or annotation, sdk._ServerRuntimeBase)
    return any(_is_runtime(one) for one in typing.get_args(annotation))


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _typed(context: Any, wanted: Any) -> Any:
    """Return a run's context as the type that the factory's annotation names."""
    if isinstance(context, dict) and is_made(wanted):
        return wanted(**(fitted(context, wanted) or {}))
    return context or None
