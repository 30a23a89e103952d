"""Commands of `python -m hfbucket_plugin`. All are read-only except `doctor --probe-write`, which cleans up."""

from __future__ import annotations

import typer

from hfbucket_plugin.cli.doctor import doctor
from hfbucket_plugin.cli.ls import ls
from hfbucket_plugin.cli.stat import stat

# Typer's own tracebacks show local variables, and with them a token.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """Look at LMCache's bucket instances, named by the configuration that the engines use."""


app.command("doctor")(doctor)
app.command("ls")(ls)
app.command("stat")(stat)
