"""Strict, bounded reader of user-written YAML files, with errors that quote no values.

PyYAML raises exceptions of any type, recurses as deep as a document nests, silently accepts duplicate keys, and quotes
the file, which may hold a token, in its errors. LMCache reads its own file by itself; documents that only this reader
rejects (duplicate keys, hundreds of levels) are mistakes there too.
"""

from __future__ import annotations

import math
import os
import re
import select
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import yaml

from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES: Final = 1024 * 1024
"""Maximum size of a file in bytes. A configuration of a hundred instances takes less than a tenth of it."""

_MAX_DEPTH: Final = 64
_MAX_NODES: Final = 100_000
_INTEGER_BITS: Final = 64
_PIPE_SECS: Final = 10.0
_QUOTED = re.compile(r"'.*'|\".*\"", re.DOTALL)
_SHOWN_KEY = re.compile(r"(?!hf_)[A-Za-z_][A-Za-z0-9_.\-]{0,63}", re.IGNORECASE)
"""Keys that an error may show. All others, which may be misplaced tokens, are not repeated."""


class _UnfitError(Exception):
    """A document is rejected; the message names the position."""

    def __init__(self, problem: str, line: int | None, column: int | None) -> None:
        super().__init__(problem)
        self.problem, self.line, self.column = problem, line, column


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Args:
        path: Path of the file, or of a pipe (`<(envsubst < template)`).
        what: Description of the file in errors, before its path, such as ``--config``.

    Returns:
        The document; None for an empty file.

    Raises:
        ConfigError: The file cannot be read, or `parse_yaml` rejects it.
    """
    name = f"{what} {str(path)!r}"
    try:
        data = _read(path)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name} cannot be read: it is longer than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name} cannot be read: line {line} is not UTF-8; save the file as UTF-8") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Any:
    """Parse a YAML document of plain values: only YAML's own tags, no duplicate keys, bounded depth and size.

    Args:
        text: Document.
        name: Name of the document, for errors.

    Returns:
        The document; None if it is empty.

    Raises:
        ConfigError: The document is rejected. The message is one line with line and column, and quotes no value.
    """
    try:
        return _parsed(text)
    except _UnfitError as error:
        at = "" if error.line is None else f" at line {error.line}"
        at += "" if error.column is None else f", column {error.column}"
        message = f"{name} is not valid YAML{at}: {error.problem}"
    raise ConfigError(message)  # outside the handler, because the chained cause would print the file


def _read(path: Path) -> bytes:
    """Read at most one byte more than the limit; never wait for a pipe's writer that does not come."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        pieces, left = [], MAX_BYTES + 1
        while left:
            if not regular and not select.select([descriptor], [], [], _PIPE_SECS)[0]:
                raise OSError(None, f"nothing was written to it within {_PIPE_SECS:g} s")
            piece = os.read(descriptor, left)
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def _parsed(text: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        _expect_shallow(loader)
        loader.dispose()
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {}, set())
        return loader.construct_document(node)
    except _UnfitError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _UnfitError("a character is not allowed in YAML", line, None) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = "; ".join(_QUOTED.sub("'…'", part) for part in (error.context, error.problem) if part)
        raise _unfit(problem or "it does not parse", mark) from None
    except Exception as error:  # noqa: BLE001 - the scanner raises OverflowError for escapes, among others
        raise _unfit(f"it does not parse ({type(error).__name__})", loader.get_mark() if loader else None) from None
    finally:
        if loader is not None:
            loader.dispose()


def _unfit(problem: str, mark: yaml.Mark | None) -> _UnfitError:
    return _UnfitError(problem, None if mark is None else mark.line + 1, None if mark is None else mark.column + 1)


def _expect_shallow(loader: _Loader) -> None:
    """Reject excessive nesting and size before anything recurses: event parsing has its own stack."""
    depth = nodes = 0
    while loader.check_event():
        event = loader.get_event()  # type: ignore[no-untyped-call]  # the stubs leave it out
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > _MAX_DEPTH:
            raise _unfit(f"it nests deeper than {_MAX_DEPTH} levels", event.start_mark)
        if nodes > _MAX_NODES:
            raise _unfit(f"it holds more than {_MAX_NODES} values", event.start_mark)


def _weigh(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """Return the number of values of a node with its aliases expanded; reject duplicate keys."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_nodes:
        raise _unfit("an alias stands for what it is part of", node.start_mark)
    open_nodes.add(id(node))
    total, keys = 1, set()
    children = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            children += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys and key.tag != "tag:yaml.org,2002:merge":
                    shown = repr(key.value) if _SHOWN_KEY.fullmatch(key.value) else "a key"
                    raise _unfit(f"{shown} is there twice", key.start_mark)
                keys.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    for child in children:
        total += _weigh(child, known, open_nodes)
        if total > _MAX_NODES:
            raise _unfit(f"its aliases stand for more than {_MAX_NODES} values", node.start_mark)
    open_nodes.discard(id(node))
    known[id(node)] = total
    return total


class _Loader(yaml.SafeLoader):
    """Safe loader whose errors have a position."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct an object; see `yaml.SafeLoader`.

        Raises:
            _UnfitError: The value is invalid for its type, or out of range.
        """
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, datetime) and value.tzinfo is not None:
                value.astimezone(UTC)  # rejects a time such as year 1 east of Greenwich, which cannot be compared
        except (_UnfitError, yaml.MarkedYAMLError):
            raise
        except Exception:  # noqa: BLE001 - constructors raise anything: AttributeError, KeyError …
            tag = node.tag.rpartition(":")[2] if node.tag.startswith("tag:yaml.org,2002:") else ""
            named = {"int": "integer", "float": "number", "timestamp": "date", "bool": "boolean"}.get(tag, "value")
            raise _unfit(f"a value is not a valid {named}", node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            raise _unfit("an integer is out of range", node.start_mark)
        if isinstance(value, float) and math.isinf(value) and not node.value.lower().endswith(".inf"):
            raise _unfit("a number is out of range", node.start_mark)
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise _unfit("a text holds half of a surrogate pair", node.start_mark)
        return value
