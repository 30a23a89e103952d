"""`python -m warmer`: the command line. stdout holds one record and nothing else; everything for people is on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Mapping  # noqa: TC003 - `with_flags` and Typer evaluate the annotations
from pathlib import Path  # noqa: TC003 - as above
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hfbucket_plugin.errors import HFBucketError, ThrottledError, TransportError
from warmer import exits, run
from warmer.errors import ClusterError, Interrupted, NothingToDoError
from warmer.flags import FLAGS, Flag, flags_of, with_flags
from warmer.interrupt import StopSwitch
from warmer.plan import PlanFile
from warmer.sources import bind
from warmer.warm_file import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

# Tracebacks of Typer's show local variables, and with them a token.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Tell what would be copied, and copy nothing.", show_default=False)
]

_PLANNING = flags_of("source", "choose", "tiers", "filling", "moving", "nodes", "limits", "address")
_APPLYING = flags_of("source", "tiers", "filling", "moving", "nodes", "limits", "address", "report")
_CHECKING = tuple(
    flag
    for flag in flags_of("source", "choose", "tiers", "nodes", "limits", "address")
    if flag.name not in {"--replace-nodes", "--wait-engine"}  # nobody waits for nodes to join, nor asks engines
)


@app.callback()
def main() -> None:
    """Fill node-local LMCache tiers from a Hugging Face Bucket, on every node of a Ray cluster."""


@app.command("run")
@with_flags(FLAGS)
def run_command(*, config: Path | None, given: Mapping[Flag, Any], dry_run: _DryRun = False) -> None:
    """Copy chosen chunks into tiers of every node; what is there already is passed by.

    Exits 0 when all are there, 2 for a wrong configuration or command, 3 when some failed, 4 when there was nothing
    to do, nowhere to do it or no room for any of it, 5 when told to stop. Running again moves only what is missing.
    """

    def work(stop: StopSwitch) -> dict[str, Any]:
        wanted = warm_up(config, given)
        return _planned(run.plan(wanted, None)) if dry_run else run.run(wanted, stop)

    _end_with(work)


@app.command("plan")
@with_flags(_PLANNING)
def plan_command(
    *,
    config: Path | None,
    given: Mapping[Flag, Any],
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.", metavar="FILE", show_default=False)],
) -> None:
    """Choose chunks and write down which, for `apply`. No Ray is needed.

    Exits 0 when the plan is written, 2 for a wrong configuration or command, 3 when the Hub could not be reached, 4 when
    nothing was chosen, 5 when told to stop.
    """
    _end_with(lambda _: _planned(run.plan(warm_up(config, given), out)) | {"plan": str(out)})


@app.command("apply")
@with_flags(_APPLYING)
def apply_command(
    *,
    plan: Annotated[Path, typer.Argument(help="A plan file.", metavar="PLAN", show_default=False)],
    config: Path | None,
    given: Mapping[Flag, Any],
    dry_run: _DryRun = False,
) -> None:
    """Copy what a plan says; what is there already is passed by. Flags win over what the plan was made with.

    Exits as `run` does. Applying again moves only what is missing: that is how to go on after a stop or a crash.
    """

    def work(stop: StopSwitch) -> dict[str, Any]:
        made = PlanFile.open(plan)
        wanted = warm_up(config, given, run.planned_warm_up(made))
        if not dry_run:
            return run.apply(wanted, made, stop)
        bound = bind(wanted)
        run.expect_fitting(bound, made)
        return _planned({**made.header, **run.selected(bound, made)}) | {"plan": str(plan)}

    _end_with(work)


@app.command("check")
@with_flags(_CHECKING)
def check_command(
    *,
    plan: Annotated[
        Path | None,
        typer.Argument(
            help="A plan file; without one, chunks are chosen by the flags.", metavar="[PLAN]", show_default=False
        ),
    ] = None,
    config: Path | None,
    given: Mapping[Flag, Any],
    require: Annotated[
        float, typer.Option("--require", min=0.0, max=1.0, help="The share that every tier of every node must hold.")
    ] = 1.0,
    verify: Annotated[
        str, typer.Option("--verify", help="hash: contents are read and hashed. length: files are only looked at.")
    ] = "hash",
) -> None:
    """Tell how warm every node is: what of a choice is right, wrong or missing in each tier. Nothing is written.

    Exits 0 when every tier of every node holds the required share, 3 when one does not, 2 for a wrong configuration or
    command, 4 when there was nothing to check, 5 when told to stop.
    """
    if verify not in {"hash", "length"}:
        _end(f"--verify {verify!r} is neither hash nor length", exits.USAGE)

    def work(stop: StopSwitch) -> dict[str, Any]:
        made = PlanFile.open(plan) if plan is not None else None
        wanted = warm_up(config, given, run.planned_warm_up(made) if made is not None else None)
        return run.check(wanted, made, stop, require=require, hashes=verify == "hash")

    _end_with(work)


def _planned(header: dict[str, Any]) -> dict[str, Any]:
    return {"event": "plan", "exit_code": exits.COMPLETE, **header}


def _end_with(work: Callable[[StopSwitch], dict[str, Any]]) -> NoReturn:
    """Do the work of a command, print its record, and exit with its code."""
    logging.basicConfig(stream=sys.stderr, format="warmer: %(message)s", level=logging.WARNING)
    logging.getLogger("warmer").setLevel(logging.INFO)
    stop = StopSwitch()
    try:
        # Ray prints where it likes.
        with stop.listening(), contextlib.redirect_stdout(sys.stderr):
            record = work(stop)
    except Interrupted:
        _end("told to stop; running again moves only what is missing", exits.INTERRUPTED)
    except (HFBucketError, OSError) as error:
        _end(_advised(error), _code(error))
    typer.echo(json.dumps(record))
    raise typer.Exit(record["exit_code"])


def _code(error: Exception) -> int:
    if isinstance(error, NothingToDoError):
        return exits.REFUSED
    if isinstance(error, (TransportError, ThrottledError)):
        return exits.FAILED
    return exits.USAGE


def _advised(error: Exception) -> str:
    """The error's words, and the setting to look at where they do not name it."""
    if isinstance(error, TransportError) and not isinstance(error, ClusterError):
        return f"{error}; if it stays so, look at the instance's endpoint, or HF_ENDPOINT"
    return str(error)


def _note(line: str) -> None:
    typer.echo(f"warmer: {line}", err=True)


def _end(message: str, code: int) -> NoReturn:
    _note(message)
    raise typer.Exit(code)
