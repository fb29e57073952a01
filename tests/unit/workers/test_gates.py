"""Test that the code of a run on a shared event loop can be frozen and interrupted."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from functools import partial
from types import SimpleNamespace

import anyio.to_thread
import pytest

from belay_workers.execution.stops import RunCancelled
from belay_workers.host.event_loop import LoopPolicy
from belay_workers.host.gated_run import GatedRun, uninterrupted
from belay_workers.host.gates import Gates
from belay_workers.host.leftovers import HostLeftovers
from belay_workers.host.threads import RunThreads
from belay_workers.slots import StopReason
from tests.unit.workers.conftest import TESTING
from tests.waiting import wait_until

#: What the code of runs keeps.
_KEPT: list = []


async def swallow(beats: list[str]) -> None:
    while TESTING.is_set():
        try:
            beats.append("beat")
            await asyncio.sleep(0.001)
        except BaseException:
            beats.append("swallowed")
        finally:
            beats.append("finally")


def test_no_line_of_a_frozen_run_is_executed(loop):
    run, beats = loop.new_run(), []
    task = loop.start(run, swallow(beats))
    loop.turn()
    task.cancel()
    loop.turn()
    assert "swallowed" in beats
    assert not task.done()
    run.freeze()
    before = len(beats)
    loop.turn()
    assert task.cancelled()
    assert run.tasks == set()
    del task
    gc.collect()
    loop.turn()
    assert len(beats) == before


def test_tasks_of_a_run_are_frozen_with_it_and_others_are_not(loop):
    frozen, other = loop.new_run(), loop.new_run()
    beats, others = [], []

    async def spread() -> None:
        await asyncio.gather(swallow(beats), asyncio.create_task(swallow(beats)))

    loop.start(frozen, spread())
    task = loop.start(other, swallow(others))
    loop.turn()
    assert len(frozen.tasks) == 3
    frozen.freeze()
    before, others_before = len(beats), len(others)
    loop.turn()
    assert len(beats) == before
    assert frozen.tasks == set()
    assert len(others) > others_before
    other.freeze()
    loop.turn()
    assert task.done()


def test_an_exit_is_the_runs_own_error(loop):
    async def leave() -> None:
        raise SystemExit(3)

    task = loop.start(loop.new_run(), leave())
    loop.turn()
    with pytest.raises(RuntimeError, match="The node raised SystemExit: 3"):
        task.result()


def test_the_event_loop_goes_on_after_a_callback_that_exits(loop, caplog):
    called = []

    async def leave() -> None:
        running = asyncio.get_running_loop()
        running.call_soon(sys.exit)
        running.call_soon(called.append, "the next callback")
        await asyncio.to_thread(running.call_soon_threadsafe, sys.exit)

    task = loop.start(loop.new_run(), leave())
    loop.turn()
    loop.loop.run_until_complete(asyncio.wait_for(task, 30))
    assert called == ["the next callback"]
    assert "ignored what a callback raised" in caplog.text


def test_a_reader_that_raises_is_removed_once_its_run_has_ended(loop, caplog):
    """Nobody reads what makes the descriptor readable."""
    run, called = loop.new_run(), []
    ours, theirs = socket.socketpair()

    def fail() -> None:
        called.append(run.is_in_progress)
        raise ValueError

    async def leave() -> None:
        asyncio.get_running_loop().add_reader(ours, fail)
        theirs.send(b"x")

    with ours, theirs:
        task = loop.start(run, leave())
        loop.loop.run_until_complete(asyncio.wait({task}))
        loop.turn()
        assert set(called) == {True}
        run.leave_slot()
        loop.turn()
        assert called.count(False) == 1
    assert f"of run {run.claim.run_id}" in caplog.text


def test_the_slot_shows_which_run_is_stepped(loop):
    run = loop.new_run()
    seen = []

    async def look() -> None:
        seen.append((GatedRun.current(), loop.slots.read_all()[0].stepping_since))

    loop.start(run, look())
    loop.turn()
    [(stepped, since)] = seen
    assert stepped is run
    assert 0 < since <= time.monotonic()
    assert GatedRun.current() is None
    assert loop.slots.read_all()[0].stepping_since == 0


def test_a_run_that_blocks_the_loop_is_interrupted_once_it_is_to_be(loop):
    run, other = loop.new_run(), loop.new_run()

    async def block() -> None:
        time.sleep(30)

    def ask(*_: object) -> None:
        loop.gates.interrupt()  # not of this run
        loop.slots.ask(0, run.claim, StopReason.CANCEL, interrupts=True)
        loop.gates.interrupt()

    loop.slots.ask(1, other.claim, StopReason.CANCEL, interrupts=True)
    before = signal.signal(signal.SIGALRM, ask)
    try:
        task = loop.start(run, block())
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again, if the first came too early
        began = time.monotonic()
        loop.turn()
        assert time.monotonic() - began < 20
        with pytest.raises(RunCancelled):
            task.result()
        assert (run.was_interrupted, other.was_interrupted) == (True, False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_libraries_can_look_at_the_coroutine_of_a_task(loop):
    """anyio reads the state of a task's coroutine."""

    async def sleep() -> None:
        await asyncio.sleep(10)

    run = loop.new_run()
    task = loop.start(run, sleep())
    assert asyncio.iscoroutine(task.get_coro())
    assert inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED
    loop.turn()
    assert inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_SUSPENDED
    run.freeze()
    loop.turn()


def test_the_slot_of_a_run_that_has_ended_is_not_written(loop):
    run, beats = loop.new_run(), []
    loop.start(run, swallow(beats))
    loop.turn()
    slot = run.slot
    run.leave_slot()
    slot.release()
    following = loop.new_run()
    before = len(beats)
    loop.turn()
    assert len(beats) > before
    assert loop.slots.read_all()[0].claim == following.claim
    assert loop.slots.read_all()[0].stepping_since == 0
    run.freeze()
    loop.turn()


def test_a_run_cannot_stop_the_event_loop_of_others_nor_replace_its_parts(loop, caplog):
    async def take() -> str:
        itself = asyncio.get_running_loop()
        itself.stop()
        itself.set_task_factory(None)
        itself.set_default_executor(ThreadPoolExecutor(1))
        await itself.shutdown_default_executor()
        await itself.shutdown_asyncgens()
        return await asyncio.to_thread(lambda: "still there")

    loop.loop.set_default_executor(ThreadPoolExecutor(1))
    executor = loop.loop._default_executor
    task = loop.start(loop.new_run(), take())
    loop.loop.run_until_complete(asyncio.wait_for(asyncio.shield(task), 30))
    assert task.result() == "still there"
    assert loop.loop.get_task_factory() == loop.gates.new_task
    assert loop.loop._default_executor is executor
    assert caplog.text.count("which shares its process") == 5


def test_a_coroutine_that_a_thread_hands_to_the_event_loop_belongs_to_the_threads_run(loop):
    run, beats = loop.new_run(), []

    def hand_over() -> None:
        run.call(asyncio.run_coroutine_threadsafe, swallow(beats), loop.loop)

    thread = threading.Thread(target=hand_over)
    thread.start()
    thread.join()
    loop.turn()
    assert "beat" in beats
    assert len(run.tasks) == 1
    run.freeze()
    loop.turn()
    before = len(beats)
    loop.turn()
    assert len(beats) == before


def test_a_context_of_its_own_does_not_take_a_task_or_a_callback_from_its_run(loop):
    """Such as a task that is not to inherit the tracing of its run."""
    run, beats, tasks = loop.new_run(), [], []

    def again(*_: object) -> None:
        beats.append("timer")
        loop.loop.call_later(0.001, again, context=Context())

    def once_more() -> None:
        beats.append("callback")
        if TESTING.is_set():
            loop.loop.call_soon(once_more, context=Context())

    def restart(_task: object) -> None:
        beats.append("restarted")
        asyncio.get_running_loop().create_task(sleep()).add_done_callback(restart)

    async def sleep() -> None:
        await asyncio.sleep(0.001)

    async def escape() -> None:
        again()
        once_more()
        tasks.append(asyncio.create_task(swallow(beats), context=Context()))
        asyncio.create_task(sleep()).add_done_callback(restart)
        tasks.append(Context().run(asyncio.create_task, swallow(beats)))
        await asyncio.sleep(60)

    loop.start(run, escape())
    loop.turn()
    assert {"timer", "callback", "restarted", "beat"} <= set(beats)
    run.freeze()
    loop.turn()
    before = len(beats)
    loop.turn()
    assert len(beats) == before
    assert run.tasks == set()


def test_timers_and_readers_that_call_no_function_of_the_project_are_the_runs(loop):
    run, beats = loop.new_run(), []
    readable, writable = socket.socketpair()

    async def leave(*, is_frozen: bool) -> None:
        loop.loop.call_later(0.001, beats.append, "builtin")
        loop.loop.call_later(0.001, partial(beats.append), "partial")
        loop.loop.call_later(0.001, copy_context().run, beats.append, "context")
        thread = threading.Thread(target=beats.append, args=["thread"])
        loop.loop.call_later(0.001, thread.start)
        loop.loop.add_reader(readable, beats.append, "reader")
        if is_frozen:
            run.freeze()

    with readable, writable:
        writable.send(b"x")
        loop.start(run, leave(is_frozen=False))
        loop.turn()
        assert set(beats) == {"builtin", "partial", "context", "thread", "reader"}
        loop.loop.remove_reader(readable)
        beats.clear()
        loop.start(run, leave(is_frozen=True))
        loop.turn()
        loop.loop.remove_reader(readable)
    assert beats == []


class OwnTask(asyncio.Task):
    """A task of a library's class."""


@pytest.mark.parametrize("kind", [asyncio.Task, asyncio.tasks._PyTask, OwnTask])
def test_a_task_that_is_made_without_the_task_factory_belongs_to_its_run(loop, kind):
    run, beats, tasks = loop.new_run(), [], []

    async def escape() -> None:
        tasks.append(kind(swallow(beats), loop=loop.loop, context=Context()))
        await asyncio.sleep(60)

    loop.start(run, escape())
    loop.turn()
    assert run.tasks >= set(tasks)
    tasks[0].cancel()
    loop.turn()
    assert "swallowed" in beats
    run.freeze()
    loop.turn()
    before = len(beats)
    del tasks[:]
    gc.collect()
    loop.turn()
    assert len(beats) == before
    assert run.tasks == set()


def test_a_step_of_such_a_task_is_attributed_to_its_run(loop):
    run, seen = loop.new_run(), []

    async def note() -> None:
        seen.append(GatedRun.current())
        await asyncio.sleep(0.001)
        seen.append(GatedRun.current())
        raise SystemExit(3)

    async def start() -> None:
        _KEPT.append(asyncio.Task(note(), loop=loop.loop, context=Context()))

    loop.start(run, start())
    loop.turn()
    assert seen == [run, run]
    assert isinstance(_KEPT.pop().exception(), SystemExit)


def test_what_a_run_wakes_up_does_not_become_its_own(loop):
    run, woken = loop.new_run(), []
    future = loop.loop.create_future()

    async def wait() -> None:
        woken.append(await future)

    async def wake_up() -> None:
        future.set_result("result")

    waiting = loop.loop.create_task(wait())
    loop.turn()
    loop.start(run, wake_up())
    loop.turn()
    assert woken == ["result"]
    assert waiting not in run.tasks


@pytest.mark.parametrize("context", [None, Context()])
def test_the_connections_of_a_stopped_run_are_not_served(loop, context):
    run, received = loop.new_run(), []

    class Echo(asyncio.Protocol):
        def connection_made(self, transport) -> None:
            self.transport = transport
            _KEPT.append(transport)

        def data_received(self, data: bytes) -> None:
            received.append(data)
            self.transport.write(data)

    async def connect() -> None:
        server = await loop.loop.create_server(Echo, "127.0.0.1", 0)
        transport, _ = await loop.loop.create_connection(Echo, *server.sockets[0].getsockname())
        transport.write(b"echo")
        _KEPT.append(server)

    async def node() -> None:
        await asyncio.create_task(connect(), context=context)
        await asyncio.sleep(60)

    task = loop.start(run, node())
    loop.turn()
    assert received
    task.cancel()
    leftovers = leftovers_of(loop, SimpleNamespace(loops=[]))
    loop.loop.run_until_complete(leftovers.end(run))
    before = len(received)
    loop.turn()
    assert len(received) == before
    for kept in _KEPT:
        kept.close()
    _KEPT.clear()
    loop.turn()


# --- other threads ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(loop):
    """A function that makes an event loop on another thread, as code of the project does."""
    gates = Gates(is_of_host=False)
    policy = LoopPolicy(loop.project, gates)
    threads = []

    def start():
        made = policy.new_event_loop()
        threads.append((made, threading.Thread(target=made.run_forever)))
        threads[-1][1].start()
        return made

    start.policy = policy
    yield start
    for made, thread in threads:
        made.call_soon_threadsafe(made.stop)
        thread.join()
        made.close()


def test_a_task_on_the_event_loop_of_another_runs_thread_can_be_cancelled(loop, elsewhere):
    run, neighbour = loop.new_run(), loop.new_run()
    others_loop = elsewhere.policy.new_event_loop()
    thread = threading.Thread(target=run.call, args=(others_loop.run_forever,))
    thread.start()
    try:
        work = asyncio.sleep(600)
        waiting = neighbour.context.run(asyncio.run_coroutine_threadsafe, work, others_loop)
        [task] = wait_until(lambda: neighbour.living_tasks(loop.loop), 20, "the task")
        neighbour.cancel(task)
        wait_until(task.done, 20, "its end")
        assert task.cancelled()
        assert waiting.cancelled()
    finally:
        others_loop.call_soon_threadsafe(others_loop.stop)
        thread.join()
        others_loop.close()


def leftovers_of(loop, policy):
    """Return the leftovers of the runs of a loop, and of the loops of a policy."""
    no_threads = SimpleNamespace(work_for=lambda _: False)
    nothing_started = SimpleNamespace(end=lambda _, is_stopped: False)
    return HostLeftovers(loop.loop, policy, loop.gates, no_threads, nothing_started)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_finally_of_a_generator_that_a_neighbour_collects_is_its_own_runs(loop, is_frozen):
    """One in a reference cycle, as a traceback makes it, is finalized by what collects garbage."""
    run, neighbour, beats = loop.new_run(), loop.new_run(), []

    async def generate():
        itself = yield
        try:
            yield itself
        finally:
            while TESTING.is_set():
                beats.append("finally")
                await asyncio.sleep(0.001)

    async def leave() -> None:
        generator = generate()
        await generator.asend(None)
        await generator.asend(generator)

    async def collect() -> None:
        gc.collect()

    leftovers = leftovers_of(loop, SimpleNamespace(loops=[]))
    gc.disable()
    try:
        loop.loop.run_until_complete(loop.start(run, leave()))
        if is_frozen:
            run.freeze()
        loop.loop.run_until_complete(loop.start(neighbour, collect()))
    finally:
        gc.enable()
    loop.turn()
    assert bool(beats) is not is_frozen
    assert neighbour.tasks == set()
    loop.loop.run_until_complete(leftovers.end(run))
    before = len(beats)
    loop.turn()
    assert len(beats) == before


def test_generators_that_end_are_forgotten(loop, monkeypatch):
    monkeypatch.setattr("belay_workers.host.generators._KEPT_SECONDS", 0)
    run = loop.new_run()

    async def generate():
        yield 1

    async def iterate() -> None:
        for _ in range(100):
            assert [one async for one in generate()] == [1]

    loop.loop.run_until_complete(loop.start(run, iterate()))
    assert run.generators == {}
    assert len(loop.loop._generators._dying) <= 2
    assert len(loop.loop._generators._deaths) <= 2


def of_run(run, function, *args):
    """Call a function in the context of a run, as its code on the host's event loop does."""
    return run.context.run(function, *args)


def test_what_a_run_starts_on_the_event_loop_of_a_thread_is_frozen_with_it(loop, elsewhere):
    run, beats, other = loop.new_run(), [], elsewhere()
    future = of_run(run, asyncio.run_coroutine_threadsafe, swallow(beats), other)
    wait_until(lambda: "beat" in beats, 10, "the task")
    assert len(run.living_tasks(loop.loop)) == 1
    future.cancel()
    wait_until(lambda: "swallowed" in beats, 10, "the cancel")
    run.freeze()
    wait_until(lambda: not run.living_tasks(loop.loop), 10, "the end of the task")
    before = len(beats)
    loop.turn()
    assert len(beats) == before
    assert all(reading.stepping_since == 0 for reading in loop.slots.read_all())


def test_callbacks_of_a_stopped_run_on_the_event_loop_of_a_thread_are_removed(loop, elsewhere):
    run, neighbour, beats, others = loop.new_run(), loop.new_run(), [], []
    other = elsewhere()

    def again(beats: list[int]) -> None:
        beats.append(1)
        other.call_later(0.001, again, beats)

    of_run(run, other.call_soon_threadsafe, again, beats)
    of_run(neighbour, other.call_soon_threadsafe, again, others)
    wait_until(lambda: beats and others, 10, "the callbacks")
    leftovers = leftovers_of(loop, elsewhere.policy)
    loop.loop.run_until_complete(leftovers.end(run))
    before, others_before = len(beats), len(others)
    wait_until(lambda: len(others) > others_before + 10, 10, "the neighbour's callbacks")
    assert len(beats) == before
    loop.loop.run_until_complete(leftovers.end(neighbour))


def test_an_event_loop_that_a_run_starts_and_stops_is_its_own(loop, elsewhere):
    run = loop.new_run()

    async def work():
        return await asyncio.gather(asyncio.sleep(0, "one"), asyncio.sleep(0.001, "two"))

    def on_thread():
        made = elsewhere.policy.new_event_loop()
        try:
            return made.run_until_complete(work())
        finally:
            made.close()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run.call, on_thread).result(10) == ["one", "two"]
    wait_until(lambda: not run.living_tasks(loop.loop), 10, "no task")


@pytest.fixture
def threads(loop, monkeypatch):
    monkeypatch.setattr(ThreadPoolExecutor, "submit", ThreadPoolExecutor.submit)
    monkeypatch.setattr(threading.Thread, "start", threading.Thread.start)
    made = RunThreads()
    yield made
    made.executor.shutdown()


def test_what_follows_a_call_on_a_thread_is_the_runs_until_it_is_stopped(loop, threads):
    run, beats = loop.new_run(), []

    def again(future) -> None:
        beats.append(GatedRun.current())
        pool.submit(time.sleep, 0.001).add_done_callback(again)

    with ThreadPoolExecutor(1) as pool:
        of_run(run, lambda: pool.submit(int).add_done_callback(again))
        wait_until(lambda: len(beats) > 10, 10, "the callbacks")
        assert threads.work_for(run)
        run.is_stopped = True
        wait_until(lambda: not threads.work_for(run), 10, "the end of the calls")
        before = len(beats)
        loop.turn()
        assert len(beats) == before
        assert set(beats) == {run}


def test_calls_wait_for_a_thread_where_no_further_one_can_be_started(loop, threads, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    runs = [loop.new_run() for _ in range(3)]
    futures = [run.context.run(threads.executor.submit, GatedRun.current) for run in runs]
    assert [future.result(30) for future in futures] == runs
    wait_until(lambda: not any(map(threads.work_for, runs)), 10, "the end of the calls")


def test_a_thread_of_anyio_works_for_the_run_whose_call_it_executes(loop, threads):
    """It is shared: the run that has started it may be another one."""
    first, second, release = loop.new_run(), loop.new_run(), threading.Event()
    seen, calling = [], threading.Event()

    def call():
        calling.set()
        assert release.wait(30)
        seen.append(GatedRun.current())

    async def node(function):
        await anyio.to_thread.run_sync(function, abandon_on_cancel=True)

    async def scene():
        await loop.start(first, node(int))
        assert list(first.threads) == []
        task = loop.start(second, node(call))
        await asyncio.to_thread(calling.wait, 30)
        assert (threads.work_for(first), threads.work_for(second)) == (False, True)
        task.cancel()
        await asyncio.sleep(0.01)
        assert threads.work_for(second)
        release.set()
        while threads.work_for(second):
            await asyncio.sleep(0.001)

    loop.loop.run_until_complete(asyncio.wait_for(scene(), 60))
    assert seen == [second]


def test_a_call_of_anyio_that_was_cancelled_before_it_began_has_ended(loop, threads):
    run, put = loop.new_run(), []
    future = loop.loop.create_future()
    seen: list[str] = []
    item = (copy_context(), seen.append, ("called",), future, None)
    run.context.run(threads._put, put.append, item)
    assert threads.work_for(run)
    future.cancel()
    loop.turn()
    assert not threads.work_for(run)
    _, call, arguments, *_ = put[0]
    assert call(*arguments) is None
    assert seen == []
    threads._put(put.append, None)
    assert put[1] is None


def test_belays_own_code_is_not_interrupted_within_a_step_of_a_run(loop):
    run, seen = loop.new_run(), []
    loop.slots.ask(0, run.claim, StopReason.CANCEL, interrupts=True)

    def interrupt() -> None:
        try:
            loop.gates.interrupt()
        except RunCancelled:
            seen.append("interrupted")
        else:
            seen.append("not interrupted")

    async def node() -> None:
        try:
            uninterrupted(interrupt)
        except RunCancelled:
            seen.append("afterwards")

    task = loop.start(run, node())
    loop.turn()
    assert task.done()
    assert seen == ["not interrupted", "afterwards"]


def test_the_timers_of_a_loop_are_in_order_after_an_interruption(loop, monkeypatch):
    """A heap that is left in the middle of a push delays the timers of all runs."""
    run = loop.new_run()
    earlier = asyncio.TimerHandle.__lt__

    def interrupted_in_between(one, other):
        loop.gates.interrupt()
        return earlier(one, other)

    async def node() -> None:
        for seconds in (9, 8, 7):
            loop.loop.call_later(seconds, int)
        monkeypatch.setattr(asyncio.TimerHandle, "__lt__", interrupted_in_between)
        loop.slots.ask(0, run.claim, StopReason.CANCEL, interrupts=True)
        loop.loop.call_later(1, int)

    task = loop.start(run, node())
    with pytest.raises(RunCancelled):
        loop.loop.run_until_complete(task)
    monkeypatch.undo()
    timers = [timer.when() for timer in loop.loop._scheduled]
    assert len(timers) == 4
    assert all(timers[(at - 1) // 2] <= timers[at] for at in range(1, len(timers)))


def test_methods_of_the_loop_that_a_run_has_replaced_are_restored(loop):
    called = []

    async def replace():
        itself = asyncio.get_running_loop()
        call_soon = itself.call_soon
        itself.call_soon = lambda *args, **options: called.append(1) or call_soon(*args, **options)

    loop.loop.run_until_complete(loop.start(loop.new_run(), replace()))
    loop.turn()
    assert called
    loop.project.restore_methods(loop.loop)
    called.clear()
    loop.turn()
    assert called == []
