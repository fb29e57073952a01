"""Compute when a cron is due.

The library is cronsim, which handles changes of the clock as Debian's cron: a time that is skipped
is due right after the change, and a time that occurs twice is due once, unless the minute or the
hour starts with `*`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

#: The values of a seconds field that is one number.
_SECONDS = {str(second) for second in range(60)} | {f"0{second}" for second in range(10)}
#: The names for schedules that cron has.
_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


def check_schedule(schedule: str) -> None:
    """Raise ValueError with the reason if a schedule is invalid.

    A schedule has five fields, or six with the seconds last, or is a name such as `@daily`.
    """
    if next_time(schedule, None, datetime(2026, 1, 1, tzinfo=UTC)) is None:
        raise ValueError("it is never due")


def check_timezone(name: str) -> None:
    """Raise ValueError if there is no timezone of this name in the IANA database."""
    _zone(name)


def next_time(schedule: str, timezone: str | None, after: datetime) -> datetime | None:
    """Return the first due time after `after`, in UTC. Return None if there is none.

    Raises ValueError for an invalid schedule or timezone.
    """
    fields = _ALIASES.get(schedule.strip().lower(), schedule).split()
    past_the_minute = timedelta()
    if len(fields) == 6 and fields[-1] in _SECONDS:
        # cronsim handles changes of the clock in schedules of five fields alone.
        past_the_minute = timedelta(seconds=int(fields.pop()))
    elif len(fields) == 6:
        # LangGraph's server has the seconds last, cronsim has them first.
        fields = [fields[-1], *fields[:-1]]
    elif len(fields) != 5:
        raise ValueError("it must have five fields, or six with the seconds last")
    before = (after - past_the_minute).astimezone(_zone(timezone))
    try:
        found = next(CronSim(" ".join(fields), before), None)
    except CronSimError as error:
        raise ValueError(str(error)) from error
    return None if found is None else found.astimezone(UTC) + past_the_minute


def _zone(name: str | None) -> tzinfo:
    if name is None:
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"'{name}' is not a known timezone") from error
