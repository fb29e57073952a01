"""The configuration of an assistant, read from `configurable`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from langchain_core.runnables import RunnableConfig, ensure_config


@dataclass(kw_only=True)
class IndexConfiguration:
    user_id: str
    index_path: Annotated[str, "The file of the index, which stands for a vector database."]

    @classmethod
    def from_runnable_config(cls, config: RunnableConfig | None = None):
        configurable = ensure_config(config).get("configurable") or {}
        names = {one.name for one in fields(cls) if one.init}
        return cls(**{name: value for name, value in configurable.items() if name in names})


@dataclass(kw_only=True)
class Configuration(IndexConfiguration):
    query_model: str = "stand-in"
    search_limit: int = 2
