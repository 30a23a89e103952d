"""Reader of the lines of external files: lists of keys, reports, manifests."""

from __future__ import annotations

import os
import stat
import unicodedata
from typing import TYPE_CHECKING, BinaryIO, Final

from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_LINE_BYTES: Final = 1024 * 1024
"""Maximum length of a line in bytes."""

BOM: Final = b"\xef\xbb\xbf"
"""The byte order mark that some editors put before text in UTF-8."""

_BREAKING: Final = frozenset({"Cc", "Zl", "Zp", "Cs"})
"""Unicode categories that are invalid in keys: control characters, line separators, lone surrogates."""


def open_regular(path: Path, what: str) -> BinaryIO:
    """Open a file for reading without ever blocking on it.

    Args:
        path: Path of the file; links are followed.
        what: Name of the file in errors, such as `--key-file`.

    Raises:
        ConfigError: If the file cannot be opened, or is a pipe, a device or a directory.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {reason}") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ConfigError(
        f"{what} {str(path)!r} cannot be read: it is not a regular file. Write its content to a file first"
    )


def lines_of(path: Path, what: str) -> Iterator[tuple[int, str]]:
    r"""Stream the lines of a text file in UTF-8, with their numbers from 1.

    A line ends with `\n` or `\r\n`, and with nothing else; a byte order mark at the start of a line is dropped.

    Args:
        path: Path of the file.
        what: Name of the file in errors.

    Raises:
        ConfigError: If the file cannot be read, a line is not UTF-8, or a line is longer than `MAX_LINE_BYTES`; the
            message names the line.
    """
    number = 0
    with open_regular(path, what) as file:
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except OSError as error:
                raise ConfigError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from None
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{what} {str(path)!r}, line {number}: longer than {MAX_LINE_BYTES} bytes")
            line = line.removeprefix(BOM)  # of the file, or of a file appended to it
            try:
                yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError:
                raise ConfigError(f"{what} {str(path)!r}, line {number}: not valid UTF-8") from None


def key_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Stream the lines of a file with one key per line, like `lines_of`; blank lines are skipped.

    Args:
        path: Path of the file.
        what: Name of the file in errors.

    Raises:
        ConfigError: In the cases of `lines_of`, or if a line contains a control character; the message names it.
    """
    for number, line in lines_of(path, what):
        if not line.strip():
            continue
        try:
            check_characters(line)
        except ValueError as error:
            raise ConfigError(f"{what} {str(path)!r}, line {number}: {error}") from None
        yield number, line


def check_characters(text: str) -> None:
    """Refuse an external key with a control character, line separator or lone surrogate.

    Args:
        text: A key, or another name to look for.

    Raises:
        ValueError: If the text contains one; the message gives its code point.
    """
    if text.isascii() and text.isprintable():
        return
    for place, character in enumerate(text, 1):
        if unicodedata.category(character) in _BREAKING:
            raise ValueError(f"character {place} is U+{ord(character):04X}, which cannot be part of a key")
