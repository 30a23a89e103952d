"""One export: plan → apply → report. It adds chunks, replaces them only if requested, and never deletes."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.errors import ConfigError, Interrupted, RefusedError, ThrottledError, TransportError
from hfbucket_plugin.hub.connect import REQUEST_SECS
from hfbucket_plugin.index.notifier import notifying
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.plan_file import plan_dir, remove_if_temporary
from jobs.batch.apply import Applier, Executor, InProcess
from jobs.batch.model import ItemOutcome
from jobs.export.bucket import InstanceEnd
from jobs.export.copy import TIMES_IN_MEMORY, Copier, CopyMethod, CopyOutcome, Method, find_out
from jobs.export.directory import DirectoryDestination, KnownChunks
from jobs.export.manifest import ManifestLine
from jobs.export.plan import CONFLICT, JOB, REPLACED, ExportHeader, ExportOrder, ExportPlanFile, ExportPlanWriter
from jobs.export.planning import PAGE, ExportPlanning
from jobs.export.report import NAMED_CONFLICTS, ExportSummary, conflict_record
from jobs.report import NAMED_FAILURES, OutcomeTally, ProgressLog, failure_of, verdict_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.batch.apply import ApplyResult
    from jobs.export.endpoint import DestinationEndpoint, SourceEndpoint
    from jobs.export.plan import CopyItem
    from jobs.export.planning import WantedChunks
    from jobs.export.resolve import EndpointSpec
    from jobs.report import ReportFile

ATTEMPT_SECS: Final = 600.0
"""Maximum duration of a try in seconds: a window of bytes between two continents takes minutes."""

_LOOK_UP_SECS: Final = 330.0
"""Timeout of a look-up in seconds: longer than the longest pause that the Hub requests."""


class Export:
    """Export from one endpoint to another.

    Args:
        endpoints: Source and destination.
        order: Settings of the export.
        file: Report file, with a line for every chunk.
        stop: Signal that requests a stop.

    Attributes:
        error: Error that ended the job, if any.
    """

    def __init__(
        self, endpoints: tuple[EndpointSpec, EndpointSpec], order: ExportOrder, file: ReportFile, stop: ShutdownSignal
    ) -> None:
        self._endpoints = endpoints
        self._order = order
        self._file = file
        self._stop = stop
        self._started = time.monotonic()
        self._until = order.until
        self._plan: ExportPlanFile | None = None
        self._applied = False
        self._method: Method | None = None
        self._conflicts: list[dict[str, Any]] = []
        self._in_manifest: int | None = None
        self._tally = OutcomeTally(file)
        self._message = ""
        self.error: Exception | None = None

    def select(self, wanted: WantedChunks, asked: dict[str, Any]) -> ExportSummary:
        """Plan the export of chunks, and apply the plan unless it needs a confirmation that was not given.

        Args:
            wanted: Selection of the chunks.
            asked: The same selection as the plan records it.
        """
        return self._reported(lambda source, destination: self._select(source, destination, wanted, asked))

    def resume(self, plan: ExportPlanFile) -> ExportSummary:
        """Apply an existing plan."""
        return self._reported(lambda source, destination: self._resume(source, destination, plan))

    def _reported(self, work: Callable[[SourceEndpoint, DestinationEndpoint], int]) -> ExportSummary:
        """Run the work, and report its end, also after an error."""
        try:
            with patience(self._until), contextlib.ExitStack() as stack:
                source = self._endpoints[0].source(believe_files=self._order.believe_files)
                stack.callback(source.close)
                destination = self._endpoints[1].destination()
                stack.callback(destination.close)
                code = work(source, destination)
        except (Interrupted, Exception) as error:  # noqa: BLE001 - the summary reports the error
            self.error = error if isinstance(error, Exception) else None
            code, message = failure_of(error, self._stop, self._until)
            self._message = message or self._message
        summary = self._summary(code)
        self._file.write(summary.record())
        if code == exit_codes.COMPLETE and self._applied and self._plan is not None and not summary.conflicts:
            remove_if_temporary(self._plan.path)
        return summary

    def _summary(self, code: int) -> ExportSummary:
        return ExportSummary(
            self._endpoints[0].place,
            self._endpoints[1].place,
            code,
            self._applied,
            self._message,
            self._plan,
            self._method,
            dict(self._tally.ended),
            tuple(self._tally.failures),
            tuple(self._conflicts),
            self._in_manifest,
            time.monotonic() - self._started,
        )

    def _select(
        self, source: SourceEndpoint, destination: DestinationEndpoint, wanted: WantedChunks, asked: dict[str, Any]
    ) -> int:
        if wanted.selection.since is not None and isinstance(source, InstanceEnd):
            # The Hub's clock stamps the chunks, so `--since` counts back from the Hub's time.
            wanted = replace(wanted, now=source.bucket.time(Deadline.after(REQUEST_SECS)) or wanted.now)
        self._plan = plan = self._make(source, destination, wanted, asked)
        return self._carry_out(source, destination, plan)

    def _make(
        self, source: SourceEndpoint, destination: DestinationEndpoint, wanted: WantedChunks, asked: dict[str, Any]
    ) -> ExportPlanFile:
        order = self._order
        header = ExportHeader(
            self._endpoints[0].place,
            self._endpoints[1].place,
            datetime.now(UTC),
            order.mode,
            order.renames,
            order.believe_files,
            order.config,
            asked,
        )
        self._file.write(header.record() | {"record": "report"})
        name = f"{JOB}-{header.made_at:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        path = plan_dir(order.plan_dir) / name

        def each() -> None:
            if self._until.passed:
                raise RefusedError("--max-duration was over before all was listed: nothing is copied. Raise it")

        with ExportPlanWriter(path, header) as writer, tempfile.TemporaryDirectory(prefix="export-") as temp_dir:
            planning = ExportPlanning(
                header, source, destination, on_conflict=order.on_conflict, writer=writer, tick=each
            )
            planning.run(wanted, Path(temp_dir, "order"))
        return ExportPlanFile.open(path)

    def _resume(self, source: SourceEndpoint, destination: DestinationEndpoint, plan: ExportPlanFile) -> int:
        self._plan = plan
        for one, end in zip((plan.header.source, plan.header.destination), self._endpoints, strict=True):
            if one.instance != end.place.instance or not one.same_as(end.place):
                raise ConfigError(
                    f"plan {str(plan.path)!r} is for {one.where}, and {one.name!r} is {end.place.where} now"
                )
        self._file.write(plan.header.record() | {"record": "report"})
        return self._carry_out(source, destination, plan)

    def _carry_out(self, source: SourceEndpoint, destination: DestinationEndpoint, plan: ExportPlanFile) -> int:
        if CONFLICT in plan.left:
            self._name_conflicts(plan)
        if not self._ordered(plan):
            return exit_codes.COMPLETE
        self._applied = True
        destination.begin()
        with KnownChunks() as known, self._stop.orderly():
            code = self._apply(source, destination, plan, known) if plan.items_left.objects else exit_codes.COMPLETE
            if isinstance(destination, DirectoryDestination) and not self._summary(code).unfinished.objects:
                self._in_manifest = destination.finish(known)
                if known.damaged:
                    code = self._name_damaged(known.damaged) or code
        return code

    def _name_damaged(self, names: list[str]) -> int:
        """Report files that differ from the manifest of the directory: its backup of these chunks is lost."""
        message = "it is not what the manifest says: take it away, or export with --on-conflict overwrite"
        self._tally.failures += [{"path": name, "message": message} for name in names[:NAMED_FAILURES]]
        damage = f"{len(names)} files of the directory are damaged, such as {names[0]!r}: an import will refuse them"
        self._message = f"{self._message}; {damage}" if self._message else damage
        return exit_codes.FAILED

    def _name_conflicts(self, plan: ExportPlanFile) -> None:
        for copy_item in plan.copy_items(CONFLICT):
            record = {
                "record": "object",
                "path": copy_item.path,
                "size": copy_item.size,
                "reason": CONFLICT,
                "outcome": CONFLICT,
            }
            self._file.write(record | conflict_record(copy_item))
            if len(self._conflicts) < NAMED_CONFLICTS:
                self._conflicts.append(conflict_record(copy_item))

    def _ordered(self, plan: ExportPlanFile) -> bool:
        """Return whether to apply a plan: only replacements need a confirmation."""
        if self._order.dry_run:
            return False
        if self._order.yes or not plan.left.get(REPLACED):
            return True
        return self._order.ask is not None and self._order.ask(plan)

    def _apply(
        self, source: SourceEndpoint, destination: DestinationEndpoint, plan: ExportPlanFile, known: KnownChunks
    ) -> int:
        progress = ProgressLog(plan.items_left, self._endpoints[1].place.name)

        def on_end(ended: ItemOutcome[CopyItem]) -> None:
            if not self._order.quiet:
                progress.add(ended.item.size)
            if notifier is not None and ended.outcome in (CopyOutcome.COPIED, CopyOutcome.STREAMED):
                notifier.did(encode_name(ended.item.to), ended.item.content)
            if ended.outcome in (CopyOutcome.STREAMED, CopyOutcome.SAME):
                copy_item = ended.item
                known.add(ManifestLine(copy_item.to, copy_item.content, copy_item.uploaded_at))
            self._tally.add(ended)

        with notifying(destination.bucket if isinstance(destination, InstanceEnd) else None) as notifier:
            copy_items = self._fresh(destination, plan, on_end)
            self._method, copy_items = self._find_out(source, destination, plan, copy_items, on_end)
            return self._run_copies((source, destination), plan, copy_items, self._method, on_end)

    def _run_copies(
        self,
        endpoints: tuple[SourceEndpoint, DestinationEndpoint],
        plan: ExportPlanFile,
        copy_items: Iterator[CopyItem],
        method: Method,
        on_end: Callable[[ItemOutcome[CopyItem]], None],
    ) -> int:
        window = max(1, self._order.window_bytes // (TIMES_IN_MEMORY * self._order.parallel))
        streams = method.how is CopyMethod.STREAM
        copier = Copier(*endpoints, method.how, window, self._order.window_bytes)
        with contextlib.closing(self._executor(copier)) as executor:
            if not self._order.local:
                self._stop.take_back()  # `ray.init` installs its own signal handlers
            applier = Applier(
                executor,
                confirm=lambda: ATTEMPT_SECS,
                not_after=plan.header.made_at,
                on_end=on_end,
                stop=self._stop,
                until=self._until,
                batch_size=PAGE,
                batch_bytes=window if streams else None,
                attempt_secs=ATTEMPT_SECS,
            )
            return self._judge(applier.run(copy_items))

    def _executor(self, copier: Copier) -> Executor[CopyItem]:
        """Return the executor of copies: this process, or actors of the configured Ray cluster.

        The Hub's own copies are requests from this process even with a cluster, and a directory is local to this
        machine.

        Raises:
            HFBucketError: If the Ray cluster cannot be joined, or its actors lack the tokens.
        """
        order, source, destination = self._order, self._endpoints[0].named, self._endpoints[1].named
        if copier.how is CopyMethod.STREAM and not order.local and source is not None and destination is not None:
            from jobs.export.ray import CopyActors  # noqa: PLC0415 - Ray takes a second to import

            bounds = (copier.window_bytes, copier.memory_bytes)
            return CopyActors((source, destination), bounds, order.parallel, order.address)
        return InProcess(
            "jobs-export", order.parallel, lambda batch, _, deadline: copier.attempt(batch, deadline.remaining())
        )

    def _fresh(
        self, destination: DestinationEndpoint, plan: ExportPlanFile, on_end: Callable[[ItemOutcome[CopyItem]], None]
    ) -> Iterator[CopyItem]:
        """Yield the copies still to make; record those already present as ended, so that a plan can resume.

        A failed look-up has no effect: every batch is looked up again before anything is named.
        """
        copy_items = plan.copy_items()
        while page := list(itertools.islice(copy_items, PAGE)):
            try:
                held = destination.look_up([copy_item.to for copy_item in page], Deadline.patient(_LOOK_UP_SECS))
            except (ThrottledError, TransportError):
                held = {}
            for copy_item in page:
                there = held.get(copy_item.to)
                if there is not None and there.content == copy_item.content:
                    on_end(ItemOutcome(copy_item, CopyOutcome.SAME))
                else:
                    yield copy_item

    def _find_out(
        self,
        source: SourceEndpoint,
        destination: DestinationEndpoint,
        plan: ExportPlanFile,
        copy_items: Iterator[CopyItem],
        on_end: Callable[[ItemOutcome[CopyItem]], None],
    ) -> tuple[Method, Iterator[CopyItem]]:
        """Return the copy method, and the copies left to make after its determination.

        Raises:
            RefusedError: If the Hub does not copy, and streaming is not permitted.
        """
        mode = plan.header.mode
        if not isinstance(source, InstanceEnd) or not isinstance(destination, InstanceEnd):
            if mode == "copy":
                raise RefusedError("--mode copy: the Hub copies between buckets only. Give --mode stream, or auto")
            return Method(CopyMethod.STREAM, "one of the two endpoints is a directory"), copy_items
        if mode == "stream":
            return Method(CopyMethod.STREAM, "that was asked for"), copy_items
        looked_at: list[CopyItem] = []

        def noted() -> Iterator[CopyItem]:
            for copy_item in copy_items:
                looked_at.append(copy_item)
                yield copy_item

        method = find_out(source, destination, noted(), _LOOK_UP_SECS)
        if mode == "copy":
            if method.how is CopyMethod.STREAM and method.asked:
                raise RefusedError(f"--mode copy: {method.why}. Nothing was copied; give --mode auto or stream")
            method = Method(CopyMethod.COPY, "that was asked for", method.moved)
        if method.moved is not None:
            on_end(ItemOutcome(method.moved, CopyOutcome.COPIED))
        return method, itertools.chain(
            (copy_item for copy_item in looked_at if copy_item is not method.moved), copy_items
        )

    def _judge(self, end: ApplyResult) -> int:
        unfinished = self._summary(exit_codes.COMPLETE).unfinished.objects
        code, message = verdict_of(end, unfinished, "chunks", failures=bool(self._tally.failures))
        self._message = message or self._message
        return code
