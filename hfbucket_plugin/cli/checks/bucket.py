"""The bucket's own record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.cli.findings import Finding, note, ok, warning
from hfbucket_plugin.cli.words import count, size
from hfbucket_plugin.errors import BucketMissingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfbucket_plugin.cli.case import Case

NAME: Final = "bucket"


def check(case: Case) -> tuple[Finding, bool]:
    """Ask for the record.

    Returns:
        What was found, and whether the bucket is there.

    Raises:
        HFBucketError: It is not, or may not be seen.
    """
    settings = case.settings
    try:
        record = case.ask("info", case.bucket.info)
    except BucketMissingError:
        if not (settings.create_bucket_if_missing and settings.writes):
            raise
        found = f"{settings.bucket_handle.bucket_id} does not exist, or this token may not see it"
        advice = f"the first put creates it ({case.named.setting('create_bucket_if_missing')}), if the token may"
        return warning(NAME, found, advice), False
    return describe(settings.bucket_handle.bucket_id, record), True


def describe(bucket_id: str, record: Mapping[str, Any]) -> Finding:
    """The record in words. A field that the Hub does not send is left out."""
    private, region, amount, files = (record.get(name) for name in ("private", "region", "size", "totalFiles"))
    parts = [f"{bucket_id} exists"]
    if isinstance(private, bool):
        parts.append("private" if private else "public")
    if isinstance(region, str) and region:
        parts.append(f"region {region}")
    if isinstance(amount, int) and isinstance(files, int):
        parts.append(f"{size(amount)} in {count(files, 'object')}")
    found = ", ".join(parts)
    if private is False:
        return note(NAME, found, "whoever knows its name can read it, and KV chunks tell what prompts said")
    return ok(NAME, found)
