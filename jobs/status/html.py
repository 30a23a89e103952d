"""HTML page of `status`: one self-contained file with inline plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.files import write_whole
from hfbucket_plugin.core.units import age, size
from hfbucket_plugin.tools.html import document, paragraph, text
from jobs.status.status import AGES, OLDER, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from hfbucket_plugin.core.units import Extent
    from jobs.status.status import Status

_STYLE: Final = """
td.number, th.number { width: 7rem } td.plot { width: 45% } svg { display: block; width: 100%; height: 1rem }
rect { fill: var(--bar) }
"""


def write_page(path: Path, statuses: Sequence[Status], troubles: Sequence[str]) -> None:
    """Write the page atomically.

    Args:
        path: Path of the file.
        statuses: Status of each instance.
        troubles: Errors of the instances without a status.

    Raises:
        ConfigError: If the file cannot be written.
    """
    write_whole(path, page(statuses, troubles), "--html")


def page(statuses: Sequence[Status], troubles: Sequence[str]) -> str:
    """Return the HTML page."""
    lines = [paragraph(line, "warn") for line in troubles]
    return document("LMCache buckets", [*lines, *(part for one in statuses for part in _instance(one))], _STYLE)


def _instance(found: Status) -> Iterator[str]:
    census = found.census
    yield f"<h2>{text(found.instance)}</h2>\n"
    yield f'<p class="faint"><code>{text(found.bucket)}</code>, {census.now:%Y-%m-%d %H:%M} UTC</p>\n'
    yield paragraph(f"{census.chunks.objects:,} chunks, {size(census.chunks.bytes)}")
    yield from (paragraph(line, kind) for line, kind in _remarks(found))
    yield _bars("By model", ((model, one) for model, one in sorted(census.models.items())))
    order = [name for name, _ in AGES] + [OLDER, UNKNOWN]
    words = {OLDER: f"{AGES[-1][0]} and older", UNKNOWN: "not known"}
    ages = ((words.get(name, f"below {name}"), census.ages[name]) for name in order if name in census.ages)
    yield _bars("By age", ages)
    yield _bars("By last read", found.access_rows)
    workers = sorted(census.workers.items())
    yield _bars("By worker", ((f"{model}, worker {worker} of {world}", one) for (model, world, worker), one in workers))
    yield _bars("Not ours, never deleted unasked", sorted(census.passed_by.items()))
    if found.outlook is not None:
        deleted = [(f"{model}: {reason}", one) for (model, reason), one in sorted(found.outlook.by_reason.items())]
        yield _bars("The next cleanup deletes", deleted) or paragraph("The next cleanup deletes nothing.")
        yield _bars("The next cleanup keeps", sorted(found.outlook.kept.items()))


def _remarks(found: Status) -> Iterator[tuple[str, str]]:
    if found.outlook is not None and found.outlook.refused:
        yield f"The next cleanup would be refused: {found.outlook.refused}", "warn"
    if found.trouble:
        yield f"The last report cannot be read: {found.trouble}", "warn"
    if found.index_line:
        yield f"{found.index_line[0].upper()}{found.index_line[1:]}", ""
    if found.access_line:
        yield f"{found.access_line[0].upper()}{found.access_line[1:]}", ""
    growth = found.growth
    if growth is not None and found.last is not None:
        sign = "+" if growth["bytes"] >= 0 else "-"
        line = (
            f"Since the last {found.last.job}, {age(found.last.at, found.census.now)} ago: {growth['objects']:+,} chunks, "
            f"{sign}{size(int(abs(growth['bytes'])))} ({size(int(abs(growth['bytes_per_day'])))} a day)"
        )
        yield line, ""


def _bars(title: str, rows: Iterable[tuple[str, Extent]]) -> str:
    """Return a table with a bar for the bytes of each row; empty without rows."""
    rows = list(rows)
    if not rows:
        return ""
    most = max(extent.bytes for _, extent in rows) or 1
    lines = [
        f'<tr><td>{text(name)}</td><td class="plot">{_bar(extent.bytes / most)}</td>'
        f'<td class="number">{size(extent.bytes)}</td><td class="number">{extent.objects:,}</td></tr>\n'
        for name, extent in rows
    ]
    head = '<tr><th></th><th></th><th class="number">bytes</th><th class="number">objects</th></tr>\n'
    return f"<h3>{text(title)}</h3>\n<table>\n{head}{''.join(lines)}</table>\n"


def _bar(share: float) -> str:
    width = f"{100 * share:.2f}"
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{width} %">'
        f'<rect x="0" y="1" width="{width}" height="8"></rect></svg>'
    )
