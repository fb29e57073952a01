"""Authorize requests: each view declares a resource and an action, which the project's handlers
permit or refuse.

A handler's filter restricts what the request's SQL statements find (`belay_server.domain.access`).
Until the view is authorized, they find nothing. An application does not start with a view that
declares nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from functools import wraps
from typing import Any, TypeVar, cast

from flask import request
from flask.typing import ResponseReturnValue

from belay_server.api.context import OWN_PARTS, context, parts
from belay_server.api.security.authentication import caller, public
from belay_server.db.postgres.pool import Database
from belay_server.domain.access import EVERYTHING, NO_ACCESS, NOTHING, Filter
from belay_server.domain.errors import Forbidden
from belay_server.domain.ids import parse_uuid

__all__ = ["authorize", "authorized", "authorizes_itself", "cancels", "is_confined", "public"]

_View = TypeVar("_View", bound=Callable[..., ResponseReturnValue])
#: The fields of a cron's body that its runs are created from. A handler gets them as `payload`.
_PAYLOAD = ("input", "config", "context", "interrupt_before", "interrupt_after", "webhook")
_WITH_ACCESS = ("threads", "assistants", "crons")


def use_database(database: Database) -> None:
    """Use this database for the rest of the current request."""
    who = caller()
    user = None if who is None else who.user
    request.environ[OWN_PARTS] = dataclasses.replace(parts(), database=database, user=user)


def confine_request() -> None:
    """Restrict the current request to the resources that it is authorized for, at first none."""
    use_database(parts().database.confined(NO_ACCESS))


def is_confined() -> bool:
    """Return whether the current request's access is restricted."""
    return parts().database.access is not EVERYTHING


def cancels(view: _View) -> _View:
    """Mark a view that cancels runs. It has its own database connections and limits, so that other
    requests cannot block it."""
    view.is_cancel = True  # type: ignore[attr-defined]
    return view


def authorize(resource: str, action: str, value: MutableMapping[str, Any]) -> None:
    """Call the project's authorization handler for an action. The handler may change `value`.

    Without such handlers, everything is permitted. Raises Forbidden, Refused, Unavailable.
    """
    authorization, who = context().authorization, caller()
    if not is_confined() or authorization is None or who is None:
        return
    filter_ = authorization.decide(who, resource, action, value)
    if resource in _WITH_ACCESS:
        _add_access(resource, filter_)
    elif filter_ is not None:
        raise Forbidden(f"A filter cannot restrict {resource}: change value['namespace'] instead.")


def _add_access(resource: str, filter_: Filter | None) -> None:
    """Add a filter to the request's access. A resource that is authorized twice must match both
    filters."""
    database = parts().database
    before: Filter | None = getattr(database.access, resource)
    if before is NOTHING or before is None or before == filter_:
        both = filter_
    else:
        both = before if filter_ is None else {"$and": [before, filter_]}
    database.access = dataclasses.replace(database.access, **{resource: both})


def authorized(
    resource: str, action: str, *, changes_body: bool = True
) -> Callable[[_View], _View]:
    """Return a decorator that authorizes a view for one action on one resource. The handler gets
    the view's validated arguments: ids, query and body. With `changes_body`, the view gets the body
    as the handler has changed it."""

    def decorate(view: _View) -> _View:
        @wraps(view)
        def guarded(*taken: Any, **ids: str) -> ResponseReturnValue:
            if is_confined():
                documents = [part for part in taken if isinstance(part, dict)]
                if not changes_body:
                    documents = copy.deepcopy(documents)
                value: dict[str, Any] = {}
                for document in documents:
                    value |= document
                named = {name: _as_id(text) for name, text in ids.items()}
                value |= named
                if resource == "crons":
                    value["payload"] = {k: v for k, v in value.items() if k in _PAYLOAD}
                authorize(resource, action, value)
                if documents:
                    others = {*named, "payload", *(k for d in documents[:-1] for k in d)}
                    changed = {k: v for k, v in value.items() if k not in others}
                    documents[-1].update(changed | (value.get("payload") or {}))
            return view(*taken, **ids)

        guarded.is_authorized = True  # type: ignore[attr-defined]
        return cast(_View, guarded)

    return decorate


def authorizes_itself(view: _View) -> _View:
    """Mark a view that calls `authorize` itself, because its action depends on its arguments."""
    view.is_authorized = True  # type: ignore[attr-defined]
    return view


def _as_id(text: str) -> Any:
    try:
        return parse_uuid(text)
    except ValueError:
        return text
