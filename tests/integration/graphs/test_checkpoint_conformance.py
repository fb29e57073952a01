"""Run LangChain's conformance suite for checkpointers on Belay's savers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.memory import InMemorySaver

from belay_server.db.postgres.connection import connect
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.graphs.checkpoints.base_saver import FormatSaver
from belay_server.graphs.checkpoints.own_checkpointer import OwnApiCheckpointer, OwnCheckpointer
from belay_server.graphs.checkpoints.run_saver import RunSaver
from belay_server.graphs.checkpoints.thread_saver import ThreadSaver


class SynchronousSaver(InMemorySaver):
    """A checkpointer without asynchronous methods."""

    aget_tuple = BaseCheckpointSaver.aget_tuple
    alist = BaseCheckpointSaver.alist
    aput = BaseCheckpointSaver.aput
    aput_writes = BaseCheckpointSaver.aput_writes
    adelete_thread = BaseCheckpointSaver.adelete_thread


@contextmanager
def open_synchronous() -> Iterator[SynchronousSaver]:
    yield SynchronousSaver()


class AsyncThreadSaver(ThreadSaver):
    """The API's saver, whose methods are synchronous, as the suite calls it."""

    async def aget_tuple(self, config: Any) -> Any:
        return self.get_tuple(config)

    async def alist(self, config: Any, **options: Any) -> Any:
        for found in self.list(config, **options):
            yield found

    async def aput(self, *args: Any) -> Any:
        return self.put(*args)

    async def aput_writes(self, *args: Any, **options: Any) -> None:
        self.put_writes(*args, **options)

    async def adelete_thread(self, thread_id: str) -> None:
        self.delete_thread(thread_id)


def report_on(saver: FormatSaver) -> Any:
    @checkpointer_test(name=type(saver).__name__)
    async def checkpointer():
        yield saver

    return asyncio.run(validate(checkpointer))


#: The `run_id` in a checkpoint's metadata is Belay's own: rollback deletes checkpoints by it. So
#: the savers do not take one from the caller, which these check.
OF_THE_RUN_ID = {"test_put_preserves_run_id", "test_list_metadata_custom_keys"}


def assert_conforms(report: Any) -> None:
    base = ("put", "put_writes", "get_tuple", "list", "delete_thread")
    results = {name: report.results[name] for name in base}
    failures = [failure for result in results.values() for failure in result.failures]
    assert {failure.partition(":")[0] for failure in failures} <= OF_THE_RUN_ID, failures
    assert all("run_id" in failure or "run-abc" in failure for failure in failures)
    assert sum(result.tests_passed for result in results.values()) > 40


KEYS = pytest.mark.parametrize("aes_key", [None, b"0123456789abcdef"], ids=["plain", "encrypted"])

#: What `checkpointer.path` may load.
CHECKPOINTERS = pytest.mark.parametrize(
    "checkpointer", [None, InMemorySaver, open_synchronous], ids=["ours", "theirs", "synchronous"]
)


@KEYS
@CHECKPOINTERS
def test_the_saver_of_the_api_conforms(database_url, aes_key, checkpointer):
    with connect(database_url) as conn:
        own = None if checkpointer is None else OwnApiCheckpointer(checkpointer)
        saver = AsyncThreadSaver(conn, aes_key=aes_key, checkpointer=own)
        assert_conforms(report_on(saver))


@KEYS
@CHECKPOINTERS
@pytest.mark.parametrize("behind", [False, True])
def test_the_saver_of_runs_conforms(rows, database_url, behind, aes_key, checkpointer):
    claimed = rows.running()
    with connect(database_url) as conn, ThreadPoolExecutor(1) as pool:
        connection = ReconnectingConnection(lambda: conn)
        saver = RunSaver(
            connection,
            claimed.claim,
            pool,
            lambda: False,
            behind=behind,
            aes_key=aes_key,
            checkpointer=None if checkpointer is None else OwnCheckpointer(checkpointer),
        )
        assert_conforms(report_on(saver))
