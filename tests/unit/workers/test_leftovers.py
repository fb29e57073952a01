"""Test which threads count as left behind by a run that was stopped."""

from __future__ import annotations

import _thread
import asyncio
import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from belay_workers.child.leftovers import Leftovers
from belay_workers.execution.project_code import ProjectCode
from tests.waiting import wait_until


@pytest.fixture
def leftovers():
    return Leftovers(set(threading.enumerate()), ProjectCode(lambda file: file == __file__))


@pytest.fixture
def pool():
    """A pool of a project, whose thread an earlier run has started."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


def test_a_thread_that_the_run_started_is_left_until_it_ends(leftovers):
    leftovers.begin_run()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert leftovers.has_threads()
    end.set()
    thread.join()
    assert not leftovers.has_threads()


@pytest.mark.parametrize(
    "work", [lambda end: end.wait(), lambda end: [time.sleep(0.01) for _ in iter(end.is_set, True)]]
)
def test_a_thread_of_an_earlier_run_counts_while_it_works_for_this_one(leftovers, pool, work):
    leftovers.begin_run()
    assert not leftovers.has_threads()
    end = threading.Event()
    working = pool.submit(work, end)
    wait_until(working.running, 10, "the work")
    assert leftovers.has_threads()
    end.set()
    working.result()
    wait_until(lambda: not leftovers.has_threads(), 10, "the pool to be idle")


def test_work_of_an_earlier_run_that_goes_on_does_not_count(leftovers, pool):
    end = threading.Event()
    working = pool.submit(end.wait)
    wait_until(working.running, 10, "the work")
    wait_until(lambda: _waits_in_an_event(pool), 10, "the wait")
    leftovers.begin_run()
    assert not leftovers.has_threads()
    end.set()
    working.result()
    wait_until(lambda: not leftovers.has_threads(), 10, "the pool to be idle")


def _waits_in_an_event(pool: ThreadPoolExecutor) -> bool:
    (thread,) = pool._threads
    frame = sys._current_frames()[thread.ident]
    return frame.f_code is threading.Condition.wait.__code__


@contextmanager
def running_loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_thread_that_was_started_without_threading_is_left_until_it_ends(leftovers):
    leftovers.begin_run()
    end = threading.Event()
    _thread.start_new_thread(end.wait, ())
    wait_until(leftovers.has_threads, 10, "the leftover")
    leftovers.begin_run()
    assert not leftovers.has_threads()
    end.set()
    wait_until(lambda: not leftovers.has_threads(), 10, "the end of the thread")


def test_a_raw_thread_that_has_logged_and_ended_does_not_count(leftovers):
    """Until Python 3.13, `threading` keeps an object for it."""
    leftovers.begin_run()
    has_logged = threading.Event()

    def log():
        threading.current_thread()
        has_logged.set()

    _thread.start_new_thread(log, ())
    assert has_logged.wait(10)
    wait_until(lambda: not leftovers.has_threads(), 10, "the end of the thread")


def test_a_task_on_the_event_loop_of_an_earlier_run_counts(leftovers):
    with running_loop() as loop:
        older = asyncio.run_coroutine_threadsafe(asyncio.sleep(60), loop)
        wait_until(lambda: asyncio.all_tasks(loop), 10, "the older task")
        leftovers.begin_run()
        assert not leftovers.has_threads()
        task = asyncio.run_coroutine_threadsafe(asyncio.sleep(60), loop)
        wait_until(lambda: len(asyncio.all_tasks(loop)) == 2, 10, "the task")
        wait_until(leftovers.has_threads, 10, "the leftover")
        task.cancel()
        wait_until(lambda: not leftovers.has_threads(), 10, "the end of the task")
        older.cancel()
        wait_until(lambda: not asyncio.all_tasks(loop), 10, "the end of the older task")


def test_a_callback_on_the_event_loop_of_an_earlier_run_counts(leftovers):
    with running_loop() as loop:
        leftovers.begin_run()
        assert not leftovers.has_threads()
        handles = []

        def schedule():
            handles.append(loop.call_later(60, lambda: None))
            handles.append(loop.call_later(60, asyncio.Event().set))  # a library's

        loop.call_soon_threadsafe(schedule)
        wait_until(lambda: len(handles) == 2, 10, "the callbacks")
        assert leftovers.has_threads()
        loop.call_soon_threadsafe(handles[0].cancel)
        wait_until(lambda: not leftovers.has_threads(), 10, "the end of the callback")


def test_a_function_without_a_frame_counts_on_the_thread_of_a_pool(leftovers, pool):
    leftovers.begin_run()
    end = threading.Lock()
    end.acquire()
    working = pool.submit(end.acquire)
    wait_until(working.running, 10, "the work")
    wait_until(leftovers.has_threads, 10, "the thread to be at work")
    end.release()
    working.result()
    wait_until(lambda: not leftovers.has_threads(), 10, "the pool to be idle")


def test_a_consumer_of_a_queue_counts_while_it_handles_an_item(leftovers):
    items: queue.Queue = queue.Queue()
    end = threading.Event()

    def consume():
        while (handle := items.get()) is not None:
            handle()

    consumer = threading.Thread(target=consume)
    consumer.start()
    leftovers.begin_run()
    wait_until(lambda: not leftovers.has_threads(), 10, "the consumer to wait")

    def handle():
        end.wait()

    items.put(handle)
    wait_until(items.empty, 10, "the consumer to take it")
    wait_until(leftovers.has_threads, 10, "the leftover")
    end.set()
    items.put(None)
    consumer.join()


def of_module(name, code):
    """Return the function `work` of a module of this name."""
    module = {"__name__": name, "end": threading.Event(), "queue": queue, "items": queue.Queue()}
    exec(code, module)
    return module


@contextmanager
def thread_of(work, end):
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end()
        thread.join()


@pytest.mark.parametrize("name", ["langsmith._internal._background_thread", "sentry_sdk.worker"])
def test_the_threads_of_tracers_do_not_count(leftovers, name):
    tracer = of_module(name, "def work():\n    end.wait()")
    leftovers.begin_run()
    with thread_of(tracer["work"], tracer["end"].set):
        wait_until(lambda: not leftovers.has_threads(), 10, "the tracer to wait")


def test_a_thread_within_the_wrapper_of_a_tracer_counts(leftovers):
    """Sentry wraps the work of all threads, to report what they raise."""
    end = threading.Event()
    wrapper = of_module(
        "sentry_sdk.integrations.threading",
        "def wrap(call):\n    def work():\n        call()\n    return work",
    )
    leftovers.begin_run()
    with thread_of(wrapper["wrap"](end.wait), end.set):
        wait_until(leftovers.has_threads, 10, "the thread to start")
        assert leftovers.has_threads()


def test_a_client_s_thread_counts_while_it_works(leftovers):
    pool = of_module(
        "psycopg_pool.pool",
        "def work():\n    while (call := items.get()) is not None:\n        call()",
    )
    leftovers.begin_run()
    with thread_of(pool["work"], lambda: pool["items"].put(None)):
        wait_until(lambda: not leftovers.has_threads(), 10, "the client to wait")
        end = threading.Event()
        started = threading.Event()

        def call():
            started.set()
            end.wait()

        pool["items"].put(call)
        assert started.wait(10)
        assert leftovers.has_threads()
        end.set()
        wait_until(lambda: not leftovers.has_threads(), 10, "the client to wait again")
