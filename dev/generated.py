"""Replaces the generated parts of a docs page: what stands between `<!-- name: … -->` and `<!-- /name -->`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with new generated parts.

    Args:
        page: The text of the page.
        parts: The text of each part by its name.

    Raises:
        ValueError: The page lacks the marks of a part.
    """
    for name, text in parts.items():
        marked = re.compile(rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        page, found = marked.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
        if found != 1:
            raise ValueError(
                f"expected the marks <!-- {name}: … --> and <!-- /{name} --> once, found them {found} times"
            )
    return page


def write(path: Path, parts: Mapping[str, str]) -> None:
    """Rewrite the generated parts of a page, and say on stderr whether it changed."""
    before = path.read_text(encoding="utf-8")
    after = filled(before, parts)
    path.write_text(after, encoding="utf-8")
    sys.stderr.write(f"docs/{path.name} " + ("was up to date\n" if before == after else "rewritten\n"))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(_line(line) for line in lines)


def _line(cells: list[str]) -> str:
    if set(cells) == {"---"}:
        return "|" + "---|" * len(cells)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
