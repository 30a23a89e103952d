"""A command from its options to its exit: several jobs one after the other, signals, summaries, metrics."""

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
"""Does one job. None if it is not to be done, because of how the one before ended."""

Works = list[tuple[str, Work]]
"""What a command does, one after the other, each with its name."""


@dataclass
class CommandSession:
    """One command.

    Attributes:
        outputs: The files to write.
        inputs: Files that the command reads beside those of its options, with their names.
        summaries: What came of the jobs so far.
        broken: Codes of those of which no summary came.
    """

    outputs: Outputs
    inputs: Sequence[tuple[str, Path | None]] = ()
    summaries: list[JobSummary] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def run(self, works: Sequence[tuple[str, Work]]) -> NoReturn:
        """Do the jobs, each whatever came of the one before unless it says None, and end the command.

        Args:
            works: What each is called, and does.
        """
        texts.log_to_stderr("jobs")
        stop = ShutdownSignal()
        waiting = list(works)
        file = None
        try:
            outputs = [("--report", self.outputs.report), ("--metrics-textfile", self.outputs.metrics_textfile)]
            expect_apart(outputs, [*self.inputs, *self.outputs.inputs()])
            file = ReportFile(self.outputs.report)
            # Ray prints where it likes.
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
        """Do a job. One that cannot even say what came of it is named, and the others are done."""
        try:
            return work(file, stop)
        except (Interrupted, typer.Exit):
            raise
        except Exception as error:  # noqa: BLE001 - each is done whatever becomes of the others
            self.broken.append(exit_code_of(error))
            note(f"{name}: {as_text(error)}")
            return None

    def _add(self, summary: JobSummary) -> None:
        self.summaries.append(summary)
        for line in summary.lines():
            note(f"{summary.instance}: {line}")


def _code_of_file(file: ReportFile) -> int:
    """What a report that is not whole means for how the command ends."""
    return exit_codes.FAILED if file.problem else exit_codes.COMPLETE


def _reported(summary: JobSummary, file: ReportFile | None) -> dict[str, Any]:
    """A summary for JSON: a job is no success whose report is not whole, and its summary agrees with the exit code."""
    record = summary.record()
    if file is None or not file.problem:
        return record
    code = exit_codes.worst([summary.code, _code_of_file(file)])
    message = "; ".join(filter(None, (record["message"], file.problem)))
    return record | {"result": exit_codes.RESULTS[code], "exit_code": code, "message": message}


def _stop_requested(waiting: Sequence[tuple[str, Work]]) -> str:
    names = ", ".join(name for name, _ in waiting)
    return "told to stop" + (f"; not done: {names}" if names else "")


# Newer Typers bring a click of their own, whose names are not public.
_CLICK_ERROR: type[Exception] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")
_ENDS = (typer.Exit, typer.Abort, _CLICK_ERROR)
"""What ends a command in good order."""


@contextlib.contextmanager
def options_checked() -> Iterator[None]:
    """End the command where its options are wrong, or what they name cannot be read."""
    try:
        yield
    except _ENDS:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        end(as_text(error), exit_code_of(error))


class Commands(TyperGroup):
    """A group of commands that end with documented codes, whatever they raise: no traceback ever."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except _ENDS:
            raise
        except (
            BrokenPipeError
        ):  # the reader of the output stopped, as `head` does; Python flushes it once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(exit_codes.FAILED) from None
        except Interrupted:
            end("told to stop", exit_codes.INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - as above
            end(as_text(error), exit_code_of(error))


def end(message: str, code: int) -> NoReturn:
    """Say why, and end the command."""
    note(message)
    raise typer.Exit(code)


def asker(ask: Callable[[T], bool], request: DeletionOptions | ExportOptions) -> Callable[[T], bool] | None:
    """Return what asks whether to carry out a plan; None if nobody is at a terminal, or only a plan is wanted."""
    return ask if console.at_terminal() and not request.dry_run else None
