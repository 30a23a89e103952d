"""`python -m hfbucket_plugin`."""

from __future__ import annotations

import sys

from hfbucket_plugin.core import texts
from hfbucket_plugin.hub import xet_home
from hfbucket_plugin.tools.signals import end_by_signals

_EXTRA = frozenset({"typer", "rich"})


def main() -> None:
    """Run the command line; an engine's environment need not have what it is made of."""
    end_by_signals()
    xet_home.begin()
    try:
        from hfbucket_plugin.cli.app import app  # noqa: PLC0415 - it may be missing
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        sys.stderr.write("hfbucket: the command line needs typer and rich: pip install 'lmcache-hfbucket[tools]'\n")
        sys.exit(2)
    texts.hide_in_streams()
    app(prog_name="python -m hfbucket_plugin")


if __name__ == "__main__":
    main()
