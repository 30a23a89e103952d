"""Naming scheme: chunk keys, object names, bucket handles, and content identifiers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urlsplit

from hfbucket_plugin.errors import ConfigError, KeyFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class ContentId:
    """Identifier of an object's content: Xet hash (64 hexadecimal digits) and size in bytes."""

    xet_hash: str
    size: int


SCHEME = "hf://buckets/"

RESERVED = ".hfbucket"
"""First segment, below an instance's prefix, of objects of this package that are not chunks."""

# The Hub's rule for the names of repositories and buckets (huggingface_hub/utils/_validators.py).
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?")
_SHAPE = "hf://buckets/<namespace>/<bucket>[/<prefix>]"


_PORTS = {"http": 80, "https": 443}


def same_endpoint(one: str, other: str) -> bool:
    """Return whether two addresses name one Hub, ignoring the case of the host, default ports and trailing slashes."""
    return _endpoint_identity(one) == _endpoint_identity(other)


def _endpoint_identity(endpoint: str) -> tuple[str, str, int | None, str]:
    parts = urlsplit(endpoint.strip())
    host = (parts.hostname or "").rstrip(".")
    return parts.scheme, host, parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")


@dataclass(frozen=True, slots=True, eq=False)
class BucketHandle:
    """Location of an instance's objects.

    Handles that name the same place are equal: the Hub ignores the case of namespaces and buckets.

    Attributes:
        namespace: User or organization.
        bucket: Name of the bucket.
        prefix: Path above all objects of the instance, without slashes at its ends; may be empty.
    """

    namespace: str
    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> BucketHandle:
        """Parse a handle, as lenient about slashes as LMCache's built-in backend.

        Args:
            text: `hf://buckets/<namespace>/<bucket>[/<prefix>]`; doubled and trailing slashes are dropped.

        Raises:
            ConfigError: The text is not a handle; the message names the invalid part.
        """
        stripped = text.strip()
        if not stripped.startswith(SCHEME):
            shown = (
                repr(text) if "/" in text or not stripped else "this"
            )  # a token in the wrong place contains no slash
            raise ConfigError(f"{shown} is not a valid bucket handle: expected {_SHAPE}")
        parts = [part for part in stripped[len(SCHEME) :].split("/") if part]
        if not parts[1:]:
            raise ConfigError(f"{text!r} names no bucket: expected {_SHAPE}")
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
        """Return whether another handle names the same bucket, at any prefix."""
        return self._identity[0] == other._identity[0]

    def within(self, bucket_id: str) -> BucketHandle:
        """Return the same prefix in a bucket named as in the Hub's API.

        Args:
            bucket_id: `<namespace>/<bucket>`.

        Raises:
            ConfigError: The name is not that of a bucket.
        """
        return BucketHandle.parse(f"{SCHEME}{bucket_id}/{self.prefix}")

    @property
    def bucket_id(self) -> str:
        """Name of the bucket in the Hub's API, `<namespace>/<bucket>`."""
        return f"{self.namespace}/{self.bucket}"

    def join(self, name: str) -> str:
        """Return the path in the bucket of an object of this instance, or of a name prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def relative(self, path: str) -> str | None:
        """Return the name of a path below this instance's prefix; None for a path elsewhere.

        The Hub matches prefixes lexically, so a listing of `v1` also returns `v10/…`; this function excludes those.
        """
        if not self.prefix:
            return path
        head = f"{self.prefix}/"
        return path[len(head) :] if path.startswith(head) else None

    def __str__(self) -> str:
        tail = f"/{self.prefix}" if self.prefix else ""
        return f"{SCHEME}{self.namespace}/{self.bucket}{tail}"


DTYPES: Final = frozenset(
    {
        "half", "bfloat16", "float", "double", "int8", "uint8", "int16", "int32", "int64", "bool",
        "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz",
    }
)  # fmt: skip
"""LMCache's names of dtypes in keys (`lmcache/utils.py`, `TORCH_DTYPE_TO_STR_DTYPE`)."""

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,6}")  # 7 digits; an MP rank has at least 8, so the two kinds cannot be confused
_RANK = re.compile(r"[0-9a-f]{8}|[1-9a-f][0-9a-f]{8,}")
_HEX = re.compile(r"0|[1-9a-f][0-9a-f]*")
_CLASSIC_HASH = re.compile(r"-?[0-9a-f]+")
_MP_HASH = re.compile(r"(?:[0-9a-f]{2})+")
_SALT = re.compile(r"[^@/\\\x00]{1,128}")

_CLASSIC_FIELDS: Final = 4
"""Number of fields after the model."""

_KEY_LIKE = re.compile(r"@(?:[0-9]+@-?[0-9]+|[0-9a-fA-F]{8,}@[0-9a-fA-F]+)@-?(?:0x)?[0-9a-fA-F]+(?:@|$)")


@dataclass(frozen=True, slots=True)
class ClassicKey:
    """Key of the classic, in-process engine.

    Attributes:
        model: Name of the model as passed to the engine.
        world_size: Number of workers of the engine.
        worker_id: Worker that wrote the chunk.
        chunk_hash: Hexadecimal; may be negative if LMCache hashes with Python's `hash`.
        dtype: LMCache's name of the dtype, one of `DTYPES`.
        layer_id: Layer, for keys of single layers.
        tags: `(name, value)` pairs in order.
    """

    model: str
    world_size: int
    worker_id: int
    chunk_hash: str
    dtype: str
    layer_id: int | None = None
    tags: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        fields = [self.model, str(self.world_size), str(self.worker_id), self.chunk_hash, self.dtype]
        if self.layer_id is not None:
            fields.append(str(self.layer_id))
        return "@".join(fields + [f"{name}%{value}" for name, value in self.tags])


@dataclass(frozen=True, slots=True)
class MPKey:
    """Key of MP mode (`lmcache server`).

    Attributes:
        model: Name of the model.
        kv_rank: `world_size << 24 | rank << 16 | local_world_size << 8 | local_rank`.
        group: Index of the object group.
        chunk_hash: Hexadecimal digits, two per byte.
        salt: Isolates users from each other; may be empty.
    """

    model: str
    kv_rank: int
    group: int
    chunk_hash: str
    salt: str = ""

    @property
    def world_size(self) -> int:
        """Number of workers of the engine."""
        return self.kv_rank >> 24

    @property
    def worker_id(self) -> int:
        """Global rank of the worker that wrote the chunk."""
        return (self.kv_rank >> 16) & 0xFF

    def __str__(self) -> str:
        text = f"{self.model}@{self.kv_rank:08x}@{self.group:x}@{self.chunk_hash}"
        return f"{text}@{self.salt}" if self.salt else text


Key = ClassicKey | MPKey


def parse_key(text: str) -> Key:
    """Parse a key string of either kind.

    The fields are preceded by a model and, in a classic key, followed by tags, both of which may contain `@`. The
    parser takes the first run of fields that forms a key together with everything after it.

    Raises:
        KeyFormatError: The text is not a key, or would not be written back identically.
    """
    fields = text.split("@")
    for place in range(1, len(fields) - 2):
        first = fields[place]
        if _RANK.fullmatch(first):
            key: Key | None = _parse_mp(fields, place)
        elif _DECIMAL.fullmatch(first):
            key = _parse_classic(fields, place)
        else:
            continue
        if key is not None and key.model:
            return key
    raise KeyFormatError(
        f"{text!r} is not a valid LMCache key: expected <world size>@<worker>@<hash>@<dtype>[@<layer>][@<tag>%<value>] or "
        "<rank>@<group>@<hash>[@<salt>] after a model's name"
    )


def _parse_mp(fields: list[str], place: int) -> MPKey | None:
    rank, group, chunk_hash, *salt = fields[place:]
    if len(salt) > 1 or not _HEX.fullmatch(group) or not _MP_HASH.fullmatch(chunk_hash):
        return None
    if salt and not _SALT.fullmatch(salt[0]):
        return None
    return MPKey("@".join(fields[:place]), int(rank, 16), int(group, 16), chunk_hash, salt[0] if salt else "")


def _parse_classic(fields: list[str], place: int) -> ClassicKey | None:
    if len(fields) < place + _CLASSIC_FIELDS:
        return None
    world_size, worker_id, chunk_hash, dtype, *rest = fields[place:]
    if not _DECIMAL.fullmatch(worker_id) or not _CLASSIC_HASH.fullmatch(chunk_hash) or dtype not in DTYPES:
        return None
    layer = int(rest.pop(0)) if rest and _DECIMAL.fullmatch(rest[0]) else None
    if rest and not any("%" in field for field in rest):
        return None
    model = "@".join(fields[:place])
    return ClassicKey(model, int(world_size), int(worker_id), chunk_hash, dtype, layer, tuple(_tags(rest)))


def _tags(fields: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the tags of a key: a field without `%` continues the value before it, or starts the name after it."""
    name = ""
    values: list[str] = []
    for field in fields:
        head, found, value = field.partition("%")
        if not found and values:
            values.append(field)
        elif not found:
            name += f"{field}@"
        else:
            if values:
                yield name, "@".join(values)
                name = ""
            name, values = name + head, [value]
    yield from [(name, "@".join(values))] if values else []


def may_be_key(text: str) -> bool:
    """Return whether an engine of any version may have written a text as a key, whatever fields this version knows.

    Tools that delete objects other than keys use it to keep anything that might be one.
    """
    return _KEY_LIKE.search(text) is not None


def model_of(text: str) -> str:
    """Return the model of a key string, or for any other text what precedes its first `@`."""
    try:
        return parse_key(text).model
    except KeyFormatError:
        return text.partition("@")[0]


PROBE_MODEL: Final = "test"


def is_probe(text: str) -> bool:
    """Return whether a key is the one with which LMCache's health monitor tests a backend.

    Recovery requires a real put, get and check of `test@1@0@0@<dtype>` (`lmcache/v1/health_monitor`): skipping the put
    because the object exists would keep the engine disabled.
    """
    return text.startswith(f"{PROBE_MODEL}@1@0@0@")


def encode_name(key: str) -> str:
    """Return the object name of a key string, or of a prefix of one."""
    return quote(key, safe="")


def decode_name(name: str) -> str:
    """Return the key string of an object name.

    Raises:
        KeyFormatError: The name is not an encoded key string, so the object is foreign.
    """
    try:
        key = unquote(name, errors="strict")
        if quote(key, safe="") == name:
            return key
    except UnicodeError:
        pass
    raise KeyFormatError(f"object {name!r} does not bear the name of an LMCache key")
