"""File names of chunks in LMCache's directories, and back.

Follows `fs_connector.py` (classic) and `fs_l2_adapter.py` and the native `fs` connector (MP mode) of LMCache 0.5.6. In
both, `/` becomes `-SEP-`, in MP mode in the model's name only. That is no code: `a/b` and `a-SEP-b` share a file. A name
is therefore read as LMCache reads it, every `-SEP-` as `/`; a key of which that makes another one is *ambiguous*, and is
neither written nor looked for.
"""

from __future__ import annotations

from typing import Final

from hfbucket_plugin.errors import KeyFormatError
from hfbucket_plugin.keys import ClassicKey, Key, MPKey, parse_key

SUFFIX: Final = ".data"

_SLASH: Final = "-SEP-"
_RANK: Final = "0x"


def file_name(key: Key) -> str:
    """The name of a chunk's file, as LMCache makes it."""
    if isinstance(key, ClassicKey):
        return f"{key}".replace("/", _SLASH) + SUFFIX
    model = key.model.replace("/", _SLASH)
    name = f"{model}@{_RANK}{key.kv_rank:08x}@{key.group:x}@{key.chunk_hash}"
    return f"{name}@{key.salt}{SUFFIX}" if key.salt else f"{name}{SUFFIX}"


def key_of(name: str) -> Key | None:
    """The key of the chunk in a file, by the file's name; None for a file that is no chunk's."""
    if not name.endswith(SUFFIX):
        return None
    model, *fields = name.removesuffix(SUFFIX).split("@")
    if fields and fields[0].startswith(_RANK):
        text = "@".join([model.replace(_SLASH, "/"), fields[0].removeprefix(_RANK), *fields[1:]])
    else:
        text = "@".join([model, *fields]).replace(_SLASH, "/")
    try:
        text.encode()  # a name that is no UTF-8 was given by somebody else
        key = parse_key(text)
    except (UnicodeEncodeError, KeyFormatError):
        return None
    return key if file_name(key) == name else None


def unambiguous(text: str, takes: type[Key]) -> Key:
    """Read a key whose chunk is to be in a directory.

    Args:
        text: The key string.
        takes: The kind of key that the directory holds.

    Raises:
        KeyFormatError: It is no key of that kind, or another key has the same file.
    """
    key = parse_key(text)
    if not isinstance(key, takes):
        raise KeyFormatError(f"{text!r} is a key of {_MODE[type(key)]}, and this tier holds keys of {_MODE[takes]}")
    other = key_of(file_name(key))
    if other != key:
        raise KeyFormatError(
            f"{text!r}: LMCache writes '/' as {_SLASH!r} in file names, so its file would be that of {str(other)!r} too"
        )
    return key


_MODE: Final[dict[type[Key], str]] = {ClassicKey: "the classic engine", MPKey: "MP mode"}
