"""Bucket handles: `hf://buckets/<namespace>/<bucket>[/<prefix>]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from hfbucket_plugin.errors import ConfigError

SCHEME = "hf://buckets/"

RESERVED = ".hfbucket"
"""The first segment, below an instance's prefix, of the objects that are ours and no chunks."""

# The Hub's rule for the names of repositories and buckets (huggingface_hub/utils/_validators.py).
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?")
_SHAPE = "hf://buckets/<namespace>/<bucket>[/<prefix>]"


_PORTS = {"http": 80, "https": 443}


def same_endpoint(one: str, other: str) -> bool:
    """Whether two addresses are those of one Hub: the case of the host, default ports and slashes at the end do not matter."""
    return _endpoint_identity(one) == _endpoint_identity(other)


def _endpoint_identity(endpoint: str) -> tuple[str, str, int | None, str]:
    parts = urlsplit(endpoint.strip())
    host = (parts.hostname or "").rstrip(".")
    return parts.scheme, host, parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")


@dataclass(frozen=True, slots=True, eq=False)
class BucketHandle:
    """Where an instance keeps its objects.

    Two handles are equal when they name the same place: the Hub does not tell the case of namespaces and buckets apart.

    Attributes:
        namespace: The user or organization.
        bucket: The name of the bucket.
        prefix: The path below which all objects of the instance lie, without slashes at its ends; may be empty.
    """

    namespace: str
    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> BucketHandle:
        """Read a handle, as leniently as LMCache's built-in backend does about slashes.

        Args:
            text: `hf://buckets/<namespace>/<bucket>[/<prefix>]`; doubled and trailing slashes are dropped.

        Raises:
            ConfigError: The text is no handle; the message says which part of it is wrong.
        """
        stripped = text.strip()
        if not stripped.startswith(SCHEME):
            told = repr(text) if "/" in text or not stripped else "this"  # a token in the wrong place holds no slash
            raise ConfigError(f"{told} is no bucket handle: it must read {_SHAPE}")
        parts = [part for part in stripped[len(SCHEME) :].split("/") if part]
        if not parts[1:]:
            raise ConfigError(f"{text!r} names no bucket: it must read {_SHAPE}")
        namespace, bucket, *prefix = parts
        for what, name in (("namespace", namespace), ("bucket", bucket)):
            if not _NAME.fullmatch(name) or "--" in name or ".." in name:
                raise ConfigError(
                    f"{text!r}: {name!r} cannot be a {what} on the Hub; names hold letters, digits, '-', '_' and '.'"
                )
        for part in prefix:
            if part in {".", "..", RESERVED} or not part.isprintable():
                raise ConfigError(f"{text!r}: {part!r} cannot be a part of the prefix; choose another name")
        return cls(namespace, bucket, "/".join(prefix))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketHandle) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str]:
        return self.bucket_id.casefold(), self.prefix

    def same_bucket(self, other: BucketHandle) -> bool:
        """Whether another handle names the same bucket, at whatever prefix."""
        return self._identity[0] == other._identity[0]

    def within(self, bucket_id: str) -> BucketHandle:
        """The same prefix in a bucket of the name that the Hub's API says.

        Raises:
            ConfigError: That is not the name of a bucket.
        """
        return BucketHandle.parse(f"{SCHEME}{bucket_id}/{self.prefix}")

    @property
    def bucket_id(self) -> str:
        """The bucket as the Hub's API names it, `<namespace>/<bucket>`."""
        return f"{self.namespace}/{self.bucket}"

    def join(self, name: str) -> str:
        """The path in the bucket of an object of this instance, or of the start of a name."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def relative(self, path: str) -> str | None:
        """The name of a path below this instance's prefix, or None when it lies elsewhere.

        The Hub matches prefixes lexically, so that a listing of `v1` also holds `v10/…`: this is where those drop out.
        """
        if not self.prefix:
            return path
        head = f"{self.prefix}/"
        return path[len(head) :] if path.startswith(head) else None

    def __str__(self) -> str:
        tail = f"/{self.prefix}" if self.prefix else ""
        return f"{SCHEME}{self.namespace}/{self.bucket}{tail}"
