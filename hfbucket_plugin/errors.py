"""The exceptions of the product, grouped by what a handler would do with them.

::

    HFBucketError
    ├── ConfigError (ValueError)          fix the configuration; never retried
    ├── KeyFormatError (ValueError)       not a key of LMCache's: pass it by
    ├── RefusedError (ValueError)         the caller asked for what is never done
    │   └── SafetyError                   a plan or listing looks wrong; nothing was deleted
    ├── MissingError (LookupError)        a miss
    │   ├── ObjectMissingError
    │   └── BucketMissingError            for a writer: create it, or fix the handle
    ├── AccessDeniedError (PermissionError)   fix the token or its rights
    ├── ThrottledError                    wait `retry_after`
    │   └── BudgetError                   our own cap; raise `max_hub_calls_per_minute`, or ask less
    ├── BreakerOpenError                  not asked at all; closes by itself
    ├── TransportError (ConnectionError)  try again later
    │   └── DeadlineError (TimeoutError)
    │       └── UnsentError               says nothing about the Hub or the store
    ├── RevokedError                      the buffer's owner took it back: nothing failed
    ├── IntegrityError                    never serve these bytes
    │   └── HashMismatchError             nor trust the object
    ├── TempDirError                      make room in `download_tmp_dir`
    ├── LocalFileError (OSError)          make room on that disk, or fix the rights
    └── PartialFailureError               look at `failures`, item by item

`kind` is a stable, machine-readable word: it labels metrics and reports, and is only ever added to.
Every class pickles with its fields, since these cross process borders on Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


class HFBucketError(Exception):
    """The base of all errors raised by this product.

    Args:
        message: One sentence that names the thing, what was wrong, and what to do next. Never a token.
    """

    kind: ClassVar[str] = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword fields do not pickle by themselves: rebuild without calling a constructor.
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(cls: type[HFBucketError], fields: dict[str, Any]) -> HFBucketError:
    error = cls.__new__(cls, fields["message"])
    error.args = (fields["message"],)
    error.__dict__.update(fields)
    return error


class ConfigError(HFBucketError, ValueError):
    """A setting is missing, unknown or impossible. The message names the setting and the instance."""

    kind = "config"


class KeyFormatError(HFBucketError, ValueError):
    """A string is not a key, or an object name is not one that this product or LMCache wrote."""

    kind = "key"


class RefusedError(HFBucketError, ValueError):
    """The caller asked for something that is never done, such as a partial upload."""

    kind = "refused"


class SafetyError(RefusedError):
    """The plan or the listing that it came from looks wrong: nothing is deleted."""


class MissingError(HFBucketError, LookupError):
    """What was asked for is not there."""

    kind = "missing"


class ObjectMissingError(MissingError):
    """The bucket is there, the object is not."""

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
    """The Hub answered 429: the quota of the member that owns the token is used up.

    Args:
        message: See `HFBucketError`.
        retry_after: Seconds to wait, as the Hub said; None when it did not say.
    """

    kind = "throttled"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BudgetError(ThrottledError):
    """`max_hub_calls_per_minute` is used up: the Hub was not asked."""

    kind = "budget"


class BreakerOpenError(HFBucketError):
    """The instance's breaker is open after repeated transport failures: nothing was asked, so that nothing stalls."""

    kind = "breaker"


class TransportError(HFBucketError, ConnectionError):
    """The Hub or the CAS could not be reached, or answered what no client can use (5xx, garbage)."""

    kind = "transport"


class DeadlineError(TransportError, TimeoutError):
    """No answer before the deadline; the call was abandoned, not waited for."""

    kind = "deadline"


class UnsentError(DeadlineError):
    """The time was over before anything was sent: it waited in a queue of this process.

    It says nothing about the Hub or the store, so no breaker counts it and no session is doubted for it.
    """

    kind = "deadline"


class RevokedError(HFBucketError):
    """The owner of a buffer took it back while it was being read or written.

    It says nothing about the store or the session, so no breaker counts it and no session is doubted for it.
    """

    kind = "revoked"


class IntegrityError(HFBucketError):
    """Bytes arrived that are not the object: too few, too many, or of another hash."""

    kind = "integrity"


class HashMismatchError(IntegrityError):
    """As many bytes arrived as the object has, and they are not those that its Xet hash names."""

    kind = "integrity"


class TempDirError(HFBucketError):
    """There was no space for a temporary file. Says nothing against the bucket."""

    kind = "scratch"


class LocalFileError(HFBucketError, OSError):
    """A file that was to be filled could not be written. Says nothing against the bucket.

    Args:
        message: See `HFBucketError`.
        number: What the system said, of the module `errno`.
    """

    kind = "file"

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """One item of a batch that failed.

    Attributes:
        item: The key or path.
        kind: The `kind` of the error, or ``hub`` where the Hub only gave a text.
        message: What was wrong, in words.
    """

    item: str
    kind: str
    message: str


class PartialFailureError(HFBucketError):
    """Some items of a batch failed; the others were done.

    Args:
        message: See `HFBucketError`.
        failures: What failed, item by item.
    """

    kind = "partial"

    def __init__(self, message: str, failures: tuple[ItemFailure, ...]) -> None:
        super().__init__(message)
        self.failures = failures


class Interrupted(BaseException):
    """SIGTERM or SIGINT came while there was nothing in progress that would have to be ended in order.

    An order and no error: as with KeyboardInterrupt, no handler of errors may eat it.
    """
