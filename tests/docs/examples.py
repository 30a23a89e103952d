"""The examples of `docs/python.md`."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
_SECTION = re.compile(r"^## (?P<title>.*?)\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def example(title):
    """The one example below a heading."""
    sections = {found["title"]: found["text"] for found in _SECTION.finditer(PAGE.read_text(encoding="utf-8"))}
    (code,) = re.findall(r"^```python\n(.*?)^```", sections[title], re.MULTILINE | re.DOTALL)
    return compile(code, f"{PAGE.name}: {title}", "exec")
