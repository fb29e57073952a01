"""Test when crons are due: fields, names, timezones, and days on which clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from belay_server.domain.schedules import check_schedule, check_timezone, next_time

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def times(schedule, timezone, after, count):
    found = []
    for _ in range(count):
        after = next_time(schedule, timezone, after)
        found.append(after.isoformat().removesuffix(":00+00:00"))
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("* * * * *", ["2026-11-21T12:01", "2026-11-21T12:02"]),
        ("*/15 9-17 * * MON-FRI", ["2026-11-23T09:00", "2026-11-23T09:15"]),
        ("@daily", ["2026-11-22T00:00", "2026-11-23T00:00"]),
        ("@Hourly", ["2026-11-21T13:00", "2026-11-21T14:00"]),
        ("@weekly", ["2026-11-22T00:00", "2026-11-29T00:00"]),
        ("@monthly", ["2026-12-01T00:00", "2027-01-01T00:00"]),
        ("@yearly", ["2027-01-01T00:00", "2028-01-01T00:00"]),
        ("0 0 29 2 *", ["2028-02-29T00:00", "2032-02-29T00:00"]),
    ],
)
def test_a_schedule_yields_its_next_due_times(schedule, expected):
    assert times(schedule, None, NOON, 2) == expected


def test_the_sixth_field_of_a_schedule_is_the_seconds():
    first = next_time("* * * * * */20", None, NOON)
    assert first == datetime(2026, 11, 21, 12, 0, 20, tzinfo=UTC)
    assert next_time("30 12 * * * 5", None, NOON) == datetime(2026, 11, 21, 12, 30, 5, tzinfo=UTC)


def test_a_schedule_is_evaluated_in_its_timezone():
    assert times("0 9 * * *", "America/New_York", NOON, 1) == ["2026-11-21T14:00"]
    assert times("0 9 * * *", "Asia/Kolkata", NOON, 1) == ["2026-11-22T03:30"]


def test_a_time_that_is_skipped_in_spring_is_due_right_after():
    before = datetime(2026, 3, 28, 12, 0, tzinfo=UTC)
    expected = ["2026-03-29T01:00", "2026-03-30T00:30"]
    assert times("30 2 * * *", "Europe/Berlin", before, 2) == expected


def test_a_time_that_is_repeated_in_autumn_is_due_once():
    before = datetime(2026, 10, 24, 12, 0, tzinfo=UTC)
    expected = ["2026-10-25T00:30", "2026-10-26T01:30"]
    assert times("30 2 * * *", "Europe/Berlin", before, 2) == expected


@pytest.mark.parametrize("second", ["0", "30", "07"])
def test_a_schedule_with_one_second_follows_clock_changes_like_one_without(second):
    """cronsim alone skips such a time in spring."""
    schedule = f"30 2 * * * {second}"
    for before in (datetime(2026, 3, 28, 12, 0, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC)):
        plain = next_time("30 2 * * *", "Europe/Berlin", before)
        assert plain is not None
        due = next_time(schedule, "Europe/Berlin", before)
        assert due == plain + timedelta(seconds=int(second))
        assert next_time(schedule, "Europe/Berlin", due - timedelta(seconds=1)) == due
        later = next_time(schedule, "Europe/Berlin", due)
        assert later is not None
        assert timedelta(hours=20) < later - due < timedelta(hours=26)


def test_a_half_hourly_schedule_is_unaffected_by_clock_changes():
    before = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)
    expected = [f"2026-10-25T0{n // 2}:{n % 2 * 3}0" for n in range(1, 6)]
    assert times("*/30 * * * *", "Europe/Berlin", before, 5) == expected


@pytest.mark.parametrize(
    "schedule",
    ["", "bad", "* * * *", "* * * * * * *", "60 * * * *", "* * * * * 60", "@never", "0 0 31 2 *"],
)
def test_an_invalid_schedule_is_refused_with_the_reason(schedule):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        check_schedule(schedule)


@pytest.mark.parametrize("timezone", ["Bad/Zone", "", "../etc/passwd", "x" * 500])
def test_an_unknown_timezone_is_refused(timezone):
    with pytest.raises(ValueError, match="not a known timezone"):
        check_timezone(timezone)
