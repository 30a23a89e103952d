"""The one reader of dates that others write: ISO 8601 of the Hub and of files, and HTTP's `Date`.

Python's own readers let out ValueError, TypeError and OverflowError by turns, and take times that no arithmetic survives (the
year 1, 23 hours east of Greenwich).
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""Bounds of what is taken for a time: ages, expiries and time zones may be added to it."""

_LONGEST: Final = 64


def iso_date(text: object) -> datetime:
    """Read a date of ISO 8601; one without a time zone is UTC.

    Args:
        text: What is to be one.

    Returns:
        The moment, in UTC.

    Raises:
        ValueError: It is none, or not between the years 1970 and 9000.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError("is not an ISO 8601 date")
    try:
        moment = datetime.fromisoformat(text)
        return _in_range(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise ValueError("is not an ISO 8601 date between the years 1970 and 9000") from None


def http_date(text: str) -> datetime | None:
    """Read a header's date, such as `Date` or `Retry-After`.

    Returns:
        The moment, in UTC; None where it is none, or not between the years 1970 and 9000.
    """
    if len(text) > _LONGEST:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return _in_range(moment if moment.tzinfo else moment.replace(tzinfo=UTC))  # "-0000" is UTC, says RFC 5322
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _in_range(moment: datetime) -> datetime:
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    if not EARLIEST <= moment < LATEST:
        raise ValueError("is out of range")
    return moment
