"""The authenticated user, as a project's code gets it: in `auth` handlers, factories and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ProjectUser(dict[str, Any]):
    """A `langgraph_sdk.auth.types.BaseUser`, whose fields are attributes and items.

    The fields are those that `authenticate` returned, of which `identity` is required, and those
    that every user has.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self["identity"] = str(fields["identity"])
        self["display_name"] = str(fields.get("display_name") or self["identity"])
        self["is_authenticated"] = bool(fields.get("is_authenticated", True))
        self["permissions"] = list(fields.get("permissions") or [])

    @property
    def identity(self) -> str:
        return str(self["identity"])

    @property
    def display_name(self) -> str:
        return str(self["display_name"])

    @property
    def is_authenticated(self) -> bool:
        return bool(self["is_authenticated"])

    @property
    def permissions(self) -> Sequence[str]:
        return list(self["permissions"])

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        return dict(self)
