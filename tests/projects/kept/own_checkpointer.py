"""A checkpointer of the project's own: that of LangGraph for Postgres, in another database."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver


class KeptCheckpoints(AsyncPostgresSaver):
    """It refuses the counts `broken`, and can delete the checkpoints of runs."""

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        if "broken" in (checkpoint["channel_values"].get("counts") or []):
            raise ConnectionError("out of reach")
        return await super().aput(config, checkpoint, metadata, new_versions)

    async def aget_tuple(self, config: Any) -> Any:
        found = await super().aget_tuple(config)
        if found is not None and "unreadable" in found.checkpoint["channel_values"].get(
            "counts", []
        ):
            raise ConnectionError("out of reach")
        return found

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        async with self._cursor() as cursor:
            await cursor.execute(
                "DELETE FROM checkpoints WHERE metadata ->> 'run_id' = ANY (%s)", (list(run_ids),)
            )


@asynccontextmanager
async def open_checkpointer() -> AsyncIterator[KeptCheckpoints]:
    async with KeptCheckpoints.from_conn_string(os.environ["KEPT_URL"]) as saver:
        await asyncio.sleep(0)
        async with saver._cursor() as cursor:  # every process opens it
            await cursor.execute("SELECT pg_advisory_lock(1)")
        await saver.setup()
        async with saver._cursor() as cursor:
            await cursor.execute("SELECT pg_advisory_unlock(1)")
        yield saver
