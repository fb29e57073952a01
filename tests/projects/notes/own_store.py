"""A store of the project's own: LangGraph's Postgres store, in another database than Belay's."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from langgraph.store.postgres.aio import AsyncPostgresStore


@asynccontextmanager
async def open_store() -> AsyncIterator[AsyncPostgresStore]:
    async with AsyncPostgresStore.from_conn_string(os.environ["NOTES_URL"]) as store:
        async with store._cursor() as cursor:  # every process opens it
            await cursor.execute("SELECT pg_advisory_lock(1)")
        await store.setup()
        async with store._cursor() as cursor:
            await cursor.execute("SELECT pg_advisory_unlock(1)")
        yield store
