"""One node of each kind that is hard to stop, selected by `kind` in the input.

Each writes beats while it can. A node that cannot (it sleeps for a minute, or holds the GIL) has
stopped when its process has ended; the first beat has the pid.
"""

from __future__ import annotations

import _thread
import asyncio
import faulthandler
import gc
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from asyncio import all_tasks
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from os import fork
from pathlib import Path
from signal import setitimer
from typing import Any, TypedDict

from langgraph.graph import START, StateGraph
from langgraph.types import Send

from graphs.beats import beat

_BEAT_SECONDS = 0.01
_PROJECT = Path(__file__).parents[1]
_KEPT: list[object] = []
_LOCK = asyncio.Lock()


class State(TypedDict, total=False):
    kind: str
    beats: str
    width: int
    seconds: float
    method: str
    pids: list[int]


async def async_sleep(state: State) -> State:
    try:
        beat(state.get("beats"), "asleep")
        await asyncio.sleep(60)
    finally:
        beat(state.get("beats"), "finally")
    return {}


_CALLS: dict[Path, asyncio.Task[None]] = {}


async def share_call(state: State) -> State:
    """Wait for a call together with other runs: the first of them has started it."""
    path = state.get("beats") or ""
    call = _CALLS.get(Path(path).parent)
    if call is None or call.done():
        call = asyncio.create_task(asyncio.sleep(state.get("seconds") or 0))
        _CALLS[Path(path).parent] = call
    beat(path, "waiting")
    await asyncio.shield(call)
    beat(path, "shared")
    return {}


async def wait_for_call(state: State) -> State:
    """Wait for a call that another run has started, as soon as there is one."""
    path = Path(state["beats"])
    while (call := _CALLS.get(path.parent)) is None or call.done():
        await asyncio.sleep(_BEAT_SECONDS)
    beat(str(path), "waiting")
    await asyncio.shield(call)
    beat(str(path), "shared")
    return {}


class _BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit("no disk")


async def break_log(_state: State) -> State:
    """Leave closed standard streams and a log handler that raises."""
    print("to standard output")
    logging.getLogger("project").warning("to the log")
    logging.getLogger().addHandler(_BrokenHandler())
    sys.stdout.close()
    sys.stderr.close()
    return {}


async def attack_process(state: State) -> State:
    """Do what would end the process, which has other runs, and cancel all tasks that there are."""
    loop = asyncio.get_running_loop()
    loop.call_soon(sys.exit)
    threading.Thread(target=loop.call_soon_threadsafe, args=(sys.exit,)).start()
    setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    faulthandler.dump_traceback_later(0.01, exit=True)
    await asyncio.sleep(1)
    beat(state.get("beats"), "beat")
    everything = [one for one in gc.get_objects() if isinstance(one, asyncio.Task)]
    for task in all_tasks().union(everything):
        task.cancel()
    await asyncio.sleep(0)
    return {}


async def async_beats(state: State) -> State:
    while True:
        beat(state.get("beats"), "beat")
        await asyncio.sleep(_BEAT_SECONDS)


async def leave_beats(state: State) -> State:
    """Leave a task that goes on beside the next nodes, and after the run."""
    _KEPT.append(asyncio.create_task(async_beats(state)))
    return {}


async def drop_generator(state: State) -> State:
    """Leave a generator that only the garbage collector can find, which does not look for it."""

    async def generator():
        try:
            yield
        finally:
            beat(state.get("beats"), "closed")

    dropped = [generator()]
    await anext(dropped[0])
    dropped.append(dropped)
    dropped = None
    gc.freeze()
    await asyncio.sleep(60)
    return {}


def time_sleep(state: State) -> State:
    try:
        beat(state.get("beats"), "asleep")
        time.sleep(60)
    finally:
        beat(state.get("beats"), "finally")
    return {}


def timer_beats(state: State) -> State:
    """Beat in the handler of a timer, which does not need the node to go on."""
    signal.signal(signal.SIGALRM, lambda *_: beat(state.get("beats"), "beat"))
    signal.setitimer(signal.ITIMER_REAL, _BEAT_SECONDS, _BEAT_SECONDS)
    time.sleep(60)
    return {}


def sync_beats(state: State) -> State:
    while True:
        beat(state.get("beats"), "beat")
        time.sleep(_BEAT_SECONDS)


def spin(state: State) -> State:
    last = 0.0
    while True:
        now = time.monotonic()
        if now - last > _BEAT_SECONDS:
            last = now
            beat(state.get("beats"), "beat")


def swallow_sync(state: State) -> State:
    while True:
        try:
            beat(state.get("beats"), "beat")
            time.sleep(_BEAT_SECONDS)
        except BaseException:
            pass


async def swallow_async(state: State) -> State:
    while True:
        try:
            beat(state.get("beats"), "beat")
            await asyncio.sleep(_BEAT_SECONDS)
        except BaseException:
            pass


async def block_loop(state: State) -> State:
    while True:
        beat(state.get("beats"), "beat")
        time.sleep(_BEAT_SECONDS)


def regex(state: State) -> State:
    re.match(r"(a+)+$", "a" * 64 + "b")
    return {}


def hold_gil(state: State) -> State:
    """Run C code that neither handles signals nor releases the GIL for minutes."""
    beat(state.get("beats"), "beat")
    sum(range(10**11))
    return {}


def wait_for_subprocess(state: State) -> State:
    program = (
        "import os,sys,time\n"
        "while True:\n"
        "    fd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND|os.O_CREAT)\n"
        "    os.write(fd,f'beat {os.getpid()} {time.monotonic():.6f}\\n'.encode());os.close(fd)\n"
        "    time.sleep(0.01)\n"
    )
    subprocess.run([sys.executable, "-S", "-c", program, state["beats"]], check=False)
    return {}


async def beating_subprocess(state: State) -> State:
    """Wait for a subprocess that beats, on the event loop."""
    code = (
        "from graphs.beats import beat\nimport sys, time\nwhile True: beat(sys.argv[1], 'beat'); "
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code + "time.sleep(0.01)", state.get("beats", ""), cwd=_PROJECT
    )
    await process.wait()
    return {}


async def beating_fork(state: State) -> State:
    """Sleep beside a process that beats. It is started by a function that is imported by name."""
    if fork() == 0:
        while True:
            beat(state.get("beats"), "beat")
            time.sleep(_BEAT_SECONDS)
    await asyncio.sleep(60)
    return {}


async def exhaust_memory(state: State) -> State:
    """Take 10 MB after another, 2 GB at most."""
    kept = []
    for _ in range(200):
        kept.append(b"x" * 10_000_000)
        await asyncio.sleep(0.005)
    return {}


async def return_from_a_copy(state: State) -> State:
    """Let both processes of a fork return to the event loop."""
    fork()
    beat(state.get("beats"), "forked")
    await asyncio.sleep(0)
    beat(state.get("beats"), "returned")
    return {}


def leave_daemon(state: State) -> State:
    """Start a process in its own session, then sleep."""
    program = (
        "import os,sys,time\n"
        "while True:\n"
        "    fd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND|os.O_CREAT)\n"
        "    os.write(fd,f'beat {os.getpid()} {time.monotonic():.6f}\\n'.encode());os.close(fd)\n"
        "    time.sleep(0.01)\n"
    )
    subprocess.Popen([sys.executable, "-S", "-c", program, state["beats"]], start_new_session=True)
    time.sleep(state.get("seconds", 60))
    return {}


def _work(path: str, seconds: float) -> int:
    """Write beats in a process of a pool until the time is over."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        beat(path, "pooled")
        time.sleep(_BEAT_SECONDS)
    return os.getpid()


def use_pool(state: State) -> State:
    with multiprocessing.get_context(state.get("method", "fork")).Pool(2) as pool:
        work = [(state["beats"], state.get("seconds", 60))] * 2
        pids = pool.starmap(_work, work, chunksize=1)
    return {"pids": pids}


def lower_limits(state: State) -> State:
    """Leave less than the next run of this process needs."""
    beat(state.get("beats"), "left")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    sys.setrecursionlimit(100)
    return {}


async def shut_down_executor(state: State) -> State:
    beat(state.get("beats"), "left")
    await asyncio.get_running_loop().shutdown_default_executor()
    return {}


def import_slowly(state: State) -> State:
    os.environ["SLOW_IMPORT"] = str(state.get("seconds", 0))
    beat(state.get("beats"), "importing")
    import graphs.slow

    return {"method": graphs.slow.part.PART}


def close_descriptors(state: State) -> State:
    """Close all descriptors, as a daemon does, but in the child of the worker."""
    beat(state.get("beats"), "closing")
    os.closerange(3, 4096)
    return {}


async def _sleep_after(start: Callable[[str], None], state: State) -> State:
    start(state["beats"])
    await asyncio.sleep(60)
    return {}


async def chain_timers(state: State) -> State:
    """Leave callbacks that call themselves again, without a task: of a timer and of futures."""
    loop = asyncio.get_running_loop()

    def again(path: str) -> None:
        beat(path, "beat")
        loop.call_later(_BEAT_SECONDS, again, path)

    def after(future: asyncio.Future[str]) -> None:
        beat(future.result(), "beat")
        following = loop.create_future()
        following.add_done_callback(after)
        loop.call_later(_BEAT_SECONDS, following.set_result, future.result())

    first = loop.create_future()
    first.add_done_callback(after)
    first.set_result(state["beats"])
    return await _sleep_after(again, state)


async def restart_tasks(state: State) -> State:
    """Start a task again whenever it ends, also when it is cancelled."""

    def again(path: str) -> None:
        beat(path, "beat")
        task = asyncio.get_running_loop().create_task(asyncio.sleep(_BEAT_SECONDS))
        task.add_done_callback(lambda _: again(path))

    return await _sleep_after(again, state)


async def start_raw_thread(state: State) -> State:
    """Start a thread that `threading` does not know."""

    def work(path: str) -> None:
        while True:
            beat(path, "beat")
            time.sleep(_BEAT_SECONDS)

    return await _sleep_after(lambda path: _thread.start_new_thread(work, (path,)), state)


_POOL = ThreadPoolExecutor(1)


async def escape_context(state: State) -> State:
    """Leave tasks, timers, callbacks and a connection with contexts of their own, and a timer of
    the process."""
    loop, path = asyncio.get_running_loop(), state.get("beats")

    async def beats() -> None:
        while True:
            beat(path, "beat")
            await asyncio.sleep(_BEAT_SECONDS)

    def again() -> None:
        beat(path, "beat")
        loop.call_later(_BEAT_SECONDS, again, context=Context())

    def restart(_task: object) -> None:
        asyncio.create_task(asyncio.sleep(_BEAT_SECONDS)).add_done_callback(restart)
        beat(path, "beat")

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            beat(path, "beat")
            loop.call_later(_BEAT_SECONDS, self.transport.write, data)

    async def connect() -> None:
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        transport, _ = await loop.create_connection(Echo, *server.sockets[0].getsockname())
        transport.write(b"echo")
        _KEPT.extend([server, transport])

    again()
    restart(None)
    await asyncio.create_task(connect(), context=Context())
    _KEPT.append(asyncio.Task(beats(), loop=loop, context=Context()))
    _KEPT.append(asyncio.create_task(beats(), context=Context()))
    _KEPT.append(Context().run(asyncio.create_task, beats()))
    signal.signal(signal.SIGALRM, lambda *_: beat(path, "beat"))
    signal.setitimer(signal.ITIMER_REAL, _BEAT_SECONDS, _BEAT_SECONDS)
    await asyncio.sleep(60)
    return {}


async def hold_lock(state: State) -> State:
    """Wait for a lock of all runs; with `seconds`, keep it, and stop only when killed."""
    async with _LOCK:
        beat(state.get("beats"), "beat")
        while state.get("seconds"):
            with suppress(BaseException):
                await asyncio.sleep(_BEAT_SECONDS)
    return {}


def use_thread_pool(state: State) -> State:
    """Work on a pool of the project's, whose thread stays for later runs."""
    beats = state["beats"]
    _POOL.submit(lambda: beat(beats, "pool:beat")).result()
    return state


KINDS = {
    f.__name__: f
    for f in (
        async_sleep,
        async_beats,
        share_call,
        attack_process,
        wait_for_call,
        break_log,
        leave_beats,
        drop_generator,
        time_sleep,
        timer_beats,
        sync_beats,
        spin,
        swallow_sync,
        swallow_async,
        block_loop,
        regex,
        hold_gil,
        wait_for_subprocess,
        leave_daemon,
        beating_subprocess,
        beating_fork,
        exhaust_memory,
        return_from_a_copy,
        use_pool,
        chain_timers,
        restart_tasks,
        start_raw_thread,
        use_thread_pool,
        escape_context,
        hold_lock,
        close_descriptors,
        lower_limits,
        import_slowly,
        shut_down_executor,
    )
}


def begin(state: State) -> State:
    beat(state.get("beats"), "begin")
    return {}


def route(state: State):
    kind = state["kind"]
    if kind.startswith("sub_"):
        return "inner"
    if kind.startswith("fan_"):
        inner = {**state, "kind": kind.removeprefix("fan_")}
        return [Send(inner["kind"], inner) for _ in range(state.get("width", 3))]
    return kind


def _inner():
    graph = StateGraph(State)
    for name, node in KINDS.items():
        graph.add_node(name, node)
    graph.add_conditional_edges(START, lambda s: s["kind"].removeprefix("sub_"), list(KINDS))
    return graph.compile()


def _outer():
    graph = StateGraph(State).add_node("begin", begin).add_node("inner", _inner())
    for name, node in KINDS.items():
        graph.add_node(name, node)
    graph.add_edge(START, "begin")
    graph.add_conditional_edges("begin", route, [*KINDS, "inner"])
    return graph.compile()


graph = _outer()
