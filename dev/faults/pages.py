"""Writes docs/reliability.md's generated parts. `make docs` writes the promises, `make faults` what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dev.faults.guarantees import table
from dev.generated import write

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def parts() -> dict[str, str]:
    """The promises as they stand in the code."""
    return {"promises": table()}


if __name__ == "__main__":
    write(PAGE, parts())
