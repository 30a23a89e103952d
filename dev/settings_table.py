"""Writes the tables of settings in docs/configure.md from the models: `make docs`. A test checks that it was run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from hfbucket_plugin.config.l2 import L2Settings
from hfbucket_plugin.config.settings import InstanceSettings
from hfbucket_plugin.core.files import default_root

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configure.md"
PLACES = {
    "settings": "<!-- settings: written by `make docs` from hfbucket_plugin/config/settings.py -->",
    "l2_settings": "<!-- l2_settings: written by `make docs` from hfbucket_plugin/config/l2.py -->",
}


def default_of(field: FieldInfo) -> str:
    """The default as a reader of the YAML would write it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value in {constants.ENDPOINT, "https://huggingface.co"}:
        return "`HF_ENDPOINT`"
    if value == default_root():
        return "`lmcache-hfbucket-<user id>` in `TMPDIR`, or in `/tmp`"
    return f"`{value}`"


def table(fields: dict[str, FieldInfo]) -> str:
    """The table of some settings, in the order of their model."""
    rows = ["| setting | default | meaning, and why the default |", "|---|---|---|"]
    rows += [
        f"| `{name}` | {default_of(field)} | {' '.join((field.description or '').split())} |"
        for name, field in fields.items()
    ]
    return "\n".join(rows)


def rendered(page: str) -> str:
    """The page with the tables in their places.

    Raises:
        ValueError: The page has no place for one.
    """
    common = dict(InstanceSettings.model_fields)
    fields = {
        "settings": common,
        "l2_settings": {name: field for name, field in L2Settings.model_fields.items() if name not in common},
    }
    for name, begin in PLACES.items():
        end = f"<!-- /{name} -->"
        head, found, rest = page.partition(begin)
        _, ended, tail = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"{PAGE} lacks the lines {begin} and {end}")
        page = f"{head}{begin}\n{table(fields[name])}\n{end}{tail}"
    return page


def main() -> None:
    """Rewrite the page."""
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    PAGE.write_text(after, encoding="utf-8")
    sys.stderr.write("docs/configure.md " + ("was up to date\n" if before == after else "rewritten\n"))


if __name__ == "__main__":
    main()
