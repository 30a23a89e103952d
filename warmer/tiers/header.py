"""Header that LMCache's classic connectors write before each chunk if `save_chunk_meta` is on.

Follows `lmcache/v1/protocol.py` of LMCache 0.5.6: native 32-bit integers, first the length and the memory format, then
the dtype and the shape of each group of layers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from warmer.report.outcomes import TierError

if TYPE_CHECKING:
    from hfbucket_plugin.core.keys import ClassicKey

_NUMBERS: Final = {"half": 2, "bfloat16": 3, "float": 4, "double": 5, "uint8": 6, "fp8_e4m3fn": 7, "fp8_e5m2": 8}
_BYTES: Final = {"half": 2, "bfloat16": 2, "float": 4, "double": 8, "uint8": 1, "fp8_e4m3fn": 1, "fp8_e5m2": 1}
_SPELLINGS: Final = {
    "float16": "half",
    "float32": "float",
    "float64": "double",
    "float8_e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
}
_KV_2LTD: Final = 1
_KV_MLA: Final = 6
_DIMENSIONS: Final = 5
_MOST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class HeaderGroup:
    """Layers whose KV has the same shape.

    Attributes:
        layers: Number of layers.
        kv: 2 for keys and values, 1 for MLA.
        hidden: Elements of a token in one layer.
        dtype: Dtype, spelled as in keys; None for that of the chunk's key.
    """

    layers: int
    kv: int
    hidden: int
    dtype: str | None


@dataclass(frozen=True, slots=True)
class HeaderFormat:
    """Content of an engine's headers.

    Attributes:
        groups: Groups of layers, in the engine's order; all have the same `kv`.
        chunk_size: Maximum tokens of a chunk.
    """

    groups: tuple[HeaderGroup, ...]
    chunk_size: int

    @property
    def size(self) -> int:
        """Size of a header in bytes."""
        return 4 * (2 + 5 * len(self.groups))

    def bytes_for(self, key: ClassicKey, size: int) -> bytes:
        """Return the header of a chunk.

        Args:
            key: Key of the chunk.
            size: Bytes of the chunk.

        Raises:
            TierError: A chunk of that key and size does not belong to this engine.
        """
        dtypes = [group.dtype or key.dtype for group in self.groups]
        unknown = [dtype for dtype in dtypes if dtype not in _NUMBERS]
        if unknown:
            raise TierError(f"{key}: LMCache's header has no number for the dtype {unknown[0]!r}")
        token = sum(
            group.layers * group.kv * group.hidden * _BYTES[dtype]
            for group, dtype in zip(self.groups, dtypes, strict=True)
        )
        tokens, rest = divmod(size, token)
        if rest or not 0 < tokens <= self.chunk_size or size > _MOST:
            raise TierError(
                f"{key}: a chunk of {size} bytes does not fit kv_shape, by which a token has {token} bytes and a chunk "
                f"at most {self.chunk_size} tokens"
            )
        numbers = [size, _KV_MLA if self.groups[0].kv == 1 else _KV_2LTD]
        for group, dtype in zip(self.groups, dtypes, strict=True):
            numbers += [_NUMBERS[dtype], group.kv, group.layers, tokens, group.hidden]
        return struct.pack(f"{len(numbers)}i", *numbers)


def header_format(tier: str, setting: str, shape: Any, dtype: Any) -> HeaderFormat:
    """Read `kv_shape` and `kv_dtype`.

    Args:
        tier: Name of the tier, for errors.
        setting: Prefix of the settings, such as `remote_storage_plugin.fs.warm.`.
        shape: `layers, 2 or 1, chunk_size, kv_heads, head_size`, as LMCache writes `kv_shape`; several groups of
            layers are joined by `;`.
        dtype: One for all groups, or one for each, joined by `;`; None for the dtype in each chunk's key.

    Raises:
        ConfigError: A value is not in this format.
    """
    texts = str(shape).strip("() []").split(";") if not isinstance(shape, (list, tuple)) else [_joined(shape)]
    dtypes = [None] * len(texts) if dtype is None else [_dtype(tier, setting, one) for one in str(dtype).split(";")]
    if len(dtypes) == 1:
        dtypes *= len(texts)
    if len(dtypes) != len(texts):
        raise ConfigError(f"tier {tier!r}: {setting}kv_dtype names {len(dtypes)} dtypes, kv_shape {len(texts)} groups")
    shapes = [_numbers(tier, setting, text) for text in texts]
    if len({(kv, chunk) for _, kv, chunk, _, _ in shapes}) > 1:
        raise ConfigError(f"tier {tier!r}: the groups of {setting}kv_shape differ in their second or third number")
    groups = tuple(
        HeaderGroup(layers, kv, heads * head, one)
        for (layers, kv, _, heads, head), one in zip(shapes, dtypes, strict=True)
    )
    return HeaderFormat(groups, shapes[0][2])


def _joined(numbers: list[Any] | tuple[Any, ...]) -> str:
    return ",".join(map(str, numbers))


def _numbers(tier: str, setting: str, text: str) -> tuple[int, int, int, int, int]:
    parts = [part.strip() for part in text.strip("() []").split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(numbers) != len(parts) or len(parts) != _DIMENSIONS or min(numbers) < 1 or numbers[1] > 2:  # noqa: PLR2004 - keys and values
        raise ConfigError(
            f"tier {tier!r}: {setting}kv_shape has {text.strip()!r}; it reads layers,2,chunk_size,kv_heads,head_size, "
            "with 1 instead of 2 for MLA"
        )
    layers, kv, chunk, heads, head = numbers
    return layers, kv, chunk, heads, head


def _dtype(tier: str, setting: str, text: str) -> str:
    name = text.strip().removeprefix("torch.")
    name = _SPELLINGS.get(name, name)
    if name not in _NUMBERS:
        raise ConfigError(f"tier {tier!r}: {setting}kv_dtype has {text!r}; known are {', '.join(_NUMBERS)}")
    return name
