"""`python -m jobs fingerprint`: show the engine fingerprints recorded in buckets, and select the valid one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - Typer evaluates the annotations
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.units import printable
from hfbucket_plugin.errors import ConfigError, HFBucketError, IntegrityError, RefusedError, TransportError
from hfbucket_plugin.fingerprint.model import Fingerprint, FingerprintClaim, NewerError, Record, as_text, differences
from hfbucket_plugin.fingerprint.store import MAX_BYTES, FingerprintStore
from hfbucket_plugin.hub.connect import LISTING_SECS, PAGE_SECS, REQUEST_SECS, opened
from hfbucket_plugin.tools import console, exit_codes
from hfbucket_plugin.tools.options import Flag, flags_of, request_of, with_flags
from jobs.cli.session import options_checked
from jobs.options import InstanceOptions
from jobs.report import exit_code_of, note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.fingerprint.store import StoredRecord

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_CLAIM: Final = "claimed"
_RECORDED: Final = "recorded"


@app.callback()
def main() -> None:
    """Show the fingerprints of instances, and say which one is right."""


@app.command("show")
@with_flags(flags_of(InstanceOptions))
def show_all(
    *,
    given: Mapping[Flag, Any],
    model: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this model. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON lines, for programs.")] = False,
) -> None:
    """Say what is recorded of each model, and which engines came by that are not like it.

    Exits 0, or 2 for a wrong command or configuration, 3 when some cannot be read.
    """
    with options_checked():
        named, _ = request_of(InstanceOptions, given).chosen()
    codes: list[int] = []
    with console.results(), patience(Deadline.after(LISTING_SECS)):
        for one in named:
            codes += _show(one, model or [], as_json=as_json)
    raise typer.Exit(exit_codes.worst(codes))


def _show(one: InstanceConfig, wanted: list[str], *, as_json: bool) -> Iterator[int]:
    try:
        with _store_of(one) as store:
            models = wanted or list(store.models(PAGE_SECS))
            for model in models:
                for row in _rows(store, model):
                    if as_json:
                        console.json_line({"instance": one.name} | row.record())
                    else:
                        console.line(f"{one.name}: {row}")
                    if row.trouble:
                        yield exit_codes.FAILED
    except HFBucketError as error:
        note(f"{one.name}: {error}")
        yield exit_code_of(error)
        return
    if not models and not as_json:
        console.line(f"{one.name}: no fingerprint is recorded")


@dataclass(frozen=True, slots=True)
class _Row:
    """Fingerprint in a bucket, or the reason why it cannot be read."""

    model: str
    kind: str
    fingerprint: Fingerprint | None = None
    wrong: str = ""
    trouble: str = ""

    def __str__(self) -> str:
        model, one = printable(self.model), self.fingerprint
        if one is None:
            return f"{model}: {self.kind}: unreadable: {printable(self.trouble)}"
        facts = ", ".join(f"{name} {word}" for name, word in one.facts().items())
        conflict = f" CONFLICT: {self.wrong}." if self.wrong else ""
        return f"{model}: {printable(str(one.space))}: {self.kind} {one.digest}:{conflict} {facts}"

    def record(self) -> dict[str, Any]:
        one = self.fingerprint
        return {
            "model": self.model,
            "kind": self.kind,
            "digest": one.digest if one is not None else None,
            "conflict": self.wrong or None,
            "fingerprint": one.model_dump(mode="json", exclude_none=True) if one is not None else None,
            "reason": self.trouble or None,
            "trouble": self.trouble or None,  # its name in release 0.1
        }


def _rows(store: FingerprintStore, model: str) -> Iterator[_Row]:
    """Yield the recorded fingerprint, then the claims that differ from it."""
    try:
        found = store.read(model, _soon())
    except IntegrityError as error:
        found = None
        yield _Row(model, _RECORDED, trouble=str(error))
    variants = found.record.variants if found is not None else ()
    yield from (_Row(model, _RECORDED, variant) for variant in variants)
    known = {variant.digest for variant in variants}
    for claim in store.claims(model, _soon()):
        theirs = claim.fingerprint
        if theirs is None:
            yield _Row(model, _CLAIM, trouble=claim.why)
        elif theirs.digest not in known:
            recorded = found.record.of(theirs.space) if found is not None else None
            wrong = as_text(differences(recorded, theirs), "there") if recorded is not None else ""
            yield _Row(model, _CLAIM, theirs, wrong)


@app.command()
@with_flags(flags_of(InstanceOptions))
def accept(
    *,
    given: Mapping[Flag, Any],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Model whose fingerprint is replaced.")] = None,
    digest: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Digest of a claim, as show prints it, or the start of one.")
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of a digest: a file with a line of show --json, or a claim."),
    ] = None,
    clear_claims: Annotated[
        bool, typer.Option("--clear-claims", help="Also delete the claims that differ from it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Record it without asking.")] = False,
) -> None:
    """Record another fingerprint in the place of that which is recorded; engines see it within their next look.

    Exits 0 when done, or only shown since nobody could be asked; 2 for a wrong command or configuration, 3 when it failed, 4
    when refused.
    """
    with options_checked():
        if (digest is None) == (from_file is None):
            raise ConfigError("name the fingerprint: --digest DIGEST, or --from-file FILE")
        if digest is not None and not digest:  # an unset variable, say: the empty text is a prefix of every digest
            raise ConfigError("--digest is empty: name the fingerprint as `show` tells it")
        filed = _given(from_file, model) if from_file is not None else None
        if filed is None and not model:
            raise ConfigError("name the model of the digest: --model NAME")
        named, _ = request_of(InstanceOptions, given).chosen()
    codes = []
    with console.results():
        for one in named:
            try:
                with _store_of(one) as store:
                    wanted = filed or _claimed(store, model or "", digest or "")
                    _accept(one, store, wanted, yes=yes, clear=clear_claims)
            except HFBucketError as error:
                note(f"{one.name}: {error}")
                codes.append(exit_code_of(error))
    raise typer.Exit(exit_codes.worst(codes))


def _given(path: Path, model: str | None) -> Fingerprint:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"--from-file {str(path)!r}: is too large for a fingerprint")
        fingerprint = FingerprintClaim.from_json(path.read_bytes(), f"--from-file {str(path)!r}")
    except OSError as error:
        raise ConfigError(f"--from-file {str(path)!r} cannot be read: {error.strerror}") from None
    except IntegrityError as error:
        raise ConfigError(str(error)) from None
    if model is not None and fingerprint.model != model:
        raise ConfigError(f"--from-file {str(path)!r}: is of {fingerprint.model!r}, not of {model!r}")
    return fingerprint


def _claimed(store: FingerprintStore, model: str, digest: str) -> Fingerprint:
    claims = [claim.fingerprint for claim in store.claims(model, _soon()) if claim.fingerprint is not None]
    fitting = [one for one in claims if one.digest.startswith(digest)]
    if len(fitting) != 1:
        there = ", ".join(one.digest for one in claims) or "none"
        many = "no claim" if not fitting else f"{len(fitting)} claims"
        raise RefusedError(f"{many} of {model!r} with the digest {digest!r}: there are {there}")
    return fitting[0]


def _accept(one: InstanceConfig, store: FingerprintStore, wanted: Fingerprint, *, yes: bool, clear: bool) -> None:
    found, trouble = _read(store, wanted.model)
    before = found.record.of(wanted.space) if found is not None else None
    stale = [
        claim.path
        for claim in (store.claims(wanted.model, _soon()) if clear else ())
        if claim.fingerprint is not None and differences(wanted, claim.fingerprint)
    ]
    console.line(
        f"{one.name}: before: {_Row(wanted.model, _RECORDED, before, trouble=trouble or 'nothing is recorded')}"
    )
    console.line(f"{one.name}: after:  {_Row(wanted.model, _RECORDED, wanted)}")
    if before is not None and (wrong := differences(before, wanted)):
        console.line(f"{one.name}: changes: {as_text(wrong, 'from then on')}")
    for path in stale:
        console.line(f"{one.name}: to be deleted: {path}")
    if not yes and not (console.at_terminal() and _asked(one, wanted)):
        note(f"{one.name}: nothing was changed; --yes does it")
        return
    again, _ = _read(store, wanted.model)
    if again != found:
        raise RefusedError(f"{store.path(wanted.model)}: was changed since it was shown; look again")
    base = found.record if found is not None else Record(model=wanted.model)
    store.write(base.having(wanted), _soon())
    written = store.read(wanted.model, _soon())
    if written is None or written.record.of(wanted.space) != wanted:
        raise TransportError(f"{store.path(wanted.model)}: another one was written at the same time; look again")
    store.remove(stale, _soon())
    note(f"{one.name}: recorded; engines see it with their next look (fingerprint_refresh_secs)")


def _read(store: FingerprintStore, model: str) -> tuple[StoredRecord | None, str]:
    try:
        return store.read(model, _soon()), ""
    except NewerError as error:
        raise RefusedError(str(error)) from None
    except IntegrityError as error:
        return None, str(error)


def _asked(one: InstanceConfig, wanted: Fingerprint) -> bool:
    try:
        question = f"Record it for {printable(wanted.model)} in {one.settings.bucket_handle}?"
        return typer.confirm(question, default=False, err=True)
    except typer.Abort:
        return False


@contextlib.contextmanager
def _store_of(one: InstanceConfig) -> Iterator[FingerprintStore]:
    with opened(one, REQUEST_SECS) as bucket:
        store = FingerprintStore(bucket, one.name)
        try:
            yield store
        finally:
            store.close()


def _soon() -> Deadline:
    return Deadline.patient(REQUEST_SECS)
