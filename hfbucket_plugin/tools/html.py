"""Pages for people: one HTML file each, which loads nothing and is read on a phone as well as on a screen."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.units import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #6b7280; --back: #ffffff; --bar: #3b6fb6; --warn: #b45309;
  --line: #e2e5ea }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --faint: #9aa3af; --back: #16181c; --bar: #7aa5e0;
  --warn: #f0a44b; --line: #2c3036 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem } code { font-size: .9em; overflow-wrap: anywhere }
p.faint, td.faint { color: var(--faint) } p.warn { color: var(--warn); font-weight: 600 }
table { border-collapse: collapse; width: 100% } td, th { padding: .15rem .6rem .15rem 0; text-align: left; vertical-align: top }
th { font-weight: 600; color: var(--faint) } td.number, th.number { text-align: right; white-space: nowrap }
"""


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page.

    Args:
        title: Above it, and in the browser's bar.
        parts: Its HTML, what others named being escaped.
        style: CSS beside that of all pages.
    """
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>',
            f"<style>{_STYLE}{style}</style></head>\n<body><h1>{text(title)}</h1>\n",
            *parts,
            "</body></html>\n",
        ]
    )


def text(words: object) -> str:
    """What others named, as it may stand in HTML."""
    return escape(printable(str(words)))


def paragraph(words: object, kind: str = "") -> str:
    """A paragraph of text.

    Args:
        words: The text.
        kind: `faint`, `warn`, or none.
    """
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{text(words)}</p>\n"
