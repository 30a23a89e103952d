"""Writes docs/reliability.md's generated parts. `make docs` writes the promises, `make faults` what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from dev.faults.promises import table

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
PROMISES: Final = ("<!-- promises: written by `make docs` from dev/faults/promises.py -->", "<!-- /promises -->")
MEASURED: Final = ("<!-- measured: written by `make faults` -->", "<!-- /measured -->")


def replaced(page: str, marks: tuple[str, str], text: str) -> str:
    """The page with a text between two marks.

    Raises:
        ValueError: The page lacks the marks.
    """
    head, found, rest = page.partition(marks[0])
    _, ended, tail = rest.partition(marks[1])
    if not found or not ended:
        raise ValueError(f"{PAGE} lacks the lines {marks[0]} and {marks[1]}")
    return f"{head}{marks[0]}\n{text}\n{marks[1]}{tail}"


def with_promises(page: str) -> str:
    """The page with the promises as they stand in the code."""
    return replaced(page, PROMISES, table())


def write(page: str) -> None:
    """Rewrite the page."""
    before = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page, encoding="utf-8")
    sys.stderr.write("docs/reliability.md " + ("was up to date\n" if before == page else "rewritten\n"))


if __name__ == "__main__":
    write(with_promises(PAGE.read_text(encoding="utf-8")))
