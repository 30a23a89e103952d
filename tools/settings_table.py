"""Writes the table of settings in docs/configure.md from the model: `make docs`. A test checks that it was run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from hfbucket_plugin.settings import InstanceSettings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configure.md"
BEGIN = "<!-- settings: written by `make docs` from hfbucket_plugin/settings.py -->"
END = "<!-- /settings -->"


def default_of(field: FieldInfo) -> str:
    """The default as a reader of the YAML would write it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == constants.ENDPOINT:
        return "`HF_ENDPOINT`"
    return f"`{value}`"


def table() -> str:
    """The table, in the order of the model."""
    rows = ["| setting | default | meaning, and why the default |", "|---|---|---|"]
    rows += [
        f"| `{name}` | {default_of(field)} | {' '.join((field.description or '').split())} |"
        for name, field in InstanceSettings.model_fields.items()
    ]
    return "\n".join(rows)


def rendered(page: str) -> str:
    """The page with the table in its place.

    Raises:
        ValueError: The page has no place for it.
    """
    head, found, rest = page.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{PAGE} lacks the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    """Rewrite the page."""
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    PAGE.write_text(after, encoding="utf-8")
    sys.stderr.write("docs/configure.md " + ("was up to date\n" if before == after else "rewritten\n"))


if __name__ == "__main__":
    main()
