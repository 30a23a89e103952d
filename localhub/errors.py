"""Refusals of this Hub, in the form that the clients read."""

from pydantic import ValidationError


class HubError(Exception):
    """A request that is refused.

    The Hub's clients turn `X-Error-Code` into their typed exceptions (`RepoNotFound` becomes
    `BucketNotFoundError`, `EntryNotFound` becomes `RemoteEntryNotFoundError`) and show `X-Error-Message`.

    Args:
        status: HTTP status of the response.
        message: what is wrong, for a person; also the body's `error`.
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


def problems(error: ValidationError) -> list[str]:
    """Return every problem as `place: message`, without the input, which may hold secrets."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [": ".join(filter(None, (_place(one["loc"]), one["msg"]))) for one in found]


def _place(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
