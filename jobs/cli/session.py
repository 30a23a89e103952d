"""Life cycle of a command: consecutive jobs, signals, summaries, metrics, exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.files import expect_apart
from hfbucket_plugin.errors import (
    Interrupted,
)
from hfbucket_plugin.tools import console, exit_codes
from hfbucket_plugin.tools.signals import ShutdownSignal
from jobs.report import JobSummary, ReportFile, as_text, exit_code_of, note, write_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from jobs.options import DeletionOptions, ExportOptions, Outputs


T = TypeVar("T")

Work = Callable[[ReportFile, ShutdownSignal], JobSummary | None]
"""Runs one job. Returns None if the job is skipped because of how the one before ended."""

Works = list[tuple[str, Work]]
"""Consecutive jobs of a command, each with its name."""


@dataclass
class CommandSession:
    """One command.

    Attributes:
        outputs: Files to write.
        inputs: Files that the command reads, beyond those of its options, with their option names.
        summaries: Summaries of the jobs so far.
        broken: Exit codes of the jobs without a summary.
    """

    outputs: Outputs
    inputs: Sequence[tuple[str, Path | None]] = ()
    summaries: list[JobSummary] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def run(self, works: Sequence[tuple[str, Work]]) -> NoReturn:
        """Run the jobs, also after failed ones, and end the command. A job that returns None is skipped.

        Args:
            works: Name and function of each job.
        """
        texts.log_to_stderr("jobs")
        stop = ShutdownSignal()
        waiting = list(works)
        file = None
        try:
            outputs = [("--report", self.outputs.report), ("--metrics-textfile", self.outputs.metrics_textfile)]
            expect_apart(outputs, [*self.inputs, *self.outputs.inputs()])
            file = ReportFile(self.outputs.report)
            # Ray prints to stdout.
            with stop.listening(), contextlib.redirect_stdout(sys.stderr):
                while waiting and not stop.requested:
                    name, work = waiting[0]
                    summary = self._done(name, work, file, stop)
                    del waiting[0]
                    if summary is not None:
                        self._add(summary)
            file.close()
            if self.outputs.metrics_textfile is not None:
                write_metrics(self.outputs.metrics_textfile, self.summaries, time.time(), _code_of_file(file))
        except Interrupted:
            end(_stop_requested(waiting), exit_codes.INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - a command ends with a documented code, and never with a traceback
            end(as_text(error), exit_codes.worst([exit_code_of(error), *self._codes]))
        finally:
            if file is not None:
                file.close()
            for summary in self.summaries:
                sys.stdout.write(texts.as_json(_reported(summary, file)) + "\n")
            sys.stdout.flush()
        if file.problem:
            note(file.problem)
        if waiting:
            end(_stop_requested(waiting), exit_codes.INTERRUPTED)
        raise typer.Exit(exit_codes.worst([*self._codes, _code_of_file(file)]))

    @property
    def _codes(self) -> list[int]:
        return [*(one.code for one in self.summaries), *self.broken]

    def _done(self, name: str, work: Work, file: ReportFile, stop: ShutdownSignal) -> JobSummary | None:
        """Run a job. If it ends without a summary, log its error, and let the other jobs run."""
        try:
            return work(file, stop)
        except (Interrupted, typer.Exit):
            raise
        except Exception as error:  # noqa: BLE001 - a failed job does not stop the others
            self.broken.append(exit_code_of(error))
            note(f"{name}: {as_text(error)}")
            return None

    def _add(self, summary: JobSummary) -> None:
        self.summaries.append(summary)
        for line in summary.lines():
            note(f"{summary.instance}: {line}")


def _code_of_file(file: ReportFile) -> int:
    """Return the exit code that an incomplete report implies."""
    return exit_codes.FAILED if file.problem else exit_codes.COMPLETE


def _reported(summary: JobSummary, file: ReportFile | None) -> dict[str, Any]:
    """Return a summary for JSON, adjusted to the exit code: a job with an incomplete report is not a success."""
    record = summary.record()
    if file is None or not file.problem:
        return record
    code = exit_codes.worst([summary.code, _code_of_file(file)])
    message = "; ".join(filter(None, (record["message"], file.problem)))
    return record | {"result": exit_codes.RESULTS[code], "exit_code": code, "message": message}


def _stop_requested(waiting: Sequence[tuple[str, Work]]) -> str:
    names = ", ".join(name for name, _ in waiting)
    return "told to stop" + (f"; not done: {names}" if names else "")


# Newer versions of Typer vendor click, under names that are not public.
_CLICK_ERROR: type[Exception] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")
_ENDS = (typer.Exit, typer.Abort, _CLICK_ERROR)
"""Exceptions that end a command in an orderly way."""


@contextlib.contextmanager
def options_checked() -> Iterator[None]:
    """End the command if its options are invalid, or a file that they name cannot be read."""
    try:
        yield
    except _ENDS:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        end(as_text(error), exit_code_of(error))


class Commands(TyperGroup):
    """Group of commands that end with documented exit codes, never with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and turn any error into an exit code."""
        try:
            return super().invoke(ctx)
        except _ENDS:
            raise
        except (
            BrokenPipeError
        ):  # the reader of the output has gone, as with `head`; Python flushes stdout again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(exit_codes.FAILED) from None
        except Interrupted:
            end("told to stop", exit_codes.INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - as above
            end(as_text(error), exit_code_of(error))


def end(message: str, code: int) -> NoReturn:
    """Print a message, and end the command with an exit code."""
    note(message)
    raise typer.Exit(code)


def asker(ask: Callable[[T], bool], request: DeletionOptions | ExportOptions) -> Callable[[T], bool] | None:
    """Return the function that asks whether to apply a plan; None without a terminal, or if only a plan is wanted."""
    return ask if console.at_terminal() and not request.dry_run else None
