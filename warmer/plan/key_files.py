"""Keys from files: one a line, the lines of an earlier plan or report, or the chunk files of an engine's tier."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name, parse_key
from hfbucket_plugin.errors import ConfigError, KeyFormatError
from hfbucket_plugin.hub.listing import ChunkEntry
from hfbucket_plugin.tools.external_sort import KeySet
from hfbucket_plugin.tools.lines import check_characters, key_lines
from warmer.tiers import directory_keys

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from hfbucket_plugin.hub.bucket import Bucket

_LOOKUP_KEYS = 1000
_LOOKUP_SECS = 60.0


def keys_of(path: Path) -> Iterator[str]:
    """Yield the key strings of a file, or of the chunks in an LMCache directory.

    Raises:
        ConfigError: The file cannot be read, or a line holds no key; the message names the line.
    """
    if path.is_dir():
        yield from directory_keys(path)
        return
    for number, line in key_lines(path, "--keys-from"):
        try:
            text = _key(line)
            if text is not None:
                check_characters(text)
                parse_key(text)
        except (KeyFormatError, ValueError, RecursionError) as error:
            raise ConfigError(f"--keys-from {str(path)!r}, line {number}: {error}") from None
        if text is not None:
            yield text


def _key(line: str) -> str | None:
    """Return the key of a line; None for a line without one, such as the summary of a report."""
    if not line.startswith("{"):
        return line
    record = json.loads(line)
    key = record.get("key")
    if key is not None and not isinstance(key, str):
        raise ValueError("its key is no text")
    return key


def look_up_keys(bucket: Bucket, keys: Iterable[str], skipped: Counter[str]) -> Iterator[ChunkEntry]:
    """Look up keys in the bucket, and yield those found, in order and each once.

    Args:
        bucket: Bucket of the instance.
        keys: Key strings.
        skipped: Counter in which absent keys are counted as ``not_in_bucket``.

    Raises:
        TempDirError: There is no room to record which keys were seen.
        HFBucketError: The Hub did not answer.
    """
    with KeySet() as seen:
        distinct = seen.first_seen(keys)
        while batch := list(islice(distinct, _LOOKUP_KEYS)):
            yield from _found(bucket, batch, skipped)


def _found(bucket: Bucket, keys: Sequence[str], skipped: Counter[str]) -> Iterator[ChunkEntry]:
    paths = [bucket.handle.join(encode_name(key)) for key in keys]
    found = bucket.stat(paths, Deadline.patient(_LOOKUP_SECS))
    for key, path in zip(keys, paths, strict=True):
        info = found.get(path)
        if info is None:
            skipped["not_in_bucket"] += 1
        else:
            yield ChunkEntry(key, parse_key(key), info.content, info.uploaded_at)
