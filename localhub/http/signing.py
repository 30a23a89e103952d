"""What this Hub signs: access tokens for its storage side, and links to bytes.

Both are signed with a key that every process on the root shares, and neither holds the Hub token that led to it.
"""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from typing import Literal

from localhub.errors import HubError

Right = Literal["read", "write"]


@dataclass(frozen=True)
class Scope:
    """What a storage token opens.

    Attributes:
        right: `read`, or `write`, which reads too.
        bucket: the bucket's row number.
        expires: seconds since 1970.
    """

    right: Right
    bucket: int
    expires: int


class Signer:
    """Signs and checks.

    Args:
        key: the secret of the root.
        ttl_s: how long tokens and links hold, in seconds.
    """

    def __init__(self, key: bytes, ttl_s: float) -> None:
        self._key = key
        self._ttl_s = ttl_s

    def token(self, right: Right, bucket: int) -> tuple[str, int]:
        """Return a storage token and when it expires, in seconds since 1970."""
        expires = int(time.time() + self._ttl_s)
        payload = json.dumps([right, bucket, expires], separators=(",", ":")).encode()
        body = base64.urlsafe_b64encode(payload).decode()
        return f"{body}.{self._sign('token', body)}", expires

    def open(self, authorization: str | None, right: Right) -> Scope:
        """Return the scope of the token in an `Authorization` header.

        Raises:
            HubError: 401 when the token is missing, not ours or expired; 403 when it only reads and `right` is write.
        """
        scheme, _, token = (authorization or "").partition(" ")
        body, _, signature = token.partition(".")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            signature.encode(), self._sign("token", body).encode()
        ):
            raise HubError(401, "a valid storage access token is needed")
        scope = Scope(*json.loads(base64.urlsafe_b64decode(body)))
        if scope.expires <= time.time():
            raise HubError(401, "the storage access token has expired")
        if right == "write" and scope.right != "write":
            raise HubError(403, "the storage access token does not allow uploads")
        return scope

    def link(self, path: str) -> str:
        """Return `path` with a query that lets anybody fetch it for a while."""
        expires = int(time.time() + self._ttl_s)
        return f"{path}?expires={expires}&signature={self._sign('link', f'{path} {expires}')}"

    def check_link(self, path: str, expires: str | None, signature: str | None) -> None:
        """Let a signed link pass.

        Raises:
            HubError: 403 when it is not ours or expired, as storage services answer.
        """
        wanted = self._sign("link", f"{path} {expires}")
        if expires is None or signature is None or not hmac.compare_digest(signature.encode(), wanted.encode()):
            raise HubError(403, "the link is not signed by this Hub")
        if int(expires) <= time.time():
            raise HubError(403, "the link has expired")

    def _sign(self, kind: str, text: str) -> str:
        digest = hmac.digest(self._key, f"{kind} {text}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
