from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from belay_workers.child.main_thread_executor import MainThreadExecutor, RunCancelled


@pytest.fixture
def executor():
    made = MainThreadExecutor()
    yield made
    made.shutdown()


def serve_while(executor, work):
    """Run `work(executor)` in another thread while the main thread serves calls."""
    with ThreadPoolExecutor(1) as other:
        return executor.serve(lambda: other.submit(work, executor)).result()


def test_one_call_runs_on_the_main_thread(executor):
    thread = serve_while(executor, lambda e: e.submit(threading.current_thread).result())
    assert thread is threading.main_thread()


COPY = """
import os
from concurrent.futures import ThreadPoolExecutor
from belay_workers.child.main_thread_executor import MainThreadExecutor

executor = MainThreadExecutor()
with ThreadPoolExecutor(1) as other:
    pid = executor.serve(lambda: other.submit(executor.submit(os.fork).result)).result()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_copy_of_the_process_ends_when_its_call_returns():
    done = subprocess.run(
        [sys.executable, "-c", COPY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "1\n", done.stderr


def test_a_second_concurrent_call_runs_in_the_pool(executor):
    both = threading.Barrier(2, timeout=10)

    def meet():
        both.wait()
        return threading.current_thread()

    def work(e):
        futures = [e.submit(meet), e.submit(meet)]
        return [future.result() for future in futures]

    threads = serve_while(executor, work)
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_calls_one_after_another_all_run_on_the_main_thread(executor):
    def work(e):
        return {e.submit(threading.current_thread).result() for _ in range(2000)}

    assert serve_while(executor, work) == {threading.main_thread()}


def test_an_exception_of_a_call_is_raised_to_its_caller(executor):
    def fail():
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        serve_while(executor, lambda e: e.submit(fail).result())


@pytest.mark.parametrize("kind", ["sleep", "spin"])
def test_a_signal_raises_in_the_call_and_its_finally_runs(executor, kind):
    left = []

    def node():
        try:
            if kind == "sleep":
                time.sleep(30)
            while True:
                pass
        finally:
            left.append("finally")

    def work(e):
        future = e.submit(node)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGURG)
        return future.result()

    before = signal.signal(signal.SIGURG, lambda *_: executor.raise_in_node())
    try:
        with pytest.raises(RunCancelled):
            serve_while(executor, work)
    finally:
        signal.signal(signal.SIGURG, before)
    assert left == ["finally"]


def test_a_signal_between_calls_raises_nothing(executor):
    def work(e):
        executor.raise_in_node()
        return e.submit(lambda: 5).result()

    assert serve_while(executor, work) == 5
