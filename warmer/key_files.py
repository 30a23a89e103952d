"""Keys that were written down: one a line, in the lines of an earlier plan or report, or as the files of an engine's tier."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING

from hfbucket_plugin.catalog import ChunkEntry
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import ConfigError, KeyFormatError
from hfbucket_plugin.keys import encode_name, parse_key
from warmer.tiers import directory_keys

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from hfbucket_plugin.bucket import Bucket

_LOOKUP_KEYS = 1000
_LOOKUP_SECS = 60.0


def keys_of(path: Path) -> Iterator[str]:
    """Stream the key strings of a file, or of the chunks in a directory of LMCache's.

    Raises:
        ConfigError: It cannot be read, or a line holds no key; the message says which.
    """
    if path.is_dir():
        yield from directory_keys(path)
        return
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - it is told in the error
                text = _key(line.rstrip("\r\n"))
                if text is not None:
                    parse_key(text)
                    yield text
    except OSError as error:
        raise ConfigError(f"--keys-from {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--keys-from {str(path)!r}, line {number + 1}: this is no text in UTF-8") from None
    except (KeyFormatError, ValueError, RecursionError) as error:
        raise ConfigError(f"--keys-from {str(path)!r}, line {number}: {error}") from None


def _key(line: str) -> str | None:
    """The key of a line; None for one that names none, such as the summary of a report."""
    if not line.strip():
        return None
    if not line.startswith("{"):
        return line
    record = json.loads(line)
    key = record.get("key")
    if key is not None and not isinstance(key, str):
        raise ValueError("its key is no text")
    return key


def look_up_keys(bucket: Bucket, keys: Iterable[str], skipped: Counter[str]) -> Iterator[ChunkEntry]:
    """What the bucket holds of some keys, in their order, each once.

    Args:
        bucket: The instance's.
        keys: Key strings.
        skipped: Keys that it does not hold are counted there, as ``not_in_bucket``.

    Raises:
        HFBucketError: The Hub did not tell.
    """
    batch: list[str] = []
    for key in _distinct(keys):
        batch.append(key)
        if len(batch) == _LOOKUP_KEYS:
            yield from _found(bucket, batch, skipped)
            batch = []
    if batch:
        yield from _found(bucket, batch, skipped)


def _distinct(keys: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for key in keys:
        digest = blake2b(key.encode(), digest_size=16).digest()  # a fraction of the key's own memory
        if digest not in seen:
            seen.add(digest)
            yield key


def _found(bucket: Bucket, keys: Sequence[str], skipped: Counter[str]) -> Iterator[ChunkEntry]:
    paths = [bucket.handle.join(encode_name(key)) for key in keys]
    found = bucket.stat(paths, Deadline.after(_LOOKUP_SECS))
    for key, path in zip(keys, paths, strict=True):
        info = found.get(path)
        if info is None:
            skipped["not_in_bucket"] += 1
        else:
            yield ChunkEntry(key, parse_key(key), info.content, info.uploaded_at)
