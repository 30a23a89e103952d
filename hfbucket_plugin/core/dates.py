"""Parser of foreign dates: ISO 8601 of the Hub and of files, and HTTP's `Date`.

Python's own parsers raise ValueError, TypeError or OverflowError, and accept times that arithmetic cannot handle (year
1, UTC+23).
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""Latest accepted time; bounds leave room for adding ages, expiries and time zones."""

_LONGEST: Final = 64


def iso_date(text: object) -> datetime:
    """Parse an ISO 8601 date; without a time zone it is UTC.

    Args:
        text: Text to parse.

    Returns:
        The time in UTC.

    Raises:
        ValueError: It is not a date, or not between the years 1970 and 9000.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError("is not an ISO 8601 date")
    try:
        moment = datetime.fromisoformat(text)
        return _in_range(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise ValueError("is not an ISO 8601 date between the years 1970 and 9000") from None


def http_date(text: str) -> datetime | None:
    """Parse a date of an HTTP header, such as `Date` or `Retry-After`.

    Returns:
        The time in UTC; None if it is not a date, or not between the years 1970 and 9000.
    """
    if len(text) > _LONGEST:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return _in_range(moment if moment.tzinfo else moment.replace(tzinfo=UTC))  # RFC 5322: "-0000" is UTC
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _in_range(moment: datetime) -> datetime:
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    if not EARLIEST <= moment < LATEST:
        raise ValueError("is out of range")
    return moment
