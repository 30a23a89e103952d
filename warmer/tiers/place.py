"""What differs from node to node in the path of a tier: `{node_name}`, `{node_id}` and `{label:NAME}`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME: Final = "node_name"
_ID: Final = "node_id"
_LABEL: Final = "label:"
_TOKEN: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Place:
    """Which node this is.

    Attributes:
        node_name: As the cluster names it.
        node_id: The cluster's id of it.
        labels: Its labels.
    """

    node_name: str = ""
    node_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def expand(self, path: str) -> str:
        """A path with its placeholders replaced.

        Raises:
            ConfigError: A placeholder is unknown, or this node has no value for it that could be part of a path.
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
    """See whether a path's placeholders are known, before any node is asked.

    Raises:
        ConfigError: One is not.
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
