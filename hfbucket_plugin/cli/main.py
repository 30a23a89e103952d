"""Command `hfbucket`: finds the installed commands, and runs the same ones as `python -m`.

Packages register their commands as entry points, so that nothing here imports the warmer or the jobs:
`hfbucket.commands` names applications that hold a command of that name, `hfbucket.groups` those whose commands follow it.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hfbucket_plugin import __version__
from hfbucket_plugin.core import texts
from hfbucket_plugin.hub import xet_home
from hfbucket_plugin.tools.signals import end_by_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = "hfbucket.commands"
GROUPS: Final = "hfbucket.groups"

_EXTRAS: Final = {"hfbucket_plugin": "tools", "warmer": "warmer", "jobs": "jobs"}
_USAGE: Final = 2
_INTERRUPTED: Final = 5
"""Exit code of the warmer and the jobs after a stop request."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names.

    Args:
        arguments: Arguments after `hfbucket`; default: those of this process.

    Raises:
        SystemExit: Always, with the command's exit code; 2 if there is no such command or it cannot be loaded.
    """
    xet_home.begin()
    texts.hide_in_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {point.name: point for point in entry_points(group=COMMANDS)}
    groups = {point.name: point for point in entry_points(group=GROUPS)}
    name = given[0] if given else "--help"
    if arguments is None:  # this process runs only the command
        end_by_signals(_INTERRUPTED if name in groups else None)
    if name in {"-h", "--help"}:
        sys.stdout.write(_help(commands, groups))
        sys.exit(0 if given else _USAGE)
    if name == "--version":
        sys.stdout.write(f"hfbucket {__version__}\n")
        sys.exit(0)
    if name in groups:
        _load(groups[name])(args=given[1:], prog_name=f"hfbucket {name}")
    elif name in commands:
        _load(commands[name])(args=given, prog_name="hfbucket")
    else:
        _end(f"there is no command {name!r}{texts.did_you_mean(name, [*commands, *groups], 0.6)}")


def _load(point: EntryPoint) -> Any:
    package = point.module.split(".")[0]
    try:
        return point.load()
    except AttributeError:  # another package has a module of the same name
        _shadowed(point, package)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == package:
            _shadowed(point, package)
        if missing in _EXTRAS:
            raise
        _end(
            f"{point.name} needs {missing}, which is not installed: pip install 'lmcache-hfbucket[{_EXTRAS[package]}]'"
        )


def _shadowed(point: EntryPoint, package: str) -> NoReturn:
    found = getattr(sys.modules.get(package), "__path__", None)
    where = f" at {next(iter(found))}" if found else ""
    _end(
        f"{point.name} needs the package {package!r} of lmcache-hfbucket, and another package of that name{where} comes before it in "
        "Python's search path: take its directory out of PYTHONPATH, or rename it"
    )


def _help(commands: dict[str, EntryPoint], groups: dict[str, EntryPoint]) -> str:
    lines = ["Usage: hfbucket COMMAND [OPTIONS]", "", "Commands; `hfbucket COMMAND --help` describes each:"]
    lines += [f"  {name}" for name in sorted(commands)]
    lines += [f"  {name} COMMAND" for name in sorted(groups)]
    return "\n".join([*lines, ""])


def _end(message: str) -> NoReturn:
    sys.stderr.write(f"hfbucket: {texts.shown(message)}\n")
    sys.exit(_USAGE)
