"""Test that the statements of many runs are executed together, and alone where that fails."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from belay_workers.host.group_commit import GroupCommit, Together


class Database:
    """A connection that executes work at once, or fails first."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []

    def run(self, work, *, keep_waiting):
        if self.failures:
            error = self.failures.pop(0)
            if not keep_waiting():
                raise error
        return work("connection")


class Work:
    """A statement that doubles numbers. `left_out` are done alone."""

    def __init__(self) -> None:
        self.statements: list[list[int]] = []
        self.alone: list[int] = []
        self.left_out: set[int] = set()
        self.together = Together(self._many, key=lambda number: number)

    def _many(self, _conn, numbers):
        self.statements.append(list(numbers))
        return {number: number * 2 for number in numbers if number not in self.left_out}

    def _one(self, number):
        def work(_conn):
            self.alone.append(number)
            if number < 0:
                raise ValueError(number)
            return number * 2

        return work

    def do(self, commits, number):
        return commits.do(self.together, number, alone=self._one(number), keep_waiting=lambda: True)

    def do_soon(self, commits, number):
        commits.do_soon(self.together, number, alone=self._one(number), keep_waiting=lambda: True)


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def database():
    return Database()


@pytest.fixture
def play(thread, database):
    """A function that plays a scene on an event loop, while the connection is in use at first."""

    def run(scene):
        async def main():
            may_go_on = threading.Event()
            thread.submit(may_go_on.wait)
            commits = GroupCommit(database, thread, asyncio.get_running_loop())
            return await scene(commits, may_go_on)

        return asyncio.run(main())

    return run


async def all_of(work, commits, may_go_on, numbers):
    calls = [asyncio.create_task(work.do(commits, number)) for number in numbers]
    await asyncio.sleep(0)
    may_go_on.set()
    return await asyncio.gather(*calls, return_exceptions=True)


def test_what_waits_is_done_by_one_statement(play):
    work = Work()
    assert play(lambda *given: all_of(work, *given, range(50))) == [n * 2 for n in range(50)]
    assert work.statements == [list(range(50))]
    assert work.alone == []


def test_a_statement_has_a_limited_number_of_items(play):
    work = Work()
    assert play(lambda *given: all_of(work, *given, range(250))) == [n * 2 for n in range(250)]
    assert [len(items) for items in work.statements] == [100, 100, 50]


def test_one_item_is_done_alone(play):
    work = Work()
    assert play(lambda *given: all_of(work, *given, [4])) == [8]
    assert (work.statements, work.alone) == ([], [4])


def test_what_a_statement_leaves_out_is_done_alone_and_fails_alone(play):
    work = Work()
    work.left_out = {2, -3}
    found = play(lambda *given: all_of(work, *given, [1, 2, -3, 4]))
    assert (found[:2], found[3]) == ([2, 4], 8)
    assert isinstance(found[2], ValueError)
    assert work.alone == [2, -3]


def test_after_an_error_of_a_statement_all_are_done_alone(play, database):
    work = Work()
    database.failures = [psycopg.errors.LockNotAvailable()]
    assert play(lambda *given: all_of(work, *given, [1, 2, 3])) == [2, 4, 6]
    assert (work.statements, work.alone) == ([], [1, 2, 3])


def test_an_unexpected_error_of_a_statement_loses_nothing(play):
    def fail(_conn, _items):
        raise TypeError("a bug")

    work = Work()
    work.together = Together(fail, key=lambda number: number)
    found = play(lambda *given: all_of(work, *given, [1, 2, -3]))
    assert found[:2] == [2, 4]
    assert isinstance(found[2], ValueError)


def test_calls_for_the_same_item_are_done_once(play):
    work = Work()
    assert play(lambda *given: all_of(work, *given, [1, 1, 2])) == [2, 2, 4]
    assert work.statements == [[1, 2]]


def test_what_nothing_waits_for_goes_with_the_next_statement_or_soon(play):
    work = Work()

    async def scene(commits, may_go_on):
        may_go_on.set()
        work.do_soon(commits, 1)
        assert await work.do(commits, 2) == 4
        assert work.statements == [[1, 2]]
        work.do_soon(commits, 3)
        work.do_soon(commits, 4)
        while len(work.statements) < 2:
            await asyncio.sleep(0.001)

    play(scene)
    assert work.statements == [[1, 2], [3, 4]]


def test_statements_of_different_kinds_do_not_mix(play):
    first, second = Work(), Work()

    async def scene(commits, may_go_on):
        calls = [asyncio.create_task(first.do(commits, n)) for n in range(3)]
        calls += [asyncio.create_task(second.do(commits, n)) for n in range(3)]
        await asyncio.sleep(0)
        may_go_on.set()
        return await asyncio.gather(*calls)

    assert play(scene) == [0, 2, 4, 0, 2, 4]
    assert first.statements == second.statements == [[0, 1, 2]]


def test_a_call_that_was_cancelled_is_done_and_holds_up_no_other(play):
    work = Work()

    async def scene(commits, may_go_on):
        cancelled = asyncio.create_task(work.do(commits, 1))
        other = asyncio.create_task(work.do(commits, 2))
        await asyncio.sleep(0)
        cancelled.cancel()
        may_go_on.set()
        return await other

    assert play(scene) == 4
    assert work.statements == [[1, 2]]
