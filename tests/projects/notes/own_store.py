"""A store of the project's own: LangGraph's Postgres store, in another database than Belay's."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from langgraph.store.postgres.aio import AsyncPostgresStore


class NotesStore(AsyncPostgresStore):
    """Calls for the key `hangs` are not answered, and those for `blocks` occupy the event loop."""

    async def abatch(self, ops: Iterable[Any]) -> list[Any]:
        ops = list(ops)
        keys = {getattr(op, "key", None) for op in ops}
        if "hangs" in keys:
            await asyncio.sleep(3600)
        if "blocks" in keys:
            time.sleep(3600)
        return await super().abatch(ops)


@asynccontextmanager
async def open_store() -> AsyncIterator[NotesStore]:
    async with NotesStore.from_conn_string(os.environ["NOTES_URL"]) as store:
        async with store._cursor() as cursor:  # every process opens it
            await cursor.execute("SELECT pg_advisory_lock(1)")
        await store.setup()
        async with store._cursor() as cursor:
            await cursor.execute("SELECT pg_advisory_unlock(1)")
        yield store
