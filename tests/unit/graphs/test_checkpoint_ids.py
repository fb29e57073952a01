"""Test that a new checkpoint's id sorts after the ids that its writer has read."""

from __future__ import annotations

import pytest
from langgraph.checkpoint.base import id as library

from belay_server.graphs.checkpoints.ids import go_on_after


@pytest.fixture(autouse=True)
def clock_of_the_library():
    before = library._last_v6_timestamp
    yield
    library._last_v6_timestamp = before


def id_at(skew_seconds: float) -> str:
    """Return an id that a machine with this clock skew would create."""
    library._last_v6_timestamp = None
    now = library.uuid6(clock_seq=1)
    library._last_v6_timestamp = now.time + int(skew_seconds * 1e7)
    made = str(library.uuid6(clock_seq=1))
    library._last_v6_timestamp = None
    return made


def test_an_id_from_a_clock_that_is_ahead_is_followed_by_later_ones():
    ahead = id_at(600)
    assert str(library.uuid6(clock_seq=2)) < ahead
    go_on_after(ahead)
    following = [str(library.uuid6(clock_seq=2)) for _ in range(3)]
    assert [ahead, *following] == sorted([ahead, *following])


def test_an_id_from_the_past_has_no_effect():
    past = str(library.uuid6(clock_seq=1))
    library._last_v6_timestamp = None
    go_on_after(past)
    now = library.uuid6(clock_seq=2)
    assert str(now) > past


@pytest.mark.parametrize("other", ["not an id", "c4aab21d-2e8d-4783-b473-69d5ca8409b1", ""])
def test_ids_without_a_timestamp_are_ignored(other):
    library._last_v6_timestamp = None
    go_on_after(other)
    assert library._last_v6_timestamp is None
