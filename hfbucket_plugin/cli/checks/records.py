"""Objects of ours that tell of trouble: records of bad objects, and what an interrupted `--probe-write` left."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.bad_objects import BAD_DIRECTORY
from hfbucket_plugin.cli.findings import Finding, note, ok, warning
from hfbucket_plugin.cli.words import age, count
from hfbucket_plugin.handle import RESERVED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.bucket import ObjectInfo
    from hfbucket_plugin.cli.case import Case

NAME: Final = "records"
BAD: Final = f"{BAD_DIRECTORY}/"
PROBES: Final = f"{RESERVED}/probe/"

_FIRST: Final = 1000


def check(case: Case) -> Finding:
    """List what lies below the two prefixes.

    Raises:
        HFBucketError: A page did not come.
    """
    bad, probes = (_list(case, name) for name in (BAD, PROBES))
    handle = case.bucket.handle
    if bad:
        newest = max(bad, key=lambda info: info.uploaded_at or datetime.min.replace(tzinfo=UTC))
        when = age(newest.uploaded_at, datetime.fromtimestamp(case.now(), UTC))
        return warning(
            NAME,
            f"{'at least ' if len(bad) == _FIRST else ''}{count(len(bad), 'record')} of bad objects below {handle.join(BAD)}, the newest {when} old: {newest.path}",
            "each says which object failed its hash, and why: delete the object or let it be, then delete the record",
        )
    if probes:
        found = f"{count(len(probes), 'object')} of --probe-write below {handle.join(PROBES)}, such as {probes[0].path}"
        return note(NAME, found, "unless one runs at this moment it was killed: delete them")
    return ok(NAME, "no records of bad objects")


def _list(case: Case, name: str) -> Sequence[ObjectInfo]:
    path = case.bucket.handle.join(name)
    return case.ask("tree", lambda _: [*itertools.islice(case.bucket.list_objects(path, case.timeout_secs), _FIRST)])
