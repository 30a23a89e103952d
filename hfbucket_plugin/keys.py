"""LMCache's key strings, and the object names they become in a bucket.

Two kinds of key meet in a bucket:

- *classic*: `model@world_size@worker_id@hash@dtype[@layer_id][@tag%value…]` (`lmcache/utils.py`, `CacheEngineKey`);
- *MP mode*: `model@kv_rank@group@hash[@salt]`, the rank as at least 8 hexadecimal digits
  (`lmcache/v1/distributed/l2_adapters/hfbucket_l2_adapter.py`).

An object's name is the percent-encoded key, `/` included: one flat level, byte-compatible with LMCache's built-in
backend. Encoding works character by character, so the start of a key is also the start of its object's name.

Strings are parsed strictly and never guessed at: what does not come back to the same text is not a key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from hfbucket_plugin.errors import KeyFormatError

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

_CLASSIC_FIELDS = 5
_MP_FIELDS = (4, 5)


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

    Raises:
        KeyFormatError: The text is no key, or would not be written back the same.
    """
    fields = text.split("@")
    if not fields[0] or len(fields) < _MP_FIELDS[0]:
        raise KeyFormatError(f"{text!r} is no LMCache key: too few fields between '@', or no model name")
    if _RANK.fullmatch(fields[1]) and len(fields) in _MP_FIELDS:
        return _parse_mp(text, fields)
    return _parse_classic(text, fields)


def _parse_mp(text: str, fields: list[str]) -> MPKey:
    model, rank, group, chunk_hash, *salt = fields
    if not _HEX.fullmatch(group) or not _MP_HASH.fullmatch(chunk_hash):
        raise KeyFormatError(f"{text!r} is no LMCache MP key: its group or hash is not hexadecimal")
    if salt and not _SALT.fullmatch(salt[0]):
        raise KeyFormatError(f"{text!r} is no LMCache MP key: {salt[0]!r} cannot be a cache salt")
    return MPKey(model, int(rank, 16), int(group, 16), chunk_hash, salt[0] if salt else "")


def _parse_classic(text: str, fields: list[str]) -> ClassicKey:
    if len(fields) < _CLASSIC_FIELDS:
        raise KeyFormatError(f"{text!r} is no LMCache key: it has {len(fields)} fields, a classic key has at least 5")
    model, world_size, worker_id, chunk_hash, dtype, *rest = fields
    if not _DECIMAL.fullmatch(world_size) or not _DECIMAL.fullmatch(worker_id):
        raise KeyFormatError(f"{text!r} is no LMCache key: its world size or worker is not a number")
    if not _CLASSIC_HASH.fullmatch(chunk_hash):
        raise KeyFormatError(f"{text!r} is no LMCache key: its hash {chunk_hash!r} is not hexadecimal")
    if dtype not in DTYPES:
        raise KeyFormatError(f"{text!r} is no LMCache key: {dtype!r} is not a dtype that LMCache writes")
    layer = int(rest.pop(0)) if rest and _DECIMAL.fullmatch(rest[0]) else None
    return ClassicKey(
        model,
        int(world_size),
        int(worker_id),
        chunk_hash,
        dtype,
        layer,
        tuple(_parse_tag(text, tag) for tag in rest),
    )


def _parse_tag(text: str, tag: str) -> tuple[str, str]:
    name, found, value = tag.partition("%")
    if not found:
        raise KeyFormatError(f"{text!r} is no LMCache key: {tag!r} is neither a layer nor a tag%value")
    return name, value


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
