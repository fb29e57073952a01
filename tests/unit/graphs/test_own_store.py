"""Test the store that a project brings itself: how it is made, and what a run may do with it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

import pytest
from langgraph.store.memory import InMemoryStore

from belay_server.domain.errors import Unavailable
from belay_server.graphs.own_store import OwnApiStore, OwnRunStore, OwnStore, load_own_store
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.project.store_section import StoreConfig


async def in_coroutine():
    return InMemoryStore()


@contextmanager
def in_context():
    yield InMemoryStore()


@asynccontextmanager
async def in_async_context():
    yield InMemoryStore()


@pytest.mark.parametrize(
    "made", [InMemoryStore(), InMemoryStore, in_coroutine, in_context, in_async_context]
)
def test_a_store_is_made_once_in_each_of_its_forms(made):
    store = OwnStore(made)
    store.put(("notes",), "a", {"text": "b"})

    async def read():
        return await store.aget(("notes",), "a")

    assert asyncio.run(read()).value == store.get(("notes",), "a").value == {"text": "b"}


@pytest.mark.parametrize(("made", "kind"), [(dict, "dict"), (lambda: None, "NoneType")])
def test_what_is_no_store_is_reported(made, kind):
    with pytest.raises(TypeError, match=f"no BaseStore but a {kind}"):
        OwnStore(made).get(("notes",), "a")
    with pytest.raises(Unavailable, match="The project's store failed: TypeError"):
        OwnApiStore(made).get(("notes",), "a")


def test_a_store_that_raises_cancelled_error_has_failed():
    """As a client does whose pool is closed meanwhile."""

    class Closed(InMemoryStore):
        async def abatch(self, ops):
            raise asyncio.CancelledError

    with pytest.raises(Unavailable, match="The project's store failed: RuntimeError"):
        OwnApiStore(Closed()).get(("notes",), "a")


def test_a_store_that_could_not_be_opened_is_opened_by_the_next_call():
    tries = []

    def made():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        return InMemoryStore()

    store = OwnStore(made)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            store.get(("notes",), "a")
    assert store.get(("notes",), "a") is None
    assert len(tries) == 3


class SlowStore(InMemoryStore):
    """Its calls wait until they are let through."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()

    async def abatch(self, ops):
        while ops and not self.go_on.is_set():
            await asyncio.sleep(0.001)
        return await super().abatch(ops)


def test_a_call_of_a_stopped_node_is_done_and_waited_for():
    slow = SlowStore()
    of_process = OwnRunStore(slow)
    place = of_process.of_place()

    async def node(store):
        await store.aput(("notes",), "a", {"text": "b"})

    async def stopped():
        with place.of_run(lambda: True) as store:
            task = asyncio.create_task(node(store))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return store

    store = asyncio.run(stopped())
    with pytest.raises(RuntimeError, match="has ended"):
        store.put(("notes",), "b", {})
    assert of_process.of_place().settle(60)  # another run does not wait for it
    assert not place.settle(0.02)
    slow.go_on.set()
    assert place.settle(60)
    assert of_process.get(("notes",), "a") is not None


def test_a_call_is_cancelled_once_and_is_done_when_it_has_ended():
    raised = []

    class Stubborn(InMemoryStore):
        async def abatch(self, ops):
            while ops and not go_on.is_set():
                begun.set()
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    raised.append(1)
            if ops:
                raise asyncio.CancelledError
            return []

    begun, go_on = threading.Event(), threading.Event()
    place = OwnRunStore(Stubborn()).of_place()
    assert not place.is_used
    call = place._start([1])
    assert begun.wait(60)
    for _ in range(3):
        place.cancel_calls()
    assert not place.settle(0.02)
    assert place.is_used
    assert raised == [1]
    go_on.set()
    assert place.settle(60)
    with pytest.raises(RuntimeError, match="was cancelled"):
        call.result()


def test_the_target_must_be_a_store_or_a_function(tmp_path):
    (tmp_path / "stores.py").write_text("number = 1")
    project = SimpleNamespace(
        root=tmp_path, dependencies=[], store=StoreConfig(path="./stores.py:number")
    )
    with pytest.raises(ProjectError, match=r"store\.path .*: must be a BaseStore"):
        load_own_store(project)
    project.store = StoreConfig(path="./stores.py:missing")
    with pytest.raises(ProjectError, match=r"store\.path: ./stores\.py has no 'missing'"):
        load_own_store(project)
