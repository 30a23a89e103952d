"""Where a listing can be cut into parts that are listed side by side. Pure.

The Hub tells pages one after the other, and lists what starts with a text. From the model's `@` to the end of the hash, a
key of either kind holds few characters (`keys`): so what starts with such a text is what starts with it and one of these
characters, and nothing is left out however keys are spread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIELDS: Final = "@-0123456789abcdef"
"""What follows the model, as far as the hash, in the order of objects' names (`@` is written `%40` there)."""

_HASH_FIELD: Final = 3
"""`@` before the hash, in keys of both kinds."""

_WASTE: Final = 4
"""Of the pages that there may be, one in so many may be asked for to find where chunks are."""


def shards(prefix: str, first_page: Sequence[str], pages: int) -> list[str]:
    """Starts of keys that together are a longer listing, in the order of objects' names.

    A listing is worth cutting when its first page does not come further than the first of the parts: as hashes are spread
    evenly, each part has then several pages.

    Args:
        prefix: The start of the keys that are listed.
        first_page: The keys of the first of its pages, of more than one.
        pages: How many there are at most.

    Returns:
        The parts, such that each key that is longer than the prefix starts with one of them; or none, when it is not
        worth it, or cannot be told.
    """
    common = _common(prefix, first_page)
    if not common or len(common) * len(_FIELDS) * _WASTE > pages:
        return []
    parts = [prefix + common]
    for length in range(len(common)):
        stem = prefix + common[:length]
        parts += [stem + other for other in _FIELDS if other != common[length]]
    return sorted(parts, key=lambda part: [_FIELDS.find(one) for one in part[len(prefix) :]])


def whole_key(prefix: str) -> bool:
    """Whether the start of a key may be a key itself, which its parts then leave out."""
    return prefix.count("@") == _HASH_FIELD and not prefix.endswith("@")


def _common(prefix: str, texts: Sequence[str]) -> str:
    """What all the texts go on with after the prefix, as far as the end of the hash."""
    fields = prefix.count("@")
    if not texts or not 1 <= fields <= _HASH_FIELD:
        return ""
    least, greatest = min(texts), max(texts)
    end = start = len(prefix)
    while end < min(len(least), len(greatest)) and least[end] == greatest[end] and least[end] in _FIELDS:
        fields += least[end] == "@"
        if fields > _HASH_FIELD:
            break
        end += 1
    return least[start:end]
