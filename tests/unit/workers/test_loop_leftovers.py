"""Test what counts as left on the event loop by a run that was stopped."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import logging
import operator
import os
import socket
import subprocess
import sys
import threading
from unittest.mock import Mock

import pydantic
import pytest

from belay_workers.child.event_loop import RUN, ChildLoop
from belay_workers.child.loop_leftovers import LoopLeftovers
from belay_workers.execution.project_code import ProjectCode
from belay_workers.execution.thread_futures import attribute_callbacks


def _is_this_file(name):
    return name == __file__


@pytest.fixture
def play():
    """A function that runs a scene with leftovers after `begin_run`, in a new event loop."""

    def run(scene, before=None):
        async def main():
            loop = asyncio.get_running_loop()
            leftovers = LoopLeftovers(loop, ProjectCode(_is_this_file))
            if before is not None:
                await before(loop)
            leftovers.begin_run()
            assert not await leftovers.remain()
            return await scene(leftovers, loop)

        return asyncio.run(main())

    return run


async def until_nothing_remains(leftovers):
    async with asyncio.timeout(10):
        while await leftovers.remain():
            await asyncio.sleep(0)


def test_a_task_is_cancelled_once_and_awaited(play):
    cancels = []

    async def task():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancels.append(1)
            await asyncio.sleep(0.2)  # its own cleanup, longer than one turn of the search
            cancels.append("done")

    async def scene(leftovers, loop):
        task_of_run = loop.create_task(task())
        await asyncio.sleep(0)
        assert await leftovers.remain()
        await until_nothing_remains(leftovers)
        assert task_of_run.done()

    play(scene)
    assert cancels == [1, "done"]


def test_a_task_that_the_end_of_another_starts_is_cancelled_too(play):
    started = []

    async def scene(leftovers, loop):
        def again(_):
            if len(started) < 3:
                started.append(loop.create_task(asyncio.sleep(60)))
                started[-1].add_done_callback(again)

        loop.create_task(asyncio.sleep(60)).add_done_callback(again)
        await until_nothing_remains(leftovers)
        assert [task.cancelled() for task in started] == [True] * 3

    play(scene)


def test_tasks_of_earlier_runs_stay_with_those_that_they_start(play):
    """Such as the workers of a pool of connections that an earlier run has opened."""
    wanted = asyncio.Event()
    tasks = []

    async def worker(loop):
        await wanted.wait()
        tasks.append(loop.create_task(asyncio.sleep(60)))
        await asyncio.sleep(60)

    async def scene(leftovers, loop):
        async def earlier():
            leftovers.begin_run()
            tasks.append(loop.create_task(worker(loop)))

        await asyncio.create_task(earlier())
        leftovers.begin_run()
        wanted.set()
        await asyncio.sleep(0)
        assert len(tasks) == 2
        assert not await leftovers.remain()
        of_run = loop.create_task(asyncio.sleep(60))
        await until_nothing_remains(leftovers)
        assert [task.done() for task in (*tasks, of_run)] == [False, False, True]

    play(scene)


async def _beat_for_ever():
    while True:
        await asyncio.sleep(0.01)


async def _generate_for_ever():
    while True:
        await asyncio.sleep(0.01)
        yield


async def _iterate(generator):
    async for _ in generator:
        pass


@pytest.mark.parametrize(
    ("work", "handle"),
    [
        (_beat_for_ever, "await"),
        (_beat_for_ever, "task"),
        (_generate_for_ever, "iterate"),
    ],
)
def test_what_the_run_hands_to_a_task_of_an_earlier_run_remains(play, work, handle):
    """Such as a coroutine in the queue of a pool of workers. A library's code in it does not."""

    async def scene(leftovers, loop):
        handed = asyncio.Queue()
        started = asyncio.Event()

        async def worker():
            while True:
                given = await handed.get()
                started.set()
                if handle == "await":
                    await given
                elif handle == "task":
                    tasks.append(loop.create_task(given))
                else:
                    await _iterate(given)

        async def earlier():
            leftovers.begin_run()
            tasks.append(loop.create_task(worker()))
            await asyncio.sleep(0)

        tasks = []
        await asyncio.create_task(earlier())
        leftovers.begin_run()
        assert not await leftovers.remain()
        await handed.put(work())
        await started.wait()
        await asyncio.sleep(0)
        for _ in range(3):
            assert await leftovers.remain()
        for task in tasks:
            task.cancel()

    play(scene)


def test_a_task_that_a_thread_starts_is_cancelled(play):
    async def scene(leftovers, loop):
        sleep = asyncio.sleep(60)
        futures = []
        thread = threading.Thread(
            target=lambda: futures.append(asyncio.run_coroutine_threadsafe(sleep, loop))
        )
        thread.start()
        thread.join()
        await asyncio.sleep(0)
        await until_nothing_remains(leftovers)
        await asyncio.sleep(0)
        assert futures[0].cancelled()

    play(scene)


def _later(loop, call):
    return loop.call_later(60, call)


def _soon_for_ever(loop, call):
    def again():
        call()
        handles[0] = loop.call_soon(again)

    handles = [loop.call_soon(again)]

    class Chain:
        def cancel(self):
            handles[0].cancel()

    return Chain()


@pytest.mark.parametrize("schedule", [_later, _soon_for_ever])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_callback_of_the_project_remains_until_it_is_cancelled(play, schedule, wrapped):
    async def scene(leftovers, loop):
        call = functools.partial(lambda: None) if wrapped else lambda: None
        handle = schedule(loop, call)
        assert await leftovers.remain()
        assert await leftovers.remain()
        handle.cancel()
        assert not await leftovers.remain()

    play(scene)


def test_callbacks_of_libraries_and_of_earlier_runs_do_not_count(play):
    async def earlier(loop):
        loop.call_later(60, lambda: None)

    async def scene(leftovers, loop):
        loop.call_later(60, asyncio.Event().set)
        loop.call_later(60, loop.create_future().set_result, None)
        loop.call_later(60, functools.partial(pydantic.validate_call, len))
        loop.call_later(60, contextvars.copy_context().run, pydantic.validate_call, len)
        assert not await leftovers.remain()

    play(scene, before=earlier)


class Client:
    """A client of the project's that all runs of a child share."""

    def refresh(self, loop):
        return loop.call_later(60, self.refresh, loop)


def test_a_timer_that_a_client_of_an_earlier_run_starts_again_does_not_count(play):
    client = Client()

    async def earlier(loop):
        loop.earlier = client.refresh(loop)

    async def scene(leftovers, loop):
        loop.earlier.cancel()
        client.refresh(loop)
        assert not await leftovers.remain()
        Client().refresh(loop)
        assert await leftovers.remain()

    play(scene, before=earlier)


@functools.lru_cache
def _decorated():
    """A function of the project within a wrapper of a library."""


async def _coroutine(): ...


class _Error(Exception):
    """A class whose methods are Python's."""


class _Awaitable:
    def __await__(self): ...


@pytest.mark.parametrize(
    ("call", "make_arguments"),
    [
        (_decorated, tuple),
        (contextvars.copy_context().run, lambda: (_decorated,)),
        (asyncio.ensure_future, lambda: (_coroutine(),)),
        (asyncio.ensure_future, lambda: (_Awaitable(),)),
        (_Awaitable, tuple),
        (_Error, tuple),
        (threading.Thread(target=_decorated).start, tuple),
        (subprocess.Popen, lambda: (["true"],)),
        (contextlib.ExitStack().close, tuple),
        (Mock(), tuple),
        (logging.getLogger("x").info, lambda: ("x",)),
        (contextvars.copy_context().run, lambda: (exec, "1")),
        (functools.partial(os.unlink, "/nowhere"), tuple),
        ([].clear, tuple),
        ((None for _ in "x").__next__, tuple),
        (asyncio.create_task, lambda: (_coroutine(),)),
    ],
)
def test_a_callback_counts_that_calls_the_project_indirectly(play, call, make_arguments):
    async def scene(leftovers, loop):
        arguments = make_arguments()
        handle = loop.call_later(60, call, *arguments)
        assert await leftovers.remain()
        handle.cancel()
        for one in filter(asyncio.iscoroutine, arguments):
            one.close()

    play(scene)


def _timer_of_future(loop, set_result):
    """A timer that ends a future, whose callback is the project's."""
    future = loop.create_future()
    future.add_done_callback(lambda _: None)
    return loop.call_later(60, *set_result(future))


def _timer_of_concurrent_future(loop, wraps):
    future = concurrent.futures.Future()
    to_watch = asyncio.wrap_future(future, loop=loop) if wraps else future
    to_watch.add_done_callback(lambda _: None)
    return loop.call_later(60, future.set_result, 1)


class _Object:
    def go(self): ...


@pytest.mark.parametrize(
    "schedule",
    [
        lambda loop: _timer_of_future(loop, lambda future: (future.set_result, 1)),
        lambda loop: _timer_of_future(loop, lambda future: (future.cancel,)),
        lambda loop: _timer_of_future(
            loop, lambda future: (asyncio.futures._set_result_unless_cancelled, future, 1)
        ),
        lambda loop: _timer_of_concurrent_future(loop, wraps=True),
        lambda loop: _timer_of_concurrent_future(loop, wraps=False),
        lambda loop: loop.call_later(60, operator.methodcaller("go"), _Object()),
        lambda loop: loop.call_later(60, list, map(_Object.go, [1])),
        lambda loop: loop.call_later(60, list, (None for _ in [1])),
        lambda loop: loop.call_later(60, functools.partial(list, map(_Object.go, [1]))),
        lambda loop: loop.call_later(60, loop.call_later(60, lambda: None)._run),
    ],
)
def test_a_callback_counts_that_calls_the_project_by_the_standard_library(play, schedule):
    async def scene(leftovers, loop):
        schedule(loop)
        assert await leftovers.remain()

    play(scene)


def test_a_future_that_only_tasks_wait_for_does_not_count(play):
    async def earlier(loop):
        loop.future = loop.create_future()

        async def wait():
            await loop.future

        loop.waiting = loop.create_task(wait())

    async def scene(leftovers, loop):
        await asyncio.sleep(0)
        loop.call_later(60, loop.future.set_result, 1)
        assert not await leftovers.remain()
        loop.waiting.cancel()

    play(scene, before=earlier)


def test_a_pipe_counts_if_the_project_handles_its_data(play):
    class OfProject(asyncio.Protocol):
        def data_received(self, data): ...

    async def scene(leftovers, loop):
        for protocol, counts in ((asyncio.Protocol, False), (OfProject, True)):
            reader, writer = os.pipe()
            with os.fdopen(writer, "wb"):
                transport, _ = await loop.connect_read_pipe(protocol, os.fdopen(reader, "rb"))
                assert await leftovers.remain() is counts
                transport.close()
                await asyncio.sleep(0)

    play(scene)


def test_callbacks_of_a_stopped_run_on_futures_that_outlive_it_are_dropped():
    """Whatever ends the future calls them: another run, or a task that an earlier one has left."""
    project = ProjectCode(_is_this_file)
    loop, called = ChildLoop(project), []
    leftovers = LoopLeftovers(loop, project)
    shared = loop.create_future()
    of_thread = concurrent.futures.Future()
    attribute = concurrent.futures.Future.add_done_callback
    attribute_callbacks(project, RUN.get, lambda run, of, future: run.is_stopped or of(future))

    async def run(name):
        leftovers.begin_run()
        shared.add_done_callback(lambda _: called.append(name))
        shared.add_done_callback(other.set_result)
        of_thread.add_done_callback(lambda _: called.append(f"{name}, of a thread"))
        asyncio.wrap_future(of_thread).add_done_callback(lambda _: called.append(f"{name}, both"))

    async def resolve():
        leftovers.begin_run()
        shared.set_result(1)
        of_thread.set_result(1)
        await asyncio.sleep(0.01)

    try:
        other = loop.create_future()
        loop.run_until_complete(run("going on"))
        other = loop.create_future()
        loop.run_until_complete(run("stopped"))
        assert not loop.run_until_complete(leftovers.remain())
        leftovers.end_run()
        loop.run_until_complete(resolve())
    finally:
        concurrent.futures.Future.add_done_callback = attribute
        loop.close()
    assert called == ["going on, of a thread", "going on", "going on, both"]
    assert other.done()  # a library's callback is called


def test_an_exception_handler_of_the_project_is_removed(play):
    async def scene(leftovers, loop):
        loop.set_exception_handler(lambda *_: None)
        assert not await leftovers.remain()
        assert loop.get_exception_handler() is None

    play(scene)


def test_an_object_whose_attributes_raise_counts(play):
    class Proxy:
        def __call__(self): ...

        def __getattr__(self, name):
            raise RuntimeError(name)

    async def scene(leftovers, loop):
        loop.call_later(60, Proxy())
        assert await leftovers.remain()

    play(scene)


@pytest.mark.parametrize("call", [lambda: None, [].clear])
def test_a_reader_of_the_project_remains_until_it_is_removed(play, call):
    async def scene(leftovers, loop):
        readable, writable = os.pipe()
        loop.add_reader(readable, call)
        assert await leftovers.remain()
        loop.remove_reader(readable)
        assert not await leftovers.remain()
        os.close(readable)
        os.close(writable)

    play(scene)


def test_a_server_remains_until_it_is_closed(play):
    async def earlier(loop):
        loop.older = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)

    async def scene(leftovers, loop):
        server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
        assert await leftovers.remain()
        server.close()
        await server.wait_closed()
        assert not await leftovers.remain()
        loop.older.close()

    play(scene, before=earlier)


class _Echo(asyncio.Protocol):
    def data_received(self, data): ...


@pytest.mark.parametrize(("protocol", "counts"), [(_Echo, True), (asyncio.Protocol, False)])
def test_a_connection_counts_if_the_project_handles_its_data(play, protocol, counts):
    async def scene(leftovers, loop):
        ours, theirs = socket.socketpair()
        transport, _ = await loop.create_connection(protocol, sock=ours)
        assert await leftovers.remain() == counts
        transport.close()
        theirs.close()
        await until_nothing_remains(leftovers)

    play(scene)


def test_hooks_of_the_project_are_removed_and_others_stay():
    of_project, of_library = ProjectCode(_is_this_file), ProjectCode(lambda _: False)
    before = sys.getprofile()
    try:
        sys.setprofile(lambda *_: None)
        of_library.remove_hooks()
        assert sys.getprofile() is not None
        of_project.remove_hooks()
        assert sys.getprofile() is None
    finally:
        sys.setprofile(before)


def test_generators_of_the_run_are_closed_after_its_tasks(play, caplog):
    kept, closed = [], []

    async def generator(name):
        try:
            yield 1
        finally:
            await asyncio.sleep(0.2)
            closed.append(name)

    async def fails():
        try:
            yield 1
        finally:
            raise ValueError("of the project")

    async def before(loop):
        kept.append(generator("of an earlier run"))
        await anext(kept[0])

    async def task():
        kept.append(generator("of the task"))
        try:
            async for _ in kept[-1]:
                await asyncio.sleep(60)
        finally:
            closed.append("the task")

    async def scene(leftovers, loop):
        kept.append(generator("of the run"))
        await anext(kept[-1])
        kept.append(fails())
        await anext(kept[-1])
        loop.create_task(task())
        await asyncio.sleep(0)
        await until_nothing_remains(leftovers)

    with caplog.at_level("INFO"):
        play(scene, before)
    assert closed[0] == "the task"
    assert set(closed[1:3]) == {"of the task", "of the run"}
    assert "of the project" in caplog.text
