"""The refusals of this Hub, in the shape that the clients read."""


class HubError(Exception):
    """A request that is refused.

    The Hub's clients turn `X-Error-Code` into their typed exceptions (`RepoNotFound` becomes
    `BucketNotFoundError`, `EntryNotFound` becomes `RemoteEntryNotFoundError`) and show `X-Error-Message`.

    Args:
        status: HTTP status of the answer.
        message: what was wrong, for a person; also the body's `error`.
        code: value of `X-Error-Code`, or None for no such header.
        extra: more fields of the JSON body.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, extra: dict[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = extra or {}


def bad_request(message: str) -> HubError:
    """Return a 400 with `message`."""
    return HubError(400, message)


def bucket_not_found(bucket_id: str) -> HubError:
    """Return the 404 for a bucket that does not exist, or that the caller may not see."""
    return HubError(404, f"Bucket not found: {bucket_id}", code="RepoNotFound")


def entry_not_found(path: str) -> HubError:
    """Return the 404 for a path that a bucket does not hold."""
    return HubError(404, f"Entry not found: {path}", code="EntryNotFound")
