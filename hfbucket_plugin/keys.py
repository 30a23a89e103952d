"""LMCache's key strings, and the object names they become in a bucket.

Two kinds of key meet in a bucket:

- *classic*: `model@world_size@worker_id@hash@dtype[@layer_id][@tag%value…]` (`lmcache/utils.py`, `CacheEngineKey`);
- *MP mode*: `model@kv_rank@group@hash[@salt]`, the rank as at least 8 hexadecimal digits
  (`lmcache/v1/distributed/l2_adapters/hfbucket_l2_adapter.py`).

An object's name is the percent-encoded key, `/` included: one flat level, byte-compatible with LMCache's built-in
backend. Encoding works character by character, so the start of a key is also the start of its object's name.

Strings are parsed strictly and never guessed at: what does not come back to the same text is not a key. The model and
the tags of a key may hold `@` themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

from hfbucket_plugin.errors import KeyFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES: Final = frozenset(
    {
        "half", "bfloat16", "float", "double", "int8", "uint8", "int16", "int32", "int64", "bool",
        "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz",
    }
)  # fmt: skip
"""How LMCache spells dtypes in keys (`lmcache/utils.py`, `TORCH_DTYPE_TO_STR_DTYPE`)."""

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,6}")  # 7 digits: an MP rank has at least 8, so the two kinds never meet
_RANK = re.compile(r"[0-9a-f]{8}|[1-9a-f][0-9a-f]{8,}")
_HEX = re.compile(r"0|[1-9a-f][0-9a-f]*")
_CLASSIC_HASH = re.compile(r"-?[0-9a-f]+")
_MP_HASH = re.compile(r"(?:[0-9a-f]{2})+")
_SALT = re.compile(r"[^@/\\\x00]{1,128}")

_CLASSIC_FIELDS: Final = 4
"""After the model."""

_KEY_LIKE = re.compile(r"@(?:[0-9]+@-?[0-9]+|[0-9a-fA-F]{8,}@[0-9a-fA-F]+)@-?(?:0x)?[0-9a-fA-F]+(?:@|$)")


@dataclass(frozen=True, slots=True)
class ClassicKey:
    """A key of the classic, in-process engine.

    Attributes:
        model: The model's name as the engine was given it.
        world_size: Number of workers of the engine.
        worker_id: Which of them wrote the chunk.
        chunk_hash: Hexadecimal; may be negative where LMCache hashes with Python's `hash`.
        dtype: LMCache's spelling, one of `DTYPES`.
        layer_id: Set for keys of single layers.
        tags: `(name, value)` pairs in their order.
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
    """A key of MP mode (`lmcache server`).

    Attributes:
        model: The model's name.
        kv_rank: `world_size << 24 | rank << 16 | local_world_size << 8 | local_rank`.
        group: Index of the object group.
        chunk_hash: Hexadecimal digits, two a byte.
        salt: Isolates users from each other; empty for none.
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
        """The global rank of the worker that wrote the chunk."""
        return (self.kv_rank >> 16) & 0xFF

    def __str__(self) -> str:
        text = f"{self.model}@{self.kv_rank:08x}@{self.group:x}@{self.chunk_hash}"
        return f"{text}@{self.salt}" if self.salt else text


Key = ClassicKey | MPKey


def parse_key(text: str) -> Key:
    """Read a key string of either kind.

    The fields of a key stand between a model and, in a classic key, tags, both of which may hold `@`: what is looked for
    is the first run of fields that make a key together with all that follows them.

    Raises:
        KeyFormatError: The text is not a key, or would not be written back the same.
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
        f"{text!r} is no LMCache key: nothing in it reads <world size>@<worker>@<hash>@<dtype>[@<layer>][@<tag>%<value>] or "
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
    """Tags of a key: a field without `%` goes on with the value before it, or begins the name after it."""
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
    """Whether an engine of any version may have written a text as a key, whatever this version knows of its fields.

    For those who delete what is not a key: they keep what might be one.
    """
    return _KEY_LIKE.search(text) is not None


def model_of(text: str) -> str:
    """The model of a key string; of any other text, what stands before its first `@`."""
    try:
        return parse_key(text).model
    except KeyFormatError:
        return text.partition("@")[0]


PROBE_MODEL: Final = "test"


def is_probe(text: str) -> bool:
    """Whether a key is the one with which LMCache's health monitor tests a backend.

    Its recovery needs a real put, get and check of `test@1@0@0@<dtype>`
    (`lmcache/v1/health_monitor`): a put that is skipped because the object is there keeps the engine disabled.
    """
    return text.startswith(f"{PROBE_MODEL}@1@0@0@")


def encode_name(key: str) -> str:
    """The object name of a key string, or of the start of one."""
    return quote(key, safe="")


def decode_name(name: str) -> str:
    """The key string of an object name.

    Raises:
        KeyFormatError: The name is not the encoding of any string: somebody else's object.
    """
    try:
        key = unquote(name, errors="strict")
        if quote(key, safe="") == name:
            return key
    except UnicodeError:
        pass
    raise KeyFormatError(f"object {name!r} does not bear the name of an LMCache key")
