"""Test that large requests do not delay others: they are refused early or handled in turns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import marshmallow as ma
import pytest

import belay_server.api
from belay_server.api.http.bodies.large_bodies import LargeBodies
from belay_server.api.http.bodies.unread_bodies import _Chunks, _SizedBody
from belay_server.api.http.fields import Body, List, Map
from belay_server.api.streaming.clients import in_parts
from belay_server.bus.event_log import Event, Position
from belay_server.runtime.turns import Turns
from belay_server.services.agent_runs.output_schemas import OutputSchemaChecks
from belay_server.states.jobs import check_schema
from belay_server.web_metrics import Coalesced
from tests.waiting import wait_until


class Counted(ma.fields.String):
    seen = 0

    def _deserialize(self, *args, **kwargs):
        self.seen += 1
        return super()._deserialize(*args, **kwargs)


def test_the_elements_of_a_list_that_is_too_long_are_not_checked():
    element = Counted()
    field = List(element, validate=ma.validate.Length(max=2))
    with pytest.raises(ma.ValidationError, match="Longer than maximum length 2"):
        field.deserialize(["a"] * 3)
    assert element.seen == 0
    assert field.deserialize(["a"] * 2) == ["a", "a"]


def test_other_requests_run_between_the_steps_of_a_schema_check(monkeypatch):
    turns = []
    monkeypatch.setattr(
        "belay_server.services.agent_runs.output_schemas.wait_for_turn", lambda: turns.append(0)
    )
    aside = []
    checks = OutputSchemaChecks(SimpleNamespace(run_aside=lambda *job: aside.append(job)))
    checks.check({"properties": {f"p{n}": {"type": "string"} for n in range(10)}})
    assert (turns, aside) == ([0], [])
    schema = {"properties": {"name": {"patternProperties": {"^a$": {}}}}}
    checks.check(schema)
    assert (turns, aside) == ([0], [(check_schema, schema)])


def test_every_list_and_map_of_a_request_checks_its_length_first():
    """marshmallow's own fields check each element before the length, so none may be used."""
    seen = 0
    folder = Path(belay_server.api.__file__).parent
    for file in folder.rglob("*schemas.py"):
        name = ".".join(file.relative_to(folder).with_suffix("").parts)
        for schema in vars(import_module(f"belay_server.api.{name}")).values():
            if not isinstance(schema, type) or not issubclass(schema, Body):
                continue
            for field_name, field in schema._declared_fields.items():
                seen += 1
                where = f"{name}.{schema.__name__}.{field_name}"
                assert type(field) not in (ma.fields.List, ma.fields.Dict), where
    assert seen > 100


def test_the_values_of_a_map_that_is_too_long_are_not_checked():
    value = Counted()
    field = Map(keys=ma.fields.String(), values=value, validate=ma.validate.Length(max=2))
    with pytest.raises(ma.ValidationError, match="Longer than maximum length 2"):
        field.deserialize({"a": "x", "b": "x", "c": "x"})
    assert value.seen == 0


def test_reading_a_body_of_many_chunks_yields_to_other_requests(monkeypatch):
    turns = []
    monkeypatch.setattr(
        "belay_server.api.http.bodies.unread_bodies.wait_for_turn", lambda: turns.append(0)
    )
    assert _Chunks(iter([b"x"] * 10_000)).read() == b"x" * 10_000
    assert turns == [0] * 156


def test_a_body_of_too_many_small_chunks_is_refused():
    small = _Chunks(iter([b"x" * 15] * 20_000), SimpleNamespace())
    with pytest.raises(ValueError, match="too small"):
        small.read()
    assert small.failed
    assert len(_Chunks(iter([b"x" * 16] * 20_000)).read()) == 320_000


_PARTS_OF_MANY = """
from gevent import monkey

monkey.patch_all()
import gevent

from belay_server.runtime.turns import wait_for_turn, yield_to_sockets

done = 0
between = []


def work():
    global done
    for _ in range(10):
        wait_for_turn()
        done += 1


def other():
    while done < 500:
        before = done
        yield_to_sockets()
        between.append(done - before)


gevent.joinall([gevent.spawn(other), *(gevent.spawn(work) for _ in range(50))], raise_error=True)
print(max(between), done)
"""


def test_parts_of_many_connections_are_done_one_by_one():
    """Another request that needs an iteration of the event loop waits for two parts at most."""
    ended = subprocess.run(
        [sys.executable, "-c", _PARTS_OF_MANY],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    most, done = map(int, ended.stdout.split())
    assert (most <= 2, done) == (True, 500), most


def test_a_large_body_is_received_in_large_steps(monkeypatch):
    """gunicorn copies its buffer at each read: steps of 64 KiB held up others for half a second."""
    turns, steps = [], []
    module = "belay_server.api.http.bodies.unread_bodies"
    monkeypatch.setattr(f"{module}.wait_for_turn", lambda: turns.append(0))
    text = b"x" * 3_000_000 + b"the end"

    class Received(BytesIO):
        def read(self, size):
            steps.append(size)
            return super().read(size)

    body = _SizedBody(Received(text), len(text))
    received = b"".join(iter(lambda: body.read(64 * 1024), b""))
    assert received == text
    assert steps == [2**20, 2**20, len(text) - 2 * 2**20]
    assert len(turns) == 2


def test_a_chunked_body_reads_like_a_file():
    text = b"".join(b"line %d\n" % number for number in range(50)) + b"the rest"
    for step in (1, 3, 1000):
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        assert _Chunks(iter(pieces)).read() == text
        for size in (1, 7, 10_000):
            chunks, expected = _Chunks(iter(pieces)), BytesIO(text)
            while data := expected.read(size):
                assert chunks.read(size) == data
            assert chunks.read(size) == b""
        for size in (-1, 4, 100):
            chunks, expected = _Chunks(iter(pieces)), BytesIO(text)
            while data := expected.readline(size):
                assert chunks.readline(size) == data
            assert chunks.readline(size) == b""


def test_small_requests_run_between_two_large_bodies(monkeypatch):
    pauses = []
    monkeypatch.setattr("belay_server.api.http.bodies.large_bodies.time.sleep", pauses.append)
    bodies = LargeBodies(1024 * 1024, lambda: "caller")
    for size in (300_000, 300_000, 100):
        with bodies.turn(size):
            pass
    assert pauses[0] == 0
    assert 0 < pauses[1] <= 0.02
    assert len(pauses) == 2


def event(**fields):
    return Event(**{"position": Position(1, 1), "name": "values", "data": b"", **fields})


def test_a_long_log_is_translated_in_parts():
    small = [event(data=b"1") for _ in range(130)]
    assert [len(part) for part in in_parts(small)] == [64, 64, 2]
    large = [event(data=b"1" * 70_000) for _ in range(3)]
    assert [len(part) for part in in_parts(large)] == [1, 1, 1]
    left = [event(data=b"1"), event(left_in_log=300_000), event(data=b"1"), event(data=b"1")]
    assert [len(part) for part in in_parts(left)] == [1, 1, 2]


def test_streams_take_turns_one_at_a_time():
    turns, at_work, most = Turns(), [], []

    def work(_):
        for _ in range(20):
            with turns.turn("caller"):
                at_work.append(1)
                most.append(len(at_work))
                time.sleep(0.0005)
                at_work.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert set(most) == {1}


def test_callers_go_one_after_the_other_however_many_streams_they_have():
    turns, order = Turns(), []

    def work(caller: str) -> None:
        with turns.turn(caller):
            order.append(caller)

    with turns.turn("first"):
        waiting = []
        for caller in ("a", "a", "a", "a", "b", None, "b"):
            waiting.append(threading.Thread(target=work, args=(caller,)))
            waiting[-1].start()
            queued = len(waiting)
            wait_until(lambda: sum(map(len, turns._waiting.values())) == queued, what="the queue")
    for thread in waiting:
        thread.join(10)
    assert order == ["a", "b", None, "a", "b", "a", "a"]
    with turns.turn("b"):
        pass


class Interrupted:
    def acquire(self):
        raise InterruptedError


def test_a_stream_whose_wait_is_interrupted_leaves_the_queue():
    turns = Turns()

    def interrupt():
        wait_until(lambda: turns._waiting, what="the second stream to wait")
        os.kill(os.getpid(), signal.SIGALRM)

    def handle(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with turns.turn("a"):
            threading.Thread(target=interrupt).start()
            with pytest.raises(InterruptedError), turns.turn("b"):
                pass
            assert not turns._waiting
    finally:
        signal.signal(signal.SIGALRM, before)
    with turns.turn("b"):
        pass


def test_a_stream_that_is_interrupted_when_its_turn_comes_passes_it_on():
    turns = Turns()
    with turns.turn("a"):
        turns._take_or_queue("b")
    with pytest.raises(InterruptedError):
        turns._wait(Interrupted(), "b")
    with turns.turn("c"):
        assert not turns._waiting


def test_callers_who_wait_at_the_same_time_share_a_result_that_is_new_to_each():
    produced = []

    def produce():
        began = time.monotonic()
        time.sleep(0.05)
        produced.append(began)
        return began

    shared = Coalesced(0.01)

    def call(_number):
        called = time.monotonic()
        return shared.get(produce) > called

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(call, range(60)))
    assert len(produced) < 60
    assert shared.get(produce) == produced[-1]


def test_a_failure_is_shared_and_not_kept():
    shared = Coalesced(0)
    with pytest.raises(ValueError, match="no"):
        shared.get(lambda: int("no"))
    assert shared.get(lambda: 1) == 1
