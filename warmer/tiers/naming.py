"""Names of chunk files, and placeholders in the paths of tiers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import ClassicKey, Key, MPKey, parse_key
from hfbucket_plugin.errors import ConfigError, KeyFormatError

if TYPE_CHECKING:
    from collections.abc import Mapping


SUFFIX: Final = ".data"

_SLASH: Final = "-SEP-"
_RANK: Final = "0x"


def file_name(key: Key) -> str:
    """Return the name of a chunk's file, as LMCache forms it."""
    if isinstance(key, ClassicKey):
        return f"{key}".replace("/", _SLASH) + SUFFIX
    model = key.model.replace("/", _SLASH)
    name = f"{model}@{_RANK}{key.kv_rank:08x}@{key.group:x}@{key.chunk_hash}"
    return f"{name}@{key.salt}{SUFFIX}" if key.salt else f"{name}{SUFFIX}"


def key_of(name: str) -> Key | None:
    """Return the key of the chunk in a file, from the file's name; None if the name is not that of a chunk."""
    if not name.endswith(SUFFIX):
        return None
    model, *fields = name.removesuffix(SUFFIX).split("@")
    if fields and fields[0].startswith(_RANK):
        text = "@".join([model.replace(_SLASH, "/"), fields[0].removeprefix(_RANK), *fields[1:]])
    else:
        text = "@".join([model, *fields]).replace(_SLASH, "/")
    try:
        text.encode()  # LMCache writes only names that are valid UTF-8
        key = parse_key(text)
    except (UnicodeEncodeError, KeyFormatError):
        return None
    return key if file_name(key) == name else None


def unambiguous(text: str, takes: type[Key]) -> Key:
    """Parse a key whose chunk is to be in a directory.

    Args:
        text: Key string.
        takes: Kind of key that the directory holds.

    Raises:
        KeyFormatError: The text is not a key of that kind, or another key has the same file.
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


_NAME: Final = "node_name"
_ID: Final = "node_id"
_LABEL: Final = "label:"
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Identity of a node.

    Attributes:
        node_name: Name of the node in the cluster.
        node_id: Id of the node in the cluster.
        labels: Labels of the node.
    """

    node_name: str = ""
    node_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def expand(self, path: str) -> str:
        """Return a path with its placeholders replaced.

        Raises:
            ConfigError: A placeholder is unknown, or this node has no value for it that can be part of a path.
        """
        return _TOKEN.sub(lambda match: self._replaced(path, match), path)

    def _replaced(self, path: str, match: re.Match[str]) -> str:
        token, name = match[0], match[1]
        if token in ("{{", "}}"):
            return token[0]
        if name is None or not _known(name):
            raise ConfigError(_unknown(path, token))
        value = self._value(name)
        where = f"path {path!r}: node {self.node_name or self.node_id or 'without a name'!r}"
        if not value:
            raise ConfigError(f"{where} has no value for {token}")
        if "/" in value or "\0" in value or value in (".", ".."):
            raise ConfigError(f"{where} has {value!r} for {token}, which cannot be one part of a path")
        return value

    def _value(self, name: str) -> str:
        if name == _NAME:
            return self.node_name
        if name == _ID:
            return self.node_id
        return self.labels.get(name.removeprefix(_LABEL), "")


def check(path: str) -> None:
    """Check that the placeholders of a path are known, before any node is contacted.

    Raises:
        ConfigError: A placeholder is unknown.
    """
    for match in _TOKEN.finditer(path):
        if match[0] not in ("{{", "}}") and (match[1] is None or not _known(match[1])):
            raise ConfigError(_unknown(path, match[0]))


def _known(name: str) -> bool:
    return name in (_NAME, _ID) or (name.startswith(_LABEL) and name != _LABEL)


def _unknown(path: str, token: str) -> str:
    return (
        f"path {path!r}: {token!r} is no placeholder; known are {{node_name}}, {{node_id}} and {{label:NAME}}, and "
        "'{{' and '}}' stand for single braces"
    )
