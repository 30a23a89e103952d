"""Writes the tables of settings in docs/configure.md from the models: `make docs`. A test checks that it was run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from huggingface_hub import constants

from dev.generated import table, write
from hfbucket_plugin.config.l2 import L2Settings
from hfbucket_plugin.config.settings import InstanceSettings
from hfbucket_plugin.core.files import default_root

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "configure.md"
HEAD: Final = ("setting", "default", "meaning, and why the default")


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


def settings(fields: dict[str, FieldInfo]) -> str:
    """The table of some settings, in the order of their model."""
    rows = [(f"`{name}`", default_of(field), field.description or "") for name, field in fields.items()]
    return table(HEAD, rows)


def parts() -> dict[str, str]:
    """The generated parts of the page."""
    common = dict(InstanceSettings.model_fields)
    of_mp_mode = {name: field for name, field in L2Settings.model_fields.items() if name not in common}
    return {"settings": settings(common), "l2_settings": settings(of_mp_mode)}


if __name__ == "__main__":
    write(PAGE, parts())
