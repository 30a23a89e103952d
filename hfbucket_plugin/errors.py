"""Exceptions of this package, grouped by how a handler reacts to them.

::

    HFBucketError
    ├── ConfigError (ValueError)          fix the configuration; never retried
    ├── KeyFormatError (ValueError)       not an LMCache key: skip it
    ├── RefusedError (ValueError)         the request is never carried out
    │   └── SafetyError                   a plan or listing looks wrong; nothing was deleted
    ├── MissingError (LookupError)        a miss
    │   ├── ObjectMissingError
    │   └── BucketMissingError            for a writer: create it, or fix the handle
    ├── AccessDeniedError (PermissionError)   fix the token or its rights
    ├── ThrottledError                    wait `retry_after`
    │   └── BudgetError                   client-side limit: raise `max_hub_calls_per_minute`, or call less
    ├── BreakerOpenError                  no request was made; the breaker closes by itself
    ├── TransportError (ConnectionError)  try again later
    │   └── DeadlineError (TimeoutError)
    │       └── UnsentError               says nothing about the Hub or the store
    ├── RevokedError                      the buffer's owner revoked it: nothing failed
    ├── IntegrityError                    never serve these bytes
    │   └── HashMismatchError             do not trust the object either
    ├── TempDirError                      make room in `download_tmp_dir`
    ├── LocalFileError (OSError)          make room on that disk, or fix the rights
    └── PartialFailureError               check `failures`, item by item

`kind` is a stable, machine-readable word for metrics and reports; words are only ever added.
Every class pickles with its fields, because errors cross process borders on Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


class HFBucketError(Exception):
    """Base of all errors raised by this package.

    Args:
        message: One sentence that names the object, the problem and the next step; never a token.
    """

    kind: ClassVar[str] = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword fields do not pickle by default, so rebuild them without calling a constructor.
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(cls: type[HFBucketError], fields: dict[str, Any]) -> HFBucketError:
    error = cls.__new__(cls, fields["message"])
    error.args = (fields["message"],)
    error.__dict__.update(fields)
    return error


class ConfigError(HFBucketError, ValueError):
    """A setting is missing, unknown or invalid. The message names the setting and the instance."""

    kind = "config"


class KeyFormatError(HFBucketError, ValueError):
    """A string is not a key, or an object name was not written by this package or LMCache."""

    kind = "key"


class RefusedError(HFBucketError, ValueError):
    """The request is never carried out, such as a partial upload."""

    kind = "refused"


class SafetyError(RefusedError):
    """A plan, or the listing that it was made from, looks wrong; nothing is deleted."""


class MissingError(HFBucketError, LookupError):
    """A requested object or bucket does not exist."""

    kind = "missing"


class ObjectMissingError(MissingError):
    """The bucket exists, but the object does not."""

    kind = "missing"


class BucketMissingError(MissingError):
    """The bucket does not exist, or the token may not see it: the Hub does not tell the two apart."""

    kind = "bucket_missing"


class AccessDeniedError(HFBucketError, PermissionError):
    """The Hub or the CAS answered 401 or 403.

    Args:
        message: See `HFBucketError`.
        status: The HTTP status, 401 or 403.
    """

    kind = "denied"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ThrottledError(HFBucketError):
    """The Hub answered 429: the quota of the token's account is used up.

    Args:
        message: See `HFBucketError`.
        retry_after: Seconds to wait according to the Hub; None if it did not say.
    """

    kind = "throttled"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BudgetError(ThrottledError):
    """`max_hub_calls_per_minute` is used up; no request was made."""

    kind = "budget"


class BreakerOpenError(HFBucketError):
    """The instance's breaker is open after repeated transport failures; no request was made."""

    kind = "breaker"


class TransportError(HFBucketError, ConnectionError):
    """The Hub or the CAS could not be reached, or sent an unusable response (5xx, garbage)."""

    kind = "transport"


class DeadlineError(TransportError, TimeoutError):
    """No response arrived before the deadline; the call was abandoned."""

    kind = "deadline"


class UnsentError(DeadlineError):
    """The deadline passed before the request was sent, while it waited in a queue of this process.

    It says nothing about the Hub or the store, so no breaker counts it and no session is doubted for it.
    """

    kind = "deadline"


class RevokedError(HFBucketError):
    """The owner of a buffer revoked it while it was being read or written.

    It says nothing about the store or the session, so no breaker counts it and no session is doubted for it.
    """

    kind = "revoked"


class IntegrityError(HFBucketError):
    """The bytes that arrived are not the object: too few, too many, or with another hash."""

    kind = "integrity"


class HashMismatchError(IntegrityError):
    """The expected number of bytes arrived, but with another Xet hash."""

    kind = "integrity"


class TempDirError(HFBucketError):
    """There was no space for a temporary file. Says nothing about the bucket."""

    kind = "scratch"


class LocalFileError(HFBucketError, OSError):
    """A local target file could not be written. Says nothing about the bucket.

    Args:
        message: See `HFBucketError`.
        number: Error number of the system, as in the module `errno`.
    """

    kind = "file"

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """One item of a batch that failed.

    Attributes:
        item: Key or path.
        kind: `kind` of the error, or ``hub`` if the Hub returned only a text.
        message: Description of the problem.
    """

    item: str
    kind: str
    message: str


class PartialFailureError(HFBucketError):
    """Some items of a batch failed; the others succeeded.

    Args:
        message: See `HFBucketError`.
        failures: Failed items.
    """

    kind = "partial"

    def __init__(self, message: str, failures: tuple[ItemFailure, ...]) -> None:
        super().__init__(message)
        self.failures = failures


class Interrupted(BaseException):
    """SIGTERM or SIGINT arrived while nothing was in progress that needs an orderly end.

    Not an error: as with KeyboardInterrupt, error handlers must not catch it.
    """
