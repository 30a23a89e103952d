"""The commands `plan` (from a warm-up to a plan), `apply` (from a plan to filled tiers), `run` (both) and `check`.

`warm_up` is `run` for programs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.files import TempDir, expect_apart, expect_writable
from hfbucket_plugin.core.keys import BucketHandle, ClassicKey, MPKey
from hfbucket_plugin.errors import ConfigError, HFBucketError, RefusedError, TempDirError
from hfbucket_plugin.tools.selection import ADVICE
from hfbucket_plugin.tools.signals import ExternalStop
from warmer.check import gate as checks
from warmer.cluster.engine_tiers import EngineRun, checkable
from warmer.cluster.placement import NodeSlots, shares, taking_part, unassigned_chunks
from warmer.cluster.schedule_setup import TimeLimit, schedule_of, store_bytes
from warmer.node.engine_memory import LoadConfig
from warmer.node.prompts import digest_of, expect_recorded
from warmer.plan.build import WORDS, PlanBuilder
from warmer.plan.plan_file import NEVER_PLANNED, WarmPlanFile
from warmer.report.html import PageFile
from warmer.report.observers import EventDispatcher, observing
from warmer.report.outcomes import NothingToDoError, PlanLostError
from warmer.report.progress import NoDisplay, choose_display
from warmer.report.result import WarmSummary
from warmer.report.summary import FailureLog, RunReport, Share, TierRun, combined
from warmer.request import resolve
from warmer.request.resolve import recorded, resolve_request
from warmer.request.warm_file import validated
from warmer.tiers import L1Declaration, LocalCPUDeclaration

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from warmer.check.canary import Canary
    from warmer.cluster.actor import Config
    from warmer.cluster.placement import Assignment
    from warmer.report.observers import Observer
    from warmer.request.model import WarmRequest
    from warmer.request.resolve import Compared, ResolvedRequest
    from warmer.tiers import AnyTier


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyRun:
    """Run that copies the chunks of a plan.

    Attributes:
        resolved: Resolved warm-up, with source and destinations.
        plan: Plan of the chunks.
        observers: Further observers, besides a display and the metrics of the Ray cluster.
        quiet: Whether to hide progress.
    """

    resolved: ResolvedRequest
    plan: WarmPlanFile
    observers: Sequence[Observer] = ()
    quiet: bool = False

    def execute(self, failures: FailureLog, stop: ShutdownSignal) -> dict[str, Any]:
        """Copy the chunks; return the summary.

        Raises:
            ConfigError: The warm-up names a node that does not exist.
            NothingToDoError: No node takes part, or no node gets any of the chunks.
            ClusterError: The configured Ray cluster does not answer.
        """
        # Imported late because Ray takes a second to import, and a refused command should not wait for it.
        from warmer.cluster.ray import alive_nodes, joined  # noqa: PLC0415
        from warmer.report.metrics import RunMetrics  # noqa: PLC0415

        request = self.resolved.request
        with joined(request.address):
            stop.take_back()
            places = NodeSlots(taking_part(alive_nodes(), request.nodes), request.nodes)
            left_out = unassigned_chunks(self.plan, places.nodes)
            limit = TimeLimit(stop, request.limits.max_duration)
            observers = [RunMetrics(), *self.observers]
            reports: list[RunReport] = []
            for tier in self.resolved.tiers:
                # A node that replaced a lost one for one tier does so for the following tiers too.
                nodes = places.nodes
                report = RunReport(
                    self._task(tier, left_out), [one.node for one in nodes], failures, self._shares(tier, nodes)
                )
                report.cut_short = reports[-1].cut_short if reports else None
                reports.append(report)
                if not limit.requested and report.cut_short is None:
                    report.begin()
                    with observing(observers, report), stop.orderly():
                        try:
                            self._fill(tier, places, report, limit, observers)
                        except NothingToDoError:
                            raise
                        except (RefusedError, PlanLostError) as error:
                            # Chunks that were copied are in the tiers, so report them as for any run that ended early.
                            report.cut_short = error
                            _log.error("%s", error)
                    report.end()
            return combined([report.summary(stopped=limit.requested) for report in reports])

    def _shares(self, tier: AnyTier, nodes: Sequence[Assignment]) -> dict[str, Share]:
        """Return what each node should hold, as far as this is known before engines report."""
        return {} if isinstance(tier, L1Declaration) else shares(self.plan, nodes)

    def _task(self, tier: AnyTier, left_out: int) -> TierRun:
        prompts = self.resolved.prompt_file if isinstance(tier, L1Declaration) else None
        return TierRun(
            instance=self.resolved.instance.name,
            bucket=str(self.resolved.instance.settings.bucket_handle),
            tier=tier.name,
            choice=self.resolved.request.choose.model_dump(mode="json", exclude_defaults=True),
            selected=self.plan.chunks if prompts is None else prompts.chunks.total(),
            selected_bytes=self.plan.bytes if prompts is None else 0,
            skipped=dict(self.plan.header.get("skipped", {})),
            unassigned=left_out if prompts is None else 0,
        )

    def _fill(
        self, tier: AnyTier, places: NodeSlots, report: RunReport, limit: TimeLimit, observers: Sequence[Observer]
    ) -> None:
        """Fill one tier of all nodes."""
        display = NoDisplay() if self.quiet else choose_display()
        try:
            self._fill_shown(tier, places, EventDispatcher(report, display, observers), limit)
        finally:
            display.close()

    def _fill_shown(self, tier: AnyTier, places: NodeSlots, events: EventDispatcher, limit: TimeLimit) -> None:
        report = events.report
        engines = EngineRun(self.resolved, self.plan, places.nodes, events, limit)
        match tier:
            case L1Declaration():
                if self.resolved.prompt_file is not None:
                    engines.load_prompts(tier, self.resolved.prompt_file)
            case LocalCPUDeclaration():
                config, nodes = engines.search_workers(tier)
                if not nodes or limit.requested:
                    return
                report.task = replace(report.task, unassigned=unassigned_chunks(self.plan, _with_lost(places, nodes)))
                for node, share in shares(self.plan, nodes).items():
                    report.nodes[node].expect(share)
                self._copy(config, places.having(nodes), events, limit)
            case _:
                self._copy(self.resolved.node_config(tier), places, events, limit)

    def _copy(self, config: Config, places: NodeSlots, events: EventDispatcher, limit: TimeLimit) -> None:
        from warmer.cluster.driver import Driver, Replacing  # noqa: PLC0415 - as above
        from warmer.cluster.ray import alive_nodes  # noqa: PLC0415 - as above

        moving, wanted = self.resolved.request.moving, self.resolved.request.nodes
        replacing = Replacing(
            candidates=lambda: places.candidates(alive_nodes()),
            fits=places.fits,
            store_bytes=lambda node: store_bytes(moving, node),
        )
        schedule = schedule_of(moving, places.nodes, self.plan, self.resolved.bucket(), limit)
        events.report.counts = schedule.counts
        events.in_progress = lambda: schedule.in_progress
        events.take_place = places.take
        fleet = Driver(
            [one.node for one in places.nodes],
            config,
            events,
            limit,
            self._start_secs(config),
            chunk_secs=self.resolved.request.limits.chunk_timeout,
            replacing=replacing if wanted.replace else None,
            store_bytes=replacing.store_bytes,
        )
        fleet.run(schedule)

    def _start_secs(self, config: Config) -> float:
        """Return the maximum seconds until a node takes part, which include the wait of a replacement for its engine."""
        request = self.resolved.request
        waits = request.nodes.replace and isinstance(config, LoadConfig)
        return request.limits.node_timeout + (request.limits.wait_engine.total_seconds() if waits else 0.0)


def _with_lost(places: NodeSlots, there: Sequence[Assignment]) -> list[Assignment]:
    """Return nodes whose engine answered, with the workers found, and the other nodes, whose chunks will fail."""
    names = {one.node.id for one in there}
    return [*there, *(one for one in places.nodes if one.node.id not in names)]


_CLOCK_SECS = 60.0
_LISTING_SECS = 3600.0
"""Maximum seconds to choose chunks without `--max-duration`, pauses that the Hub requests included."""

_KINDS = {"classic": ClassicKey, "mp": MPKey}


def plan(request: WarmRequest, out: Path | None) -> dict[str, Any]:
    """Choose chunks, and write a plan of them.

    Args:
        request: The warm-up.
        out: Path of the plan file, which appears once it is complete; None to only report what it would contain.

    Returns:
        The header of the plan.

    Raises:
        ConfigError: The configuration is invalid, or requests something that is not supported.
        NothingToDoError: No chosen chunk fits the tiers.
        TempDirError: There is no room for the plan, or for sorting it.
        HFBucketError: The chunks could not be listed.
    """
    with _planned(resolve_request(request), out) as made:
        return made.header


@texts.hide_in_errors()
def warm_up(request: WarmRequest, *, stop: threading.Event | None = None) -> WarmSummary:
    """Copy chosen chunks into tiers of every node, as `python -m warmer run` does, and skip chunks that are present.

    Prints nothing, installs no signal handler and configures no logging. A repeated call copies only what is missing.

    Args:
        request: What to copy, to where, and how.
        stop: Set by another thread to stop in an orderly way: the summary then reports what is left.

    Returns:
        The result; see `exit_code` and `failures`.

    Raises:
        ConfigError: The configuration is invalid, or requests something that is not supported.
        NothingToDoError: No chosen chunk fits the tiers, or no node takes part.
        ClusterError: The configured Ray cluster does not answer.
        HFBucketError: The chunks could not be listed.
    """
    expect_distinct_files(request)
    page, switch = PageFile(), ExternalStop(stop)
    with switch.listening():
        record = run(request, switch, *page.open(request.report_html), quiet=True)
    page.write(record)
    return WarmSummary.from_record(texts.hidden(record))


def expect_distinct_files(request: WarmRequest, *inputs: tuple[str, Path | None], out: Path | None = None) -> None:
    """Refuse a warm-up that would write to one of the files that it reads.

    Args:
        request: Request with the files that are read, and the reports that are written.
        inputs: Further options and the files that they name for reading.
        out: Path of a plan that is written; None for none.

    Raises:
        ConfigError: Two of the files are the same.
    """
    choose = request.choose
    expect_apart(
        [("--report", request.report), ("--report-html", request.report_html), ("--out", out)],
        [
            *inputs,
            ("--lmcache-config", request.source.lmcache_config),
            ("--prompts", choose.prompts),
            *(("--keys-from", path) for path in choose.keys_from),
        ],
    )


def run(request: WarmRequest, stop: ShutdownSignal, *observers: Observer, quiet: bool = False) -> dict[str, Any]:
    """Choose chunks and copy them.

    Args:
        request: The warm-up.
        stop: Whether to stop.
        observers: Further observers.
        quiet: Whether to hide progress.

    Returns:
        The summary, including its `exit_code`.

    Raises:
        ConfigError: The configuration is invalid, or requests something that is not supported.
        NothingToDoError: No chosen chunk fits the tiers, or no node takes part.
        ClusterError: The configured Ray cluster does not answer.
        HFBucketError: The chunks could not be listed.
        Interrupted: A stop was requested before copying began.
    """
    resolved = resolve_request(request)
    with _reported(resolved) as failures, _planned(resolved, None) as made:
        return _executed(resolved, made, failures, stop, observers, quiet=quiet)


def apply(request: WarmRequest, made: WarmPlanFile, stop: ShutdownSignal, *observers: Observer) -> dict[str, Any]:
    """Copy the chunks of a plan, and skip those that are present.

    Args:
        request: Request of the plan; see `planned_request`.
        made: The plan.
        stop: Whether to stop.
        observers: Further observers.

    Returns:
        The summary, including its `exit_code`.

    Raises:
        ConfigError: The configuration is invalid, or does not match the plan.
        NothingToDoError: The plan is empty, or no node takes part.
        RefusedError: The plan names more chunks than were planned.
        ClusterError: The configured Ray cluster does not answer.
        Interrupted: A stop was requested before copying began.
    """
    resolved = resolve_request(request)
    expect_fitting(resolved, made)
    with _reported(resolved) as failures:
        return _executed(resolved, made, failures, stop, observers)


def _executed(
    resolved: ResolvedRequest,
    made: WarmPlanFile,
    failures: FailureLog,
    stop: ShutdownSignal,
    observers: Sequence[Observer],
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    summary = CopyRun(resolved, made, observers, quiet=quiet).execute(failures, stop)
    failures.close(summary)
    return summary


def check(
    request: WarmRequest,
    made: WarmPlanFile | None,
    stop: ShutdownSignal,
    *,
    require: float,
    hashes: bool,
    canary: Canary | None = None,
) -> dict[str, Any]:
    """Check how warm every node is.

    Args:
        request: Request of the plan, or for a new choice of chunks.
        made: The plan; None to choose chunks now.
        stop: Whether to stop.
        require: Share of right chunks that each tier of each node must have.
        hashes: Whether to hash contents.
        canary: Canary for the engines; None for none. Its chunk size is replaced by that of the engines' configuration.

    Returns:
        The report, including its `exit_code`.

    Raises:
        ConfigError: The configuration is invalid, or does not match the plan.
        NothingToDoError: There are no chunks to check, or no node takes part.
        ClusterError: The configured Ray cluster does not answer.
        HFBucketError: The chunks could not be listed.
        Interrupted: A stop was requested before the check began.
    """
    resolved = resolve_request(request)
    checkable(resolved.tiers)
    canary = None if canary is None else replace(canary, chunk_tokens=resolved.chunk_tokens())
    if made is not None:
        expect_fitting(resolved, made)
        compared: dict[str, Any] = {"with": "plan", "at": made.header.get("made"), "plan": str(made.path)}
        return checks.check(resolved, made, stop, require=require, hashes=hashes, compared_with=compared, canary=canary)
    with _planned(resolved, None) as chosen:
        compared = {"with": "bucket", "at": chosen.header.get("made"), "plan": None}
        return checks.check(
            resolved, chosen, stop, require=require, hashes=hashes, compared_with=compared, canary=canary
        )


def planned_request(made: WarmPlanFile) -> dict[str, Any]:
    """Return the request from which a plan was made, for `warmer.request.warm_file`; empty for a plan without a header.

    Raises:
        ConfigError: The header cannot be read.
        RefusedError: The header contains a token, which no plan does.
    """
    document = made.header.get("warm_up", {})
    request = validated(document, str(made.path))
    if recorded(request) != request:
        raise RefusedError(f"plan {str(made.path)!r} holds a token, which no plan does: make a new plan")
    return dict(document)


def expect_fitting(resolved: ResolvedRequest, made: WarmPlanFile) -> None:
    """Check that a plan matches the bucket and the kind of tier in the present configuration.

    Raises:
        ConfigError: The plan does not match.
        NothingToDoError: The plan is empty.
        RefusedError: The plan names more chunks than were planned.
    """
    if made.chunks > made.header.get("selected", made.chunks):
        raise RefusedError(
            f"plan {str(made.path)!r} names {made.chunks} chunks, and {made.header['selected']} were planned: make a new plan"
        )
    if not made.chunks and resolved.lists:
        raise NothingToDoError(f"plan {str(made.path)!r} holds no chunk")
    if resolved.prompt_file is not None:
        expect_recorded(resolved.prompt_file, made.header.get("prompts_file"), made.path)
    bucket, kind = resolved.instance.settings.bucket_handle, made.header.get("takes")
    if BucketHandle.parse(str(made.header.get("bucket", bucket))) != bucket:
        raise ConfigError(
            f"plan {str(made.path)!r} is of {made.header['bucket']}, and instance {resolved.instance.name!r} is {bucket}: "
            "make a new plan"
        )
    home = resolved.instance.settings.bucket_handle.join("")
    if made.home not in (None, home):
        raise ConfigError(
            f"plan {str(made.path)!r} names objects below {made.home!r}, and those of instance {resolved.instance.name!r} are below "
            f"{home!r}: make a new plan"
        )
    if kind in _KINDS and _KINDS[kind] is not resolved.takes:
        raise ConfigError(
            f"plan {str(made.path)!r} holds {WORDS[_KINDS[kind]]}, and tier {resolved.tiers[0].name!r} takes "
            f"{WORDS[resolved.takes]}"
        )


@contextlib.contextmanager
def _planned(resolved: ResolvedRequest, out: Path | None) -> Iterator[WarmPlanFile]:
    """Provide a plan in a file: `out`, or a temporary file that is removed at the end of the block."""
    if not resolved.request.choose.given:
        raise ConfigError(ADVICE)
    place = None if out is None else _place_of(out)
    prompts = resolved.prompts() if resolved.lists else None
    bucket = resolved.bucket()
    until = Deadline.after(resolved.request.limits.max_duration or _LISTING_SECS)
    # If engines load from their own tiers, nothing is requested from the Hub.
    with patience(until):
        choosing = PlanBuilder(resolved.request.choose, resolved.takes, _now(resolved, bucket), prompts)
        compared = resolve.compare(resolved, choosing, bucket) if resolved.lists else resolve.Compared()
    temp_dir = TempDir(resolved.instance.settings.download_tmp_dir)
    try:
        with temp_dir.file() as sorting, temp_dir.file() as path:
            with patience(until):
                recorded = _prompts_recorded(resolved)
                try:
                    chunks = choosing.planned(bucket, sorting) if resolved.lists else iter(())
                    made = WarmPlanFile.write(
                        path, chunks, lambda whole: _header(resolved, choosing, compared, whole) | recorded
                    )
                except OSError as error:
                    if isinstance(error, HFBucketError):
                        raise
                    raise TempDirError(
                        f"the plan cannot be written below download_tmp_dir, {str(path.parent)!r}: {error.strerror or error}; make "
                        "room there, or name another directory"
                    ) from None
                if resolved.lists:
                    _expect_some(resolved, choosing, made, bucket)
                else:
                    _expect_prompts(resolved)
            if place is not None:
                _put_out(path, place)
            yield made
    finally:
        temp_dir.close()


def _now(resolved: ResolvedRequest, bucket: Bucket) -> datetime:
    """Return the time from which `since` counts back: the Hub's, which dates chunks, or local time if nothing depends on it."""
    ours = datetime.now(UTC)
    if resolved.request.choose.since is None or not resolved.lists:
        return ours
    theirs = bucket.time(Deadline.after(_CLOCK_SECS))
    if theirs is None:
        _log.warning("--since goes by the clock of this machine: the Hub does not say what time it is")
    return ours if theirs is None else theirs


def _header(resolved: ResolvedRequest, choosing: PlanBuilder, compared: Compared, made: WarmPlanFile) -> dict[str, Any]:
    skipped = dict(choosing.skipped)
    if choosing.chosen > made.chunks:
        skipped["over_budget"] = choosing.chosen - made.chunks
    kinds = {kind: name for name, kind in _KINDS.items()}
    header: dict[str, Any] = {
        "made": choosing.now.isoformat(timespec="seconds"),
        "instance": resolved.instance.name,
        "bucket": str(resolved.instance.settings.bucket_handle),
        "takes": kinds[resolved.takes],
        "tiers": [tier.name for tier in resolved.tiers],
        "warm_up": recorded(resolved.request).model_dump(
            mode="json", exclude_defaults=True, exclude=set(NEVER_PLANNED)
        ),
        "selected": made.chunks,
        "selected_bytes": made.bytes,
        "skipped": skipped,
    }
    if compared.facts:
        header["fingerprints"] = compared.facts
    if resolved.request.choose.wants_access:
        header["order"] = {"by": "newest" if choosing.cold else "heat", "why": choosing.cold}
    if choosing.prompts is not None:
        header["prompts"] = {"prompts": choosing.prompts.prompts, "chunks": choosing.prompts.chunks}
    return header


def selected(resolved: ResolvedRequest, made: WarmPlanFile) -> dict[str, int]:
    """Return the size of what a plan selects; lines may have been removed from a plan of chunks."""
    if not resolved.lists and resolved.prompt_file is not None:
        return {"selected": resolved.prompt_file.chunks.total(), "selected_bytes": 0}
    return {"selected": made.chunks, "selected_bytes": made.bytes}


def _prompts_recorded(resolved: ResolvedRequest) -> dict[str, Any]:
    """Return what a header records about prompts, besides the chunks that were found for them in the bucket."""
    path, found = resolved.request.choose.prompts, resolved.prompt_file
    if path is None:
        return {}
    digest = digest_of(path) if found is None else found.sha256
    recorded: dict[str, Any] = {"prompts_file": {"path": str(path), "sha256": digest}}
    if found is not None and not resolved.lists:
        chunks = found.chunks.total()
        recorded |= {"prompts": {"prompts": found.prompts.total(), "chunks": chunks}, "selected": chunks}
    return recorded


def _expect_prompts(resolved: ResolvedRequest) -> None:
    found = resolved.prompt_file
    if found is not None and not found.chunks.total():
        raise NothingToDoError(
            f"nothing selected: --prompts {str(found.path)!r} holds {found.prompts.total()} prompts of the models that are asked "
            f"for, and none of them a full chunk of {resolved.request.choose.chunk_size} tokens"
        )


def _new_of_ours(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _place_of(out: Path) -> Path:
    """Return the final path of a plan: the target of a link, but never a device, a pipe or a directory.

    Raises:
        ConfigError: The path is not that of a regular file, or cannot be written.
    """
    if os.path.exists(out) and not os.path.isfile(out):  # noqa: PTH110, PTH113 - these return False for a path with a null byte
        raise ConfigError(f"--out {str(out)!r} cannot be written: it is not a regular file; name another one")
    expect_writable(out, "--out")
    return Path(os.path.realpath(out))


def _put_out(path: Path, out: Path) -> None:
    """Publish a complete plan atomically, even from another file system."""
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            # With a fixed mode instead of the umask, because a plan that others may write to is refused by `apply`.
            with path.open("rb") as source, os.fdopen(_new_of_ours(part), "wb") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written: {error.strerror}") from None


def _expect_some(resolved: ResolvedRequest, choosing: PlanBuilder, made: WarmPlanFile, bucket: Bucket) -> None:
    other = choosing.skipped["other_kind"]
    tiers, words = ", ".join(repr(tier.name) for tier in resolved.tiers), WORDS[resolved.takes]
    found = WORDS[MPKey if resolved.takes is ClassicKey else ClassicKey]
    if made.chunks:
        if other:
            _log.info("%d chunks have %s and are skipped: tier %s takes %s only", other, found, tiers, words)
        return
    if choosing.chosen:
        raise NothingToDoError(f"nothing selected: the first of {choosing.chosen} chunks is larger than --max-bytes")
    if choosing.prompts is None and choosing.other_kind_found(bucket):  # prompts are hashed into keys of one kind only
        raise NothingToDoError(
            f"nothing selected that tier {tiers} can take: what was found has {found}, and the tier takes {words} only"
        )
    asked = resolved.request.choose.model_dump(mode="json", exclude_defaults=True)
    passed = choosing.skipped["not_chosen"]
    reason = f"; {passed} that were listed are told apart by it" if passed else ""
    if choosing.prompts is not None:
        reason += (
            ". The prompts' hashes are those of LMCache as it runs here: engines need the same chunk size, hash algorithm, "
            "vLLM and PYTHONHASHSEED"
        )
    raise NothingToDoError(f"nothing selected: instance {resolved.instance.name!r} holds no chunk of {asked}{reason}")


@contextlib.contextmanager
def _reported(resolved: ResolvedRequest) -> Iterator[FailureLog]:
    failures = FailureLog(resolved.request.report)
    try:
        yield failures
    finally:
        failures.close()
