"""`status` as a page for people: one HTML file that loads nothing, with the plots drawn in it."""

from __future__ import annotations

import os
import secrets
from html import escape
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.words import age, size
from hfbucket_plugin.errors import ConfigError
from jobs.status import AGES, OLDER, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from jobs.guards import Extent
    from jobs.status import Status

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
th { font-weight: 600; color: var(--faint) } td.number, th.number { text-align: right; white-space: nowrap; width: 7rem }
td.plot { width: 45% } svg { display: block; width: 100%; height: 1rem } rect { fill: var(--bar) }
"""


def write_page(path: Path, statuses: Sequence[Status], troubles: Sequence[str]) -> None:
    """Write the page; it appears whole.

    Args:
        path: Of the file.
        statuses: Of the instances.
        troubles: Of those of which nothing is known.

    Raises:
        ConfigError: It cannot be written.
    """
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        try:
            part.write_text(page(statuses, troubles), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--html {os.fspath(path)!r} cannot be written: {error.strerror}") from None


def page(statuses: Sequence[Status], troubles: Sequence[str]) -> str:
    """The page."""
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width"><title>LMCache buckets</title>',
            f"<style>{_STYLE}</style></head>\n<body><h1>LMCache buckets</h1>\n",
            *(_paragraph(line, "warn") for line in troubles),
            *(part for one in statuses for part in _instance(one)),
            "</body></html>\n",
        ]
    )


def _instance(found: Status) -> Iterator[str]:
    census = found.census
    yield f"<h2>{escape(found.instance)}</h2>\n"
    yield f'<p class="faint"><code>{escape(found.bucket)}</code>, {census.now:%Y-%m-%d %H:%M} UTC</p>\n'
    yield _paragraph(f"{census.chunks.objects:,} chunks, {size(census.chunks.bytes)}")
    yield from (_paragraph(line, kind) for line, kind in _remarks(found))
    yield _bars("By model", ((model, one) for model, one in sorted(census.models.items())))
    order = [name for name, _ in AGES] + [OLDER, UNKNOWN]
    words = {OLDER: f"{AGES[-1][0]} and older", UNKNOWN: "not known"}
    ages = ((words.get(name, f"below {name}"), census.ages[name]) for name in order if name in census.ages)
    yield _bars("By age", ages)
    yield _bars("By last read", found.heat_rows)
    workers = sorted(census.workers.items())
    yield _bars("By worker", ((f"{model}, worker {worker} of {world}", one) for (model, world, worker), one in workers))
    yield _bars("Not ours, never deleted unasked", sorted(census.passed_by.items()))
    if found.outlook is not None:
        deleted = [(f"{model}: {reason}", one) for (model, reason), one in sorted(found.outlook.by_reason.items())]
        yield _bars("The next cleanup deletes", deleted) or _paragraph("The next cleanup deletes nothing.")
        yield _bars("The next cleanup keeps", sorted(found.outlook.kept.items()))


def _remarks(found: Status) -> Iterator[tuple[str, str]]:
    if found.outlook is not None and found.outlook.refused:
        yield f"The next cleanup would be refused: {found.outlook.refused}", "warn"
    if found.trouble:
        yield f"The last report cannot be read: {found.trouble}", "warn"
    if found.index_line:
        yield f"{found.index_line[0].upper()}{found.index_line[1:]}", ""
    if found.heat_line:
        yield f"{found.heat_line[0].upper()}{found.heat_line[1:]}", ""
    growth = found.growth
    if growth is not None and found.last is not None:
        sign = "+" if growth["bytes"] >= 0 else "-"
        line = (
            f"Since the last {found.last.job}, {age(found.last.at, found.census.now)} ago: {growth['objects']:+,} chunks, "
            f"{sign}{size(int(abs(growth['bytes'])))} ({size(int(abs(growth['bytes_per_day'])))} a day)"
        )
        yield line, ""


def _paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def _bars(title: str, rows: Iterable[tuple[str, Extent]]) -> str:
    """A table with a bar for the bytes of each row; nothing for no rows."""
    rows = list(rows)
    if not rows:
        return ""
    most = max(extent.bytes for _, extent in rows) or 1
    lines = [
        f'<tr><td>{escape(name)}</td><td class="plot">{_bar(extent.bytes / most)}</td>'
        f'<td class="number">{size(extent.bytes)}</td><td class="number">{extent.objects:,}</td></tr>\n'
        for name, extent in rows
    ]
    head = '<tr><th></th><th></th><th class="number">bytes</th><th class="number">objects</th></tr>\n'
    return f"<h3>{escape(title)}</h3>\n<table>\n{head}{''.join(lines)}</table>\n"


def _bar(share: float) -> str:
    width = f"{100 * share:.2f}"
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{width} %">'
        f'<rect x="0" y="1" width="{width}" height="8"></rect></svg>'
    )
