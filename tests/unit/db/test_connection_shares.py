"""Test that one caller gets at most half of a pool's connections and waits for its own."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest

from belay_server.db.postgres.connection_shares import ConnectionShares
from belay_server.domain.errors import TooMany


def test_a_caller_gets_at_most_half_of_the_connections():
    callers = ["ann"]
    shares = ConnectionShares(6, lambda: callers[0], seconds=0.01)
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(shares.hold(nullcontext()))
        with pytest.raises(TooMany), shares.hold(nullcontext()):
            pass
        callers[0] = "bob"
        with shares.hold(nullcontext()):
            pass
    callers[0] = "ann"
    with shares.hold(nullcontext()):
        pass
    assert not shares._shares


def test_the_server_itself_has_no_connection_limit():
    shares = ConnectionShares(2, lambda: None, seconds=0.01)
    with ExitStack() as held:
        for _ in range(10):
            held.enter_context(shares.hold(nullcontext()))


def test_a_caller_may_use_both_connections_of_a_pool_of_two():
    shares = ConnectionShares(2, lambda: "ann", seconds=0.01)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(shares.hold(nullcontext()))
        with pytest.raises(TooMany):
            held.enter_context(shares.hold(nullcontext()))


def test_a_stream_counts_for_its_caller_after_its_request():
    shares = ConnectionShares(4, lambda: None, seconds=0.01)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(shares.hold(nullcontext(), "ann"))
        with pytest.raises(TooMany):
            held.enter_context(shares.hold(nullcontext(), "ann"))
        held.enter_context(shares.hold(nullcontext(), "bob"))
