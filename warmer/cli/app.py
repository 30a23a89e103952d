"""Command line of `python -m warmer`. stdout gets exactly one record; messages go to stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hfbucket_plugin.core import texts
from hfbucket_plugin.errors import (
    HFBucketError,
    Interrupted,
    RefusedError,
    TempDirError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.options import Flag, number, with_flags
from hfbucket_plugin.tools.signals import ShutdownSignal
from warmer import run
from warmer.check.canary import DEFAULT_REQUIRE, Canary
from warmer.cluster.job_env import dashboard_address, refuse_secrets_in, runtime_env
from warmer.cluster.submit import Submission, expect_command, submit
from warmer.plan.plan_file import WarmPlanFile
from warmer.report.html import PageFile
from warmer.report.outcomes import ClusterError, PlanLostError, local_trouble
from warmer.request.model import FLAGS
from warmer.request.resolve import resolve_request
from warmer.request.warm_file import load_request

if TYPE_CHECKING:
    from collections.abc import Callable


# Typer's own tracebacks would show local variables, which may hold a token.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Report what would be copied, and copy nothing.", show_default=False)
]

_Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A warm.yaml with these options; flags override it.", metavar="FILE", show_default=False
    ),
]

_RUNNING = {"report", "report_html"}
_PLANNING = [flag for flag in FLAGS if flag.place[0] not in _RUNNING]
_APPLYING = [flag for flag in FLAGS if flag.place[0] != "choose"]
# Flags that do not apply to a check, which waits for no node to join, loads no engine, and copies nothing, are left out.
_CHECKING = [
    flag
    for flag in FLAGS
    if flag.place[0] not in {"filling", "moving", "report"} and flag.name not in {"--replace-nodes", "--wait-engine"}
]


@app.callback()
def main() -> None:
    """Fill node-local LMCache tiers from a Hugging Face Bucket, on every node of a Ray cluster."""


@app.command("run")
@with_flags(FLAGS)
def run_command(*, config: _Config = None, given: Mapping[Flag, Any], dry_run: _DryRun = False) -> None:
    """Copy chosen chunks into tiers of every node; what is there already is skipped.

    Exits 0 when all are there, 2 for a wrong configuration or command, 3 when some failed, 4 when there was nothing
    to do, nowhere to do it or no room for any of it, 5 when told to stop. Running again moves only what is missing.
    """
    page = PageFile()

    def work(stop: ShutdownSignal) -> dict[str, Any]:
        wanted = load_request(config, given)
        run.expect_distinct_files(wanted, ("--config", config))
        return _planned(run.plan(wanted, None)) if dry_run else run.run(wanted, stop, *page.open(wanted.report_html))

    _end_with(work, page)


@app.command("plan")
@with_flags(_PLANNING)
def plan_command(
    *,
    config: _Config = None,
    given: Mapping[Flag, Any],
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.", metavar="FILE", show_default=False)],
) -> None:
    """Choose chunks and write down which, for `apply`. No Ray is needed.

    Exits 0 when the plan is written, 2 for a wrong configuration or command, 3 when the Hub could not be reached, 4 when
    nothing was chosen, 5 when told to stop.
    """

    def work(_: ShutdownSignal) -> dict[str, Any]:
        wanted = load_request(config, given)
        run.expect_distinct_files(wanted, ("--config", config), out=out)
        return _planned(run.plan(wanted, out)) | {"plan": str(out)}

    _end_with(work)


@app.command("apply")
@with_flags(_APPLYING)
def apply_command(
    *,
    plan: Annotated[Path, typer.Argument(help="A plan file.", metavar="PLAN", show_default=False)],
    config: _Config = None,
    given: Mapping[Flag, Any],
    dry_run: _DryRun = False,
) -> None:
    """Copy what a plan says; what is there already is skipped. Flags win over what the plan was made with.

    Exits as `run` does. Applying again moves only what is missing: that is how to go on after a stop or a crash.
    """
    page = PageFile()

    def work(stop: ShutdownSignal) -> dict[str, Any]:
        made = WarmPlanFile.open(plan, ours=not dry_run)
        wanted = load_request(config, given, run.planned_request(made))
        run.expect_distinct_files(wanted, ("--config", config), ("plan", plan))
        if not dry_run:
            return run.apply(wanted, made, stop, *page.open(wanted.report_html))
        resolved = resolve_request(wanted)
        run.expect_fitting(resolved, made)
        return _planned({**made.header, **run.selected(resolved, made)}) | {"plan": str(plan)}

    _end_with(work, page)


@app.command("check")
@with_flags(_CHECKING)
def check_command(
    *,
    plan: Annotated[
        Path | None,
        typer.Argument(
            help="A plan file; without one, the options select chunks.", metavar="[PLAN]", show_default=False
        ),
    ] = None,
    config: _Config = None,
    given: Mapping[Flag, Any],
    require: Annotated[
        float,
        typer.Option(
            "--require",
            min=0.0,
            max=1.0,
            callback=number,
            help="Share of the chunks that every tier of every node must hold.",
        ),
    ] = 1.0,
    verify: Annotated[
        str, typer.Option("--verify", help="hash: read and hash contents. length: only compare file sizes.")
    ] = "hash",
    canary: Annotated[
        Path | None,
        typer.Option(
            "--canary",
            help="Also send these prompts (in the form of --prompts) to engines, which must report that they came from the cache.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="A vLLM to ask, http://HOST:PORT; with {node_name}, {node_id} or {label:NAME}, one for each node. Repeatable.",
            metavar="URL",
            show_default=False,
        ),
    ] = None,
    canary_require: Annotated[
        float,
        typer.Option(
            "--canary-require",
            min=0.0,
            max=1.0,
            callback=number,
            help="Share of each prompt's full chunks that must be cached.",
        ),
    ] = DEFAULT_REQUIRE,
    engine_key_env: Annotated[
        str | None,
        typer.Option(
            "--engine-key-env",
            help="Environment variable with the engines' API key.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tell how warm every node is: what of a choice is right, wrong or missing in each tier. Nothing is written.

    Exits 0 when every tier of every node holds the required share, 3 when one does not or an engine computed too much, 2 for
    a wrong configuration or command, 4 when there was nothing to check, 5 when told to stop.
    """
    if verify not in {"hash", "length"}:
        _end(f"--verify {verify!r} is neither hash nor length", exit_codes.USAGE)
    page = PageFile()

    def work(stop: ShutdownSignal) -> dict[str, Any]:
        made = WarmPlanFile.open(plan, ours=True) if plan is not None else None
        wanted = load_request(config, given, run.planned_request(made) if made is not None else None)
        run.expect_distinct_files(wanted, ("--config", config), ("plan", plan), ("--canary", canary))
        page.open(wanted.report_html)
        asked = Canary.read(canary, engine or [], canary_require, engine_key_env)
        return run.check(wanted, made, stop, require=require, hashes=verify == "hash", canary=asked)

    _end_with(work, page)


@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit_command(
    *,
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(help="After `--`: run, plan, apply or check, with its options.", show_default=False)
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="The Ray dashboard, http://HOST:PORT. Default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.",
            metavar="URL",
        ),
    ] = None,
    submission_id: Annotated[
        str | None,
        typer.Option(
            "--submission-id", help="Name of the job; a name that was submitted before is refused.", metavar="ID"
        ),
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option("--working-dir", help="Directory to upload; the job runs in it.", metavar="DIR")
    ] = None,
    runtime_env_file: Annotated[
        Path | None,
        typer.Option(
            "--runtime-env", help="The job's runtime environment, in YAML. Tokens are refused.", metavar="FILE"
        ),
    ] = None,
    runtime_env_json: Annotated[
        str | None, typer.Option("--runtime-env-json", help="The same as JSON. Tokens are refused.", metavar="JSON")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit the job without following it.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the job running on SIGTERM or SIGINT.")] = False,
) -> None:
    """Run a command as a Ray job: passes its log on, and exits with the code that it ended with.

    Told to stop, it stops the job. Exits as the command does; 2 when the cluster does not answer or refuses the job, 3 when
    the job was killed or the cluster lost, 4 when a job of this name was submitted before, 5 when the job was stopped.
    """
    expect_command(context, command)

    def work(_: ShutdownSignal) -> dict[str, Any]:
        # Ray is imported late: it takes a second, for which a refused command should not wait.
        environment = runtime_env(runtime_env_file, runtime_env_json, working_dir)
        where = dashboard_address(address)
        refuse_secrets_in(command, submission_id)
        from warmer.cluster.jobs_api import JobsAPI  # noqa: PLC0415

        names = {} if submission_id is None else {"submission_id": submission_id}
        wanted = Submission(command, environment, wait=not no_wait, detach=detach, **names)
        return submit(JobsAPI(where), wanted, sys.stderr)

    _end_with(work)


def _planned(header: dict[str, Any]) -> dict[str, Any]:
    return {"event": "plan", "exit_code": exit_codes.COMPLETE, **header}


def _end_with(work: Callable[[ShutdownSignal], dict[str, Any]], page: PageFile | None = None) -> NoReturn:
    """Execute a command, print its record, write its page, and exit with its code."""
    texts.log_to_stderr("warmer")
    logging.getLogger("warmer").setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hides warnings about caches that it builds
    stop = ShutdownSignal()
    try:
        # Ray prints to stdout, which is reserved for the record.
        with stop.listening(), contextlib.redirect_stdout(sys.stderr):
            record = work(stop)
    except Interrupted:
        _end("told to stop; running again moves only what is missing", exit_codes.INTERRUPTED)
    except typer.Exit:
        raise
    except Exception as error:  # noqa: BLE001 - a command ends with a documented code, and never with a traceback
        _end(_advised(error), _code(error))
    typer.echo(texts.as_json(record))
    if page is not None:  # after the record, which is then printed even if the command is killed here
        # A stop cannot change the result any more; a second stop skips the page.
        with contextlib.suppress(Interrupted), stop.listening(), stop.orderly():
            page.write(record)
    raise typer.Exit(record["exit_code"])


def _code(error: Exception) -> int:
    if isinstance(error, RefusedError):
        return exit_codes.REFUSED
    ours = isinstance(error, HFBucketError)
    if not ours or isinstance(error, (TransportError, ThrottledError, PlanLostError, TempDirError)):
        return exit_codes.FAILED
    return exit_codes.USAGE


def _advised(error: Exception) -> str:
    """Return the message of an error, with the setting to check if the message does not name it."""
    if isinstance(error, TransportError) and not isinstance(error, ClusterError):
        return f"{error}; if it stays so, look at the instance's endpoint, or HF_ENDPOINT"
    return local_trouble(error) or str(error)


def _note(line: str) -> None:
    typer.echo(f"warmer: {texts.shown(line)}", err=True)


def _end(message: str, code: int) -> NoReturn:
    _note(message)
    raise typer.Exit(code)
