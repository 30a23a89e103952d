"""Who may do what: `tokens.yaml`, and the answers of the Hub to those who may not."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from starlette.requests import Request

from localhub.errors import HubError, bucket_not_found
from localhub.state.buckets import Bucket

_MAX_BYTES: Final = 1024 * 1024

ANYBODY = "local"
"""The user that `me` means where there is no access control, or the token names none."""


class TokensError(ValueError):
    """`tokens.yaml` cannot be used; the message names the entry."""


class Token(BaseModel, extra="forbid", frozen=True):
    """One token of `tokens.yaml`.

    Attributes:
        token: the secret, as the clients send it.
        user: the namespace that `me` stands for.
        buckets: rights by bucket id or glob (`my-org/*`); the strongest that matches holds.
    """

    token: Annotated[str, Field(min_length=1, repr=False)]
    user: Annotated[str, Field(min_length=1)] = ANYBODY
    buckets: dict[str, Literal["read", "write"]]

    @field_validator("buckets")
    @classmethod
    def _ids(cls, buckets: dict[str, str]) -> dict[str, str]:
        for pattern in buckets:
            if pattern.count("/") != 1:
                raise ValueError(f"{pattern!r} is not of the form namespace/name")
        return buckets

    def allows(self, right: Literal["read", "write"], bucket_id: str) -> bool:
        """Whether this token has a right on a bucket; `write` includes `read`."""
        granted = {given for pattern, given in self.buckets.items() if fnmatchcase(bucket_id, pattern)}
        return "write" in granted or right in granted


class _File(BaseModel, extra="forbid"):
    tokens: list[Token]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: the last one would win, which may be the wider right."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`.

        Raises:
            yaml.constructor.ConstructorError: A key is there twice.
        """
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, "a key is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def _document(path: Path) -> Any:
    """The document of a YAML file.

    Raises:
        OSError: The file cannot be read.
        TokensError: It is longer than any list of tokens, or not YAML.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise TokensError(f"{path} is longer than {_MAX_BYTES} bytes")
    try:
        return yaml.load(data.decode("utf-8-sig"), _UniqueKeys)  # noqa: S506 - a safe loader
    except Exception as error:  # noqa: BLE001 - PyYAML lets out what its constructors raise, RecursionError included
        # Not the error's own text: it quotes the file, which holds secrets.
        mark = getattr(error, "problem_mark", None)
        where = f": line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    raise TokensError(f"{path} is not YAML{where}")


def load_tokens(path: Path) -> dict[str, Token]:
    """Read `tokens.yaml`.

    Returns:
        The tokens by their secret.

    Raises:
        TokensError: the file is missing, not YAML, or an entry is wrong; secrets are not in the message.
    """
    try:
        content = _File.model_validate(_document(path))
    except OSError as error:
        raise TokensError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        problems = "; ".join(f"{_place(part['loc'])}: {part['msg']}" for part in error.errors())
        raise TokensError(f"{path}: {problems}") from None
    tokens: dict[str, Token] = {}
    for number, token in enumerate(content.tokens):
        if token.token in tokens:
            raise TokensError(f"{path}: tokens[{number}]: this token was given before")
        tokens[token.token] = token
    return tokens


class Caller:
    """Whoever sent a request.

    Args:
        token: their token, or None for nobody in particular.
        free: whether there is no access control.
    """

    def __init__(self, token: Token | None, *, free: bool) -> None:
        self._token = token
        self._free = free

    @property
    def user(self) -> str:
        """The namespace that `me` stands for."""
        return self._token.user if self._token else ANYBODY

    def may(self, right: Literal["read", "write"], bucket_id: str) -> bool:
        """Whether the caller has a right that a token gives; public buckets may be read without one."""
        return self._free or (self._token is not None and self._token.allows(right, bucket_id))

    def may_see(self, bucket: Bucket) -> bool:
        """Whether the caller may know of a bucket and read it."""
        return not bucket.private or self.may("read", bucket.id)

    def readable(self, bucket: Bucket | None, bucket_id: str) -> Bucket:
        """Return `bucket` if the caller may read it.

        Raises:
            HubError: 404 `RepoNotFound` for a bucket that is missing or hidden from this token, so that the two
                cannot be told apart; 401 with the same code for a caller without a token.
        """
        if bucket is not None and self.may_see(bucket):
            return bucket
        if self._token is None and not self._free:
            raise HubError(401, "Invalid username or password.", code="RepoNotFound")
        raise bucket_not_found(bucket_id)

    def writable(self, bucket: Bucket | None, bucket_id: str) -> Bucket:
        """Return `bucket` if the caller may write to it.

        Raises:
            HubError: as `readable`; and 403 for a bucket that the caller may only read, or 401 without a token.
        """
        found = self.readable(bucket, bucket_id)
        self.require_write(bucket_id)
        return found

    def require_write(self, bucket_id: str) -> None:
        """Refuse callers that may not write to (or make) a bucket.

        Raises:
            HubError: 403, or 401 for a caller without a token.
        """
        if self.may("write", bucket_id):
            return
        if self._token is None:
            raise HubError(401, "Invalid username or password.")
        raise HubError(403, f"this token has no write access to {bucket_id}")


class Access:
    """Tells who sends a request.

    Args:
        tokens: the tokens by their secret; None for no access control, where everybody may do everything and a
            token that comes along is not looked at.
    """

    def __init__(self, tokens: dict[str, Token] | None) -> None:
        self._tokens = tokens

    @property
    def controlled(self) -> bool:
        """Whether there is access control."""
        return self._tokens is not None

    def caller(self, request: Request) -> Caller:
        """Return who sent a request.

        Raises:
            HubError: 401 for a token that is not known.
        """
        if self._tokens is None:
            return Caller(None, free=True)
        authorization = request.headers.get("authorization")
        if authorization is None:
            return Caller(None, free=False)
        scheme, _, secret = authorization.partition(" ")
        token = self._tokens.get(secret.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return Caller(token, free=False)


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"
