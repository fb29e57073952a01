"""When a cron is due. The arithmetic is cronsim's, which knows what to do when clocks change: what
would be skipped comes right after, and what would come twice comes once."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

#: Names for schedules, as cron has them.
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
    """Five fields, six with the seconds last, or a name. Raises ValueError saying what is wrong."""
    if next_time(schedule, None, datetime(2026, 1, 1, tzinfo=UTC)) is None:
        raise ValueError("it never comes")


def check_timezone(name: str) -> None:
    """Raises ValueError."""
    _zone(name)


def next_time(schedule: str, timezone: str | None, after: datetime) -> datetime | None:
    """The first time after `after`, in UTC; None when there is none. Raises ValueError."""
    fields = _ALIASES.get(schedule.strip().lower(), schedule).split()
    if len(fields) == 6:
        # LangGraph's server has the seconds last, cronsim has them first.
        fields = [fields[-1], *fields[:-1]]
    elif len(fields) != 5:
        raise ValueError("it must have five fields, or six with the seconds last")
    try:
        found = next(CronSim(" ".join(fields), after.astimezone(_zone(timezone))), None)
    except CronSimError as error:
        raise ValueError(str(error)) from error
    return None if found is None else found.astimezone(UTC)


def _zone(name: str | None) -> tzinfo:
    if name is None:
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"'{name}' is no timezone") from error
