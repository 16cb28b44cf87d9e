"""Times of scenes, as their files give them: rules count by these and never by a clock."""

from __future__ import annotations

import calendar
import re
from datetime import datetime, timedelta, timezone

from edge_rsvlm.errors import UsageError


def instant(when: str) -> datetime:
    """A time in UTC from ISO 8601: a time, a day (its middle), or a year (its middle); of no zone is UTC."""
    try:
        if re.fullmatch(r"\d{4}", when):
            days = 366 if calendar.isleap(int(when)) else 365
            return datetime(int(when), 1, 1, tzinfo=timezone.utc) + timedelta(days=days) / 2
        found = datetime.fromisoformat(when.replace("Z", "+00:00"))
    except ValueError as exc:
        raise UsageError(f"'{when}' is no time", fix="write it like 2024-05-01T10:00:00Z") from exc
    if re.fullmatch(r"\d{4}-\d\d-\d\d", when):
        found += timedelta(hours=12)
    return found.replace(tzinfo=timezone.utc) if found.tzinfo is None else found.astimezone(timezone.utc)


def written(time: datetime) -> str:
    """ISO 8601 in UTC, to the second."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
