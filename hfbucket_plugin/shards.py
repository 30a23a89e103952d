"""Where a listing can be cut into parts that are listed side by side. Pure.

The Hub tells pages one after the other, and lists what starts with a text. From the `@` that ends the model to the end of
the hash, a key of either kind holds few characters (`keys`): so what starts with such a text is what starts with it and one
of these characters, and nothing is left out however keys are spread. Where it is not known which `@` ends the model, the
characters are all that names of objects hold.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.keys import encode_name

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIELDS: Final = "@-0123456789abcdef"
"""What follows the model, as far as the hash, in the order of objects' names (`@` is written `%40` there)."""

_HEXADECIMAL: Final = "0123456789ABCDEF"
_NAMES: Final = "%-." + "0123456789" + string.ascii_uppercase + "_" + string.ascii_lowercase + "~"
"""Characters of objects' names; what `%` begins goes on with two hexadecimal digits (`keys.encode_name`)."""

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


def encoded_shards(prefix: str, first_page: Sequence[str], pages: int) -> list[str]:
    """As `shards`, where the model of the keys is not known: it may go on after an `@`, in any characters.

    Returns:
        Starts of objects' names, in their order, such that the name of each key that is longer than the prefix starts with
        one of them; or none.
    """
    common = _common(prefix, first_page)
    parts = [encode_name(prefix + common)]
    for length in range(len(common)):
        stem, one = encode_name(prefix + common[:length]), encode_name(common[length])
        for place, character in enumerate(one):  # `@` is written in three
            among = _HEXADECIMAL if place else _NAMES
            parts += [stem + one[:place] + other for other in among if other != character]
    return sorted(parts) if common and len(parts) * _WASTE <= pages else []


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
