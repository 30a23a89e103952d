"""Access control: `tokens.yaml`, and the refusals that callers without a right receive."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from starlette.requests import Request

from localhub.errors import HubError, problems
from localhub.http.signing import Right
from localhub.state.buckets import Bucket

_MAX_BYTES: Final = 1024 * 1024

DEFAULT_USER = "local"
"""The namespace that `me` stands for without access control, and for tokens that name no user."""


class TokensError(ValueError):
    """`tokens.yaml` cannot be used; the message names the entry."""


class Token(BaseModel, extra="forbid", frozen=True):
    """One token of `tokens.yaml`.

    Attributes:
        token: the secret, as the clients send it.
        user: the namespace that `me` stands for.
        buckets: rights by bucket id or glob (`my-org/*`); the strongest one that matches applies.
    """

    token: Annotated[str, Field(min_length=1, repr=False)]
    user: Annotated[str, Field(min_length=1)] = DEFAULT_USER
    buckets: dict[str, Right]

    @field_validator("buckets")
    @classmethod
    def _ids(cls, buckets: dict[str, str]) -> dict[str, str]:
        for pattern in buckets:
            if pattern.count("/") != 1:
                raise ValueError(f"{pattern!r} is not of the form namespace/name")
        return buckets

    def allows(self, right: Right, bucket_id: str) -> bool:
        """Whether this token has a right on a bucket; `write` includes `read`."""
        granted = {given for pattern, given in self.buckets.items() if fnmatchcase(bucket_id, pattern)}
        return "write" in granted or right in granted


class _File(BaseModel, extra="forbid"):
    tokens: list[Token]


class _UniqueKeys(yaml.SafeLoader):
    """Rejects duplicate keys: otherwise the last one would win, which may be the wider right."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`.

        Raises:
            yaml.constructor.ConstructorError: a key occurs twice.
        """
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, "duplicate key", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def _document(path: Path) -> Any:
    """Return the document of a YAML file.

    Raises:
        OSError: the file cannot be read.
        TokensError: the file is too long, or not YAML.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise TokensError(f"{path} is larger than {_MAX_BYTES} bytes")
    try:
        return yaml.load(data.decode("utf-8-sig"), _UniqueKeys)  # noqa: S506 - a safe loader
    except Exception as error:  # noqa: BLE001 - PyYAML passes on what its constructors raise, RecursionError included
        # The error's own text quotes the file, which holds secrets.
        mark = getattr(error, "problem_mark", None)
        where = f": line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    raise TokensError(f"{path} is not valid YAML{where}")


_FULL_ACCESS = Token(token="none", buckets={"*/*": "write"})  # noqa: S106 - no request is compared with it
"""The rights of every caller without access control."""


def load_tokens(path: Path) -> dict[str, Token]:
    """Read `tokens.yaml`.

    Returns:
        The tokens by their secret.

    Raises:
        TokensError: the file is missing, not YAML, or an entry is invalid. The message holds no secret.
    """
    try:
        content = _File.model_validate(_document(path))
    except OSError as error:
        raise TokensError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise TokensError(f"{path}: {'; '.join(problems(error))}") from None
    tokens: dict[str, Token] = {}
    for number, token in enumerate(content.tokens):
        if token.token in tokens:
            raise TokensError(f"{path}: tokens[{number}]: duplicate token")
        tokens[token.token] = token
    return tokens


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        token: the token that came with the request, or None for an anonymous caller.
    """

    token: Token | None

    @property
    def user(self) -> str:
        """The namespace that `me` stands for."""
        return self.token.user if self.token else DEFAULT_USER

    def may(self, right: Right, bucket_id: str) -> bool:
        """Whether the token grants a right on a bucket. Public buckets can be read without one."""
        return self.token is not None and self.token.allows(right, bucket_id)

    def may_see(self, bucket: Bucket) -> bool:
        """Whether the caller may read a bucket and know that it exists."""
        return not bucket.private or self.may("read", bucket.id)

    def open(self, bucket: Bucket | None, bucket_id: str, right: Right) -> Bucket:
        """Return `bucket` if the caller has `right` on it.

        Raises:
            HubError: 404 `RepoNotFound` for a bucket that is missing or hidden from this token, so that the two
                cannot be distinguished; 401 with the same code for a caller without a token. For a bucket that the
                caller may only read, 403, or 401 without a token.
        """
        if bucket is None or not self.may_see(bucket):
            if self.token is None:
                raise HubError(401, "Invalid username or password.", code="RepoNotFound")
            raise HubError(404, f"Bucket not found: {bucket_id}", code="RepoNotFound")
        if right == "write":
            self.require_write(bucket_id)
        return bucket

    def require_write(self, bucket_id: str) -> None:
        """Refuse callers that may not write to (or create) a bucket.

        Raises:
            HubError: 403, or 401 for a caller without a token.
        """
        if self.may("write", bucket_id):
            return
        if self.token is None:
            raise HubError(401, "Invalid username or password.")
        raise HubError(403, f"this token has no write access to {bucket_id}")


@dataclass(frozen=True)
class Access:
    """Identifies the caller of a request.

    Attributes:
        tokens: the tokens by their secret; None for no access control, where every caller may do everything and
            tokens in requests are ignored.
    """

    tokens: dict[str, Token] | None = field(repr=False)  # its keys are secrets

    def caller(self, request: Request) -> Caller:
        """Return the sender of a request.

        Raises:
            HubError: 401 for an unknown token.
        """
        if self.tokens is None:
            return Caller(_FULL_ACCESS)
        authorization = request.headers.get("authorization")
        if authorization is None:
            return Caller(None)
        scheme, _, secret = authorization.partition(" ")
        token = self.tokens.get(secret.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return Caller(token)
