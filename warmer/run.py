"""From a warm-up to a plan, and from a plan to what the tiers hold: `plan`, `apply`, and `run`, which is both."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.files import Scratch, expect_writable
from hfbucket_plugin.core.keys import BucketHandle, ClassicKey, MPKey
from hfbucket_plugin.errors import ConfigError, HFBucketError, RefusedError, ScratchError
from hfbucket_plugin.tools.selection import ADVICE
from warmer.check import gate as checks
from warmer.cluster.engine_tiers import checkable
from warmer.cluster.execute import CopyRun
from warmer.node.prompts import digest_of, expect_recorded
from warmer.plan.build import WORDS, Choosing
from warmer.plan.plan_file import NEVER_PLANNED, PlanFile
from warmer.report.outcomes import NothingToDoError
from warmer.report.summary import FailureLog
from warmer.request import resolve
from warmer.request.resolve import bind, recorded
from warmer.request.warm_file import validated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.signals import StopSwitch
    from warmer.check.canary import Canary
    from warmer.report.observers import Onlooker
    from warmer.request.model import WarmUp
    from warmer.request.resolve import Bound, Compared

_log = logging.getLogger(__name__)

_CLOCK_SECS = 60.0
_LISTING_SECS = 3600.0
"""How long choosing may take, the Hub's pauses included, where `--max-duration` does not say."""

_KINDS = {"classic": ClassicKey, "mp": MPKey}


def plan(warm_up: WarmUp, out: Path | None) -> dict[str, Any]:
    """Choose chunks, and write down which.

    Args:
        warm_up: What was asked for.
        out: The plan file, which appears when it is complete; None to only tell what it would hold.

    Returns:
        The plan's header.

    Raises:
        ConfigError: The configuration is wrong, or asks for what is not supported.
        NothingToDoError: Nothing is chosen that the tiers can take.
        ScratchError: There is no room for the plan, or to sort it.
        HFBucketError: The chunks could not be listed.
    """
    with _planned(bind(warm_up), out) as made:
        return made.header


def run(warm_up: WarmUp, stop: StopSwitch, *onlookers: Onlooker) -> dict[str, Any]:
    """Choose chunks and copy them.

    Args:
        warm_up: What was asked for.
        stop: Whether to stop.
        onlookers: Who looks on.

    Returns:
        The summary, its `exit_code` included.

    Raises:
        ConfigError: The configuration is wrong, or asks for what is not supported.
        NothingToDoError: There is nothing to do, or nowhere.
        ClusterError: The configured Ray cluster does not answer.
        HFBucketError: The chunks could not be listed.
        Interrupted: Told to stop before copying began.
    """
    bound = bind(warm_up)
    with _reported(bound) as failures, _planned(bound, None) as made:
        return _carried_out(bound, made, failures, stop, onlookers)


def apply(warm_up: WarmUp, made: PlanFile, stop: StopSwitch, *onlookers: Onlooker) -> dict[str, Any]:
    """Copy what a plan says; what is there already is passed by.

    Args:
        warm_up: Of the plan, see `planned_warm_up`.
        made: The plan.
        stop: Whether to stop.
        onlookers: Who looks on.

    Returns:
        The summary, its `exit_code` included.

    Raises:
        ConfigError: The configuration is wrong, or is not that of the plan.
        NothingToDoError: There is nothing to do, or nowhere.
        RefusedError: The plan names more chunks than were planned.
        ClusterError: The configured Ray cluster does not answer.
        Interrupted: Told to stop before copying began.
    """
    bound = bind(warm_up)
    expect_fitting(bound, made)
    with _reported(bound) as failures:
        return _carried_out(bound, made, failures, stop, onlookers)


def _carried_out(
    bound: Bound, made: PlanFile, failures: FailureLog, stop: StopSwitch, onlookers: Sequence[Onlooker]
) -> dict[str, Any]:
    summary = CopyRun(bound, made, onlookers).carry_out(failures, stop)
    failures.close(summary)
    return summary


def check(
    warm_up: WarmUp,
    made: PlanFile | None,
    stop: StopSwitch,
    *,
    require: float,
    hashes: bool,
    canary: Canary | None = None,
) -> dict[str, Any]:
    """Tell how warm every node is.

    Args:
        warm_up: Of the plan, or what to choose.
        made: The plan; None to choose anew.
        stop: Whether to stop.
        require: The share that each tier of each node must hold.
        hashes: Whether contents are hashed.
        canary: What engines are asked beside; None for nothing. Its chunks are those of the engines' configuration.

    Returns:
        The report, its `exit_code` included.

    Raises:
        ConfigError: The configuration is wrong, or is not that of the plan.
        NothingToDoError: There is nothing to check, or nowhere.
        ClusterError: The configured Ray cluster does not answer.
        HFBucketError: The chunks could not be listed.
        Interrupted: Told to stop before the check began.
    """
    bound = bind(warm_up)
    checkable(bound.tiers)
    canary = None if canary is None else replace(canary, chunk_tokens=bound.chunk_tokens())
    if made is not None:
        expect_fitting(bound, made)
        compared: dict[str, Any] = {"with": "plan", "at": made.header.get("made"), "plan": str(made.path)}
        return checks.check(bound, made, stop, require=require, hashes=hashes, compared_with=compared, canary=canary)
    with _planned(bound, None) as chosen:
        compared = {"with": "bucket", "at": chosen.header.get("made"), "plan": None}
        return checks.check(bound, chosen, stop, require=require, hashes=hashes, compared_with=compared, canary=canary)


def planned_warm_up(made: PlanFile) -> dict[str, Any]:
    """What a plan was made of, for `warmer.request.warm_file`; empty for a plan without a header.

    Raises:
        ConfigError: The header is not readable.
        RefusedError: It holds a token, which no plan does.
    """
    document = made.header.get("warm_up", {})
    warm_up = validated(document, str(made.path))
    if recorded(warm_up) != warm_up:
        raise RefusedError(f"plan {str(made.path)!r} holds a token, which no plan does: plan anew")
    return dict(document)


def expect_fitting(bound: Bound, made: PlanFile) -> None:
    """Make sure that a plan is of the bucket and the kind of tier that a configuration names by now.

    Raises:
        ConfigError: It is of another.
        NothingToDoError: It is empty.
        RefusedError: It names more chunks than were planned.
    """
    if made.chunks > made.header.get("selected", made.chunks):
        raise RefusedError(
            f"plan {str(made.path)!r} names {made.chunks} chunks, and {made.header['selected']} were planned: plan anew"
        )
    if not made.chunks and bound.lists:
        raise NothingToDoError(f"plan {str(made.path)!r} holds no chunk")
    if bound.prompt_file is not None:
        expect_recorded(bound.prompt_file, made.header.get("prompts_file"), made.path)
    bucket, kind = bound.instance.settings.bucket_handle, made.header.get("takes")
    if BucketHandle.parse(str(made.header.get("bucket", bucket))) != bucket:
        raise ConfigError(
            f"plan {str(made.path)!r} is of {made.header['bucket']}, and instance {bound.instance.name!r} is {bucket}: "
            "plan anew"
        )
    home = bound.instance.settings.bucket_handle.join("")
    if made.home not in (None, home):
        raise ConfigError(
            f"plan {str(made.path)!r} names objects below {made.home!r}, and those of instance {bound.instance.name!r} are below "
            f"{home!r}: plan anew"
        )
    if kind in _KINDS and _KINDS[kind] is not bound.takes:
        raise ConfigError(
            f"plan {str(made.path)!r} holds {WORDS[_KINDS[kind]]}, and tier {bound.tiers[0].name!r} takes "
            f"{WORDS[bound.takes]}"
        )


@contextlib.contextmanager
def _planned(bound: Bound, out: Path | None) -> Iterator[PlanFile]:
    """A plan in a file: `out`, or one that is gone with the block."""
    if not bound.warm_up.choose.given:
        raise ConfigError(ADVICE)
    place = None if out is None else _place_of(out)
    prompts = bound.prompts() if bound.lists else None
    bucket = bound.bucket()
    until = Deadline.after(bound.warm_up.limits.max_duration or _LISTING_SECS)
    # Where engines load from their own tiers, the Hub is asked nothing.
    with patience(until):
        choosing = Choosing(bound.warm_up.choose, bound.takes, _now(bound, bucket), prompts)
        compared = resolve.compare(bound, choosing, bucket) if bound.lists else resolve.Compared()
    scratch = Scratch(bound.instance.settings.download_tmp_dir)
    try:
        with scratch.file() as sorting, scratch.file() as path:
            with patience(until):
                recorded = _prompts_recorded(bound)
                try:
                    chunks = choosing.planned(bucket, sorting) if bound.lists else iter(())
                    made = PlanFile.write(
                        path, chunks, lambda whole: _header(bound, choosing, compared, whole) | recorded
                    )
                except OSError as error:
                    if isinstance(error, HFBucketError):
                        raise
                    raise ScratchError(
                        f"the plan cannot be written below download_tmp_dir, {str(path.parent)!r}: {error.strerror or error}; make "
                        "room there, or name another directory"
                    ) from None
                if bound.lists:
                    _expect_some(bound, choosing, made, bucket)
                else:
                    _expect_prompts(bound)
            if place is not None:
                _put_out(path, place)
            yield made
    finally:
        scratch.close()


def _now(bound: Bound, bucket: Bucket) -> datetime:
    """What `since` counts back from: the Hub's clock, which dates the chunks; ours where nothing depends on it."""
    ours = datetime.now(UTC)
    if bound.warm_up.choose.since is None or not bound.lists:
        return ours
    theirs = bucket.time(Deadline.after(_CLOCK_SECS))
    if theirs is None:
        _log.warning("--since goes by the clock of this machine: the Hub does not say what time it is")
    return ours if theirs is None else theirs


def _header(bound: Bound, choosing: Choosing, compared: Compared, made: PlanFile) -> dict[str, Any]:
    skipped = dict(choosing.skipped)
    if choosing.chosen > made.chunks:
        skipped["over_budget"] = choosing.chosen - made.chunks
    kinds = {kind: name for name, kind in _KINDS.items()}
    header: dict[str, Any] = {
        "made": choosing.now.isoformat(timespec="seconds"),
        "instance": bound.instance.name,
        "bucket": str(bound.instance.settings.bucket_handle),
        "takes": kinds[bound.takes],
        "tiers": [tier.name for tier in bound.tiers],
        "warm_up": recorded(bound.warm_up).model_dump(mode="json", exclude_defaults=True, exclude=set(NEVER_PLANNED)),
        "selected": made.chunks,
        "selected_bytes": made.bytes,
        "skipped": skipped,
    }
    if compared.facts:
        header["fingerprints"] = compared.facts
    if bound.warm_up.choose.wants_heat:
        header["order"] = {"by": "newest" if choosing.cold else "heat", "why": choosing.cold}
    if choosing.prompts is not None:
        header["prompts"] = {"prompts": choosing.prompts.prompts, "chunks": choosing.prompts.chunks}
    return header


def selected(bound: Bound, made: PlanFile) -> dict[str, int]:
    """How much a plan is about: lines of a plan of chunks may have been removed."""
    if not bound.lists and bound.prompt_file is not None:
        return {"selected": bound.prompt_file.chunks.total(), "selected_bytes": 0}
    return {"selected": made.chunks, "selected_bytes": made.bytes}


def _prompts_recorded(bound: Bound) -> dict[str, Any]:
    """What a header says of prompts, beside the chunks that were found of them in the bucket."""
    path, found = bound.warm_up.choose.prompts, bound.prompt_file
    if path is None:
        return {}
    digest = digest_of(path) if found is None else found.sha256
    recorded: dict[str, Any] = {"prompts_file": {"path": str(path), "sha256": digest}}
    if found is not None and not bound.lists:
        chunks = found.chunks.total()
        recorded |= {"prompts": {"prompts": found.prompts.total(), "chunks": chunks}, "selected": chunks}
    return recorded


def _expect_prompts(bound: Bound) -> None:
    found = bound.prompt_file
    if found is not None and not found.chunks.total():
        raise NothingToDoError(
            f"nothing selected: --prompts {str(found.path)!r} holds {found.prompts.total()} prompts of the models that are asked "
            f"for, and none of them a full chunk of {bound.warm_up.choose.chunk_size} tokens"
        )


def _new_of_ours(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _place_of(out: Path) -> Path:
    """Where a plan is put: where a link leads, and never in the place of a device, a pipe or a directory.

    Raises:
        ConfigError: It is not a regular file, or cannot be written.
    """
    if os.path.exists(out) and not os.path.isfile(out):  # noqa: PTH110, PTH113 - these take a null byte for no file
        raise ConfigError(f"--out {str(out)!r} cannot be written: it is not a regular file; name another one")
    expect_writable(out, "--out")
    return Path(os.path.realpath(out))


def _put_out(path: Path, out: Path) -> None:
    """Let a plan appear whole; it may be on another file system."""
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            # Whatever the umask: a plan that others may write to is never applied.
            with path.open("rb") as source, os.fdopen(_new_of_ours(part), "wb") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written: {error.strerror}") from None


def _expect_some(bound: Bound, choosing: Choosing, made: PlanFile, bucket: Bucket) -> None:
    other = choosing.skipped["other_kind"]
    tiers, words = ", ".join(repr(tier.name) for tier in bound.tiers), WORDS[bound.takes]
    found = WORDS[MPKey if bound.takes is ClassicKey else ClassicKey]
    if made.chunks:
        if other:
            _log.info("%d chunks have %s and are passed by: tier %s takes %s only", other, found, tiers, words)
        return
    if choosing.chosen:
        raise NothingToDoError(f"nothing selected: the first of {choosing.chosen} chunks is larger than --max-bytes")
    if choosing.prompts is None and choosing.other_kind_found(bucket):  # the hashes of prompts are of one kind
        raise NothingToDoError(
            f"nothing selected that tier {tiers} can take: what was found has {found}, and the tier takes {words} only"
        )
    asked = bound.warm_up.choose.model_dump(mode="json", exclude_defaults=True)
    passed = choosing.skipped["not_chosen"]
    reason = f"; {passed} that were listed are told apart by it" if passed else ""
    if choosing.prompts is not None:
        reason += (
            ". The prompts' hashes are those of LMCache as it runs here: engines need the same chunk size, hash algorithm, "
            "vLLM and PYTHONHASHSEED"
        )
    raise NothingToDoError(f"nothing selected: instance {bound.instance.name!r} holds no chunk of {asked}{reason}")


@contextlib.contextmanager
def _reported(bound: Bound) -> Iterator[FailureLog]:
    failures = FailureLog(bound.warm_up.report)
    try:
        yield failures
    finally:
        failures.close()
