"""Test that a time slice ends a loop only after its first item."""

from __future__ import annotations

import pytest

from belay_server.services.time_slice import TimeSlice


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, [1]), (1.0, [1]), (1.5, [1, 2]), (9, [1, 2, 3])]
)
def test_items_are_taken_until_the_time_is_over(seconds, expected):
    now = 100.0
    time_slice = TimeSlice(seconds, clock=lambda: now)
    taken = []
    for item in time_slice.take([1, 2, 3]):
        taken.append(item)
        now += 1.0
    assert taken == expected
    assert list(time_slice.take([])) == []
