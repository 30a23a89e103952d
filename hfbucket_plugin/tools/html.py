"""HTML pages: self-contained files, readable on phones and screens."""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.units import printable, size
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


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
    """Return an HTML page.

    Args:
        title: Heading, and title of the browser window.
        parts: HTML of the body, with external names escaped.
        style: CSS in addition to that of all pages.
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
    """Escape external text for HTML."""
    return escape(printable(str(words)))


def paragraph(words: object, kind: str = "") -> str:
    """Return a paragraph of text.

    Args:
        words: The text.
        kind: `faint`, `warn`, or empty.
    """
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{text(words)}</p>\n"


COLOURS: Final = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#99ddff", "#bbcc33", "#999999",
)  # fmt: skip
"""Colours distinguishable with colour blindness, on white and black: Paul Tol's, https://personal.sron.nl/~pault/."""

_TEXT: Final = "#123456"
"""Placeholder for the page's text colour, dark or light; not used otherwise in plots."""

_WIDTH_INCHES: Final = 5.0
"""Width of a phone, so that text has the size of the page there; on a screen it grows with the plot."""

_LABEL_CHARS: Final = 28
_TICKS: Final = 8
_SETTINGS: Final = {
    "svg.fonttype": "none",  # keep text as text: small, searchable, and in the page's font
    "text.parse_math": False,  # a name may contain a $
    "font.size": 8.0,
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def expect_library() -> None:
    """Load the plot library with its fonts, which takes seconds the first time, so that the end of a run does not wait.

    Raises:
        ConfigError: If the library is not installed.
    """
    try:
        import matplotlib.font_manager  # noqa: F401, PLC0415
        from matplotlib.backends import backend_svg  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigError("--report-html needs Matplotlib: pip install 'lmcache-hfbucket[warmer]'") from None


def bytes_over_time(width_secs: float, series: Sequence[Sequence[int]]) -> str:
    """Plot the bytes copied over time, stacked by node.

    Args:
        width_secs: Width of a bin in seconds.
        series: Bytes copied in each bin; one sequence per node, all of the same length.
    """
    import numpy as np  # noqa: PLC0415 - installed only with Matplotlib

    times = [width_secs * place for place in range(len(series[0]) + 1)]
    sums = [np.concatenate([[0], np.cumsum(np.asarray(one, dtype=np.int64))]) for one in series]

    most = int(sum(one[-1] for one in sums))

    def draw(axes: Any) -> None:
        axes.stackplot(times, sums, colors=[COLOURS[at % len(COLOURS)] for at in range(len(sums))], linewidth=0)
        axes.set_xlabel("seconds")
        axes.set_xlim(0, times[-1])
        axes.set_ylim(bottom=0)
        # Ticks at powers of two, like the units.
        axes.set_yticks(range(0, most + 1, max(1, 1 << max(0, (most // _TICKS).bit_length()))))
        axes.yaxis.set_major_formatter(lambda value, _: size(value))

    return _drawn(draw, 2.6)


def latencies(bounds: Sequence[float], counts: Mapping[str, Sequence[int]]) -> str:
    """Plot a histogram of the durations of chunks.

    Args:
        bounds: Upper limits of all buckets except the last, in seconds.
        counts: Counts per bucket, by series.
    """
    used = [at for at in range(len(bounds) + 1) if any(one[at] for one in counts.values())] or [0]
    places = range(max(0, used[0] - 1), min(len(bounds), used[-1] + 1) + 1)

    def draw(axes: Any) -> None:
        below = [0] * len(places)
        for colour, one in zip(COLOURS, counts.values(), strict=False):
            heights = [one[at] for at in places]
            axes.bar(range(len(places)), heights, 0.9, bottom=below, color=colour)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        marks = [place for place, at in enumerate(places) if at < len(bounds) and at % 4 == 0]
        axes.set_xticks([mark + 0.5 for mark in marks], [_seconds(bounds[places[mark]]) for mark in marks])
        axes.set_xlabel("time of a chunk")
        axes.set_ylabel("chunks")

    return _drawn(draw, 2.2)


def coverage(rows: Sequence[tuple[str, float, float]]) -> str:
    """Plot the shares present before and after a run.

    Args:
        rows: Name, and both shares from 0 to 1.
    """

    def draw(axes: Any) -> None:
        places = range(len(rows))
        axes.barh(places, [after for _, _, after in rows], 0.7, color=COLOURS[2])
        axes.barh(places, [before for _, before, _ in rows], 0.7, color=COLOURS[10])
        _name_rows(axes, [name for name, _, _ in rows])

    return _drawn(draw, _height(rows))


def parts(rows: Sequence[tuple[str, Sequence[float]]], colours: Sequence[str]) -> str:
    """Plot the composition of each row.

    Args:
        rows: Name, and shares from 0 to 1.
        colours: Colours of the shares, as many as each row has.
    """

    def draw(axes: Any) -> None:
        left = [0.0] * len(rows)
        for at, colour in enumerate(colours):
            widths = [shares[at] for _, shares in rows]
            axes.barh(range(len(rows)), widths, 0.7, left=left, color=colour)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        _name_rows(axes, [name for name, _ in rows])

    return _drawn(draw, _height(rows))


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _height(rows: Sequence[object]) -> float:
    return 0.5 + 0.22 * len(rows)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LABEL_CHARS else f"{name[: _LABEL_CHARS - 1]}…"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.0f} s"


def _drawn(draw: Any, height_inches: float) -> str:
    """Return one plot as an SVG element."""
    from matplotlib import rc_context  # noqa: PLC0415 - takes a second to import, and only pages need it
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    out = io.StringIO()
    with rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs missing from Matplotlib's font: the page's font is used
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, count=1, flags=re.DOTALL)
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    return drawn.replace(_TEXT, "currentColor")
