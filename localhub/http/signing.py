"""Signed storage tokens and signed links.

Every process on a root shares the signing key. Neither a storage token nor a link holds the Hub token behind it.
"""

import base64
import hashlib
import hmac
import json
import time
from typing import Literal

from localhub.errors import HubError

Right = Literal["read", "write"]

"""`write` includes `read`."""


class Signer:
    """Signs and verifies storage tokens and links.

    Args:
        key: the secret of the root.
        ttl_s: validity of tokens and links, in seconds.
    """

    def __init__(self, key: bytes, ttl_s: float) -> None:
        self._key = key
        self._ttl_s = ttl_s

    def token(self, right: Right, bucket: int) -> tuple[str, int]:
        """Return a storage token and its expiry, in seconds since 1970."""
        expires = int(time.time() + self._ttl_s)
        payload = json.dumps([right, bucket, expires], separators=(",", ":")).encode()
        body = base64.urlsafe_b64encode(payload).decode()
        return f"{body}.{self._sign('token', body)}", expires

    def open(self, authorization: str | None, right: Right) -> int:
        """Return the bucket's row number in the token of an `Authorization` header.

        Raises:
            HubError: 401 when the token is missing, invalid or expired; 403 when it is read-only and `right` is write.
        """
        scheme, _, token = (authorization or "").partition(" ")
        body, _, signature = token.partition(".")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            signature.encode(), self._sign("token", body).encode()
        ):
            raise HubError(401, "a valid storage access token is required")
        granted, bucket, expires = json.loads(base64.urlsafe_b64decode(body))
        if expires <= time.time():
            raise HubError(401, "the storage access token has expired")
        if right == "write" and granted != "write":
            raise HubError(403, "the storage access token does not allow uploads")
        return int(bucket)

    def link(self, path: str) -> str:
        """Return `path` with a query that lets any client fetch it until the link expires."""
        expires = int(time.time() + self._ttl_s)
        return f"{path}?expires={expires}&signature={self._sign('link', f'{path} {expires}')}"

    def check_link(self, path: str, expires: str | None, signature: str | None) -> None:
        """Verify a signed link.

        Raises:
            HubError: 403, as storage services answer, when the signature is invalid or the link has expired.
        """
        wanted = self._sign("link", f"{path} {expires}")
        if expires is None or signature is None or not hmac.compare_digest(signature.encode(), wanted.encode()):
            raise HubError(403, "the link is not signed by this Hub")
        if int(expires) <= time.time():
            raise HubError(403, "the link has expired")

    def _sign(self, kind: str, text: str) -> str:
        digest = hmac.digest(self._key, f"{kind} {text}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
