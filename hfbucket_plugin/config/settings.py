"""Settings of one bucket instance, read from the engine's LMCache configuration.

All keys are flat in `extra_config["remote_storage_plugin.<instance>.<setting>"]`, where the instance is `hfbucket`, an
instance-qualified name such as `hfbucket.us`, or any other name whose `module_path` names this package's adapter. Every
field states its default and the reason for it; a test compares `docs/configure.md` with this model.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path  # noqa: TC003 - pydantic evaluates it
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.files import default_root
from hfbucket_plugin.core.keys import BucketHandle
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

KEY_ROOT = "remote_storage_plugin."

MIB = 1024 * 1024
GIB = 1024 * MIB

MIN_INFLIGHT_BYTES = MIB
_XORB_BYTES = 64 * MIB
PIECE_BYTES = 2 * MIB
"""Size of the pieces in which hf_xet fetches a stream, up to twice as large near the end. Each takes two round trips
that overlap those of the next, and is returned separately. Building the `bytes` of a piece holds the GIL."""

MAX_RANGE_BYTES = 3 * PIECE_BYTES
"""Size from which an object is read as several streams, because one stream requests only two pieces at a time."""


MAX_SECS = 365 * 86_400
"""Maximum of settings in seconds, a year. Clocks, waits and hf_xet fail beyond some limit."""

MAX_COUNT = 10**9
_BOUNDS = {"gt": "above", "ge": "at least", "le": "at most"}
MAX_BYTES = 2**50

Secs = Annotated[float, Field(gt=0, le=MAX_SECS)]
SecsOrNone = Annotated[float, Field(ge=0, le=MAX_SECS)]
# A field with its own bound uses PositiveInt, because pydantic applies only one of two equal bounds.
Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
ByteCount = Annotated[int, Field(gt=0, le=MAX_BYTES)]

# Format of a token: one that was pasted into the wrong place must be rejected without being repeated.
_SHORT_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_(?:[A-Za-z0-9]{16,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{4,})")
_PLAIN_NAME = re.compile(r"[a-z][a-z_.]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def hide_tokens(text: str) -> str:
    """Return a text without known tokens and without anything that looks like a Hub token, including short ones."""
    return _SHORT_TOKEN.sub("***", texts.hide(text))


def _parse_handle(value: Any) -> BucketHandle:
    if isinstance(value, BucketHandle):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a text that reads hf://buckets/<namespace>/<bucket>[/<prefix>]")  # noqa: TRY004 - for pydantic
    return BucketHandle.parse(value)


def _check_variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value) or texts.HUB_TOKEN.match(value):
        raise ValueError("must be the name of an environment variable, such as HF_TOKEN, not a token itself")
    return value


def _check_endpoint(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not value.isprintable() or " " in value:
        raise ValueError("must be the address of a Hub, such as https://huggingface.co")
    if parts.username is not None or parts.query or parts.fragment:  # errors show the address
        raise ValueError("must be an address alone: a token goes into the variable that token_env names")
    return value


def _default_endpoint() -> str:
    """Return `HF_ENDPOINT`, treating a variable that is set but empty, as in compose files, as unset."""
    return constants.ENDPOINT.strip() or "https://huggingface.co"


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            "cannot expand '~': this user has no home directory; set HOME, or write the full path"
        ) from None


def check_fact(value: str) -> str:
    """Reject a value that must not be recorded in a bucket.

    Raises:
        ValueError: It looks like a token, or is more than a name.
    """
    if not value.isprintable() or texts.HUB_TOKEN.search(value):  # it is recorded in the bucket
        raise ValueError("must be a name on one line, and no token")
    return value


def _as_switch(value: Any) -> Any:
    """Accept `on` and `off`, which YAML parses as booleans if they are not quoted."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class InstanceSettings(BaseModel):
    """Settings of one instance. Immutable; a token never shows in its `repr`.

    The first block has the settings of LMCache's built-in backend, with its meanings and defaults; the second is
    specific to this package.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    bucket_handle: Annotated[BucketHandle, BeforeValidator(_parse_handle)] = Field(
        description="`hf://buckets/<namespace>/<bucket>[/<prefix>]`. Required: there is no bucket to guess."
    )
    token_env: Annotated[str, AfterValidator(_check_variable)] = Field(
        "HF_TOKEN",
        description="Environment variable with the access token. A non-empty variable overrides `token`. Default: the"
        " variable that every Hugging Face tool reads.",
    )
    token: SecretStr | None = Field(
        None,
        description="A token written into the configuration. LMCache logs its configuration, including this: prefer "
        "`token_env`.",
    )
    create_bucket_if_missing: bool = Field(
        False,
        description="Create the bucket on the first write, not before. Off, so that a mistyped handle is an error and"
        " not a new bucket.",
    )
    download_tmp_dir: Annotated[Path, AfterValidator(_expand_home)] = Field(
        default_factory=default_root,
        description="Directory for temporary files, each process in a locked subdirectory of its own: what hf_xet "
        "keeps of its sessions (some MiB), and the chunks that `verify: hash` checks. Must belong to the "
        "user of the process, or to root. A tmpfs such as /dev/shm/lmcache-hfbucket keeps them off the "
        "disk.",
    )
    metadata_cache_ttl_secs: SecsOrNone = Field(
        30.0,
        description="Seconds for which an object's existence, size and hash are cached. LMCache's default.",
    )

    miss_cache_ttl_secs: SecsOrNone = Field(
        5.0,
        description="Seconds for which a miss is cached; never longer than `metadata_cache_ttl_secs`. Short, so that "
        "a chunk written elsewhere is soon found.",
    )
    metadata_cache_entries: Count = Field(
        100_000,
        description="Maximum entries of the metadata cache; the least recently used are dropped first. About 50 MB "
        "when full.",
    )
    lookup_timeout_secs: Secs = Field(
        1.0,
        description="Maximum seconds of a lookup; then it counts as a miss. Short, because a lookup blocks the "
        "engine's scheduler.",
    )
    get_timeout_secs: Secs | None = Field(
        None,
        description="Maximum seconds of a get; what has arrived by then is returned. Must end before LMCache's "
        "`blocking_timeout_secs`, after which everything is discarded. Default: 90 % of that.",
    )
    put_timeout_secs: Secs = Field(
        60.0,
        description="Maximum seconds of a put of one batch. Long, because no request waits for a put.",
    )
    close_timeout_secs: Secs = Field(
        5.0,
        description="Maximum seconds that closing waits for puts in progress. Short, so that a stopping engine stops.",
    )
    verify: Literal["size", "hash"] = Field(
        "size",
        description="What is checked before a chunk is served. `size`: its length. `hash`: its Xet hash too, at 0.5 "
        "to 1.7 GB/s; this also detects flipped bytes in incompressible data, which Xet's own decoder "
        "does not.",
    )
    role: Literal["read-write", "read-only", "write-only"] = Field(
        "read-write",
        description="What the engine may do here. LMCache sends every put to all its instances and looks all of them "
        "up: `read-only` stores and deletes nothing, `write-only` is never looked up or read. Default: "
        "LMCache's behaviour.",
    )
    max_inflight_bytes: ByteCount = Field(
        64 * MIB,
        ge=MIN_INFLIGHT_BYTES,
        description="Maximum bytes requested by reads at one time. Reads take at most this and 32 MiB of memory "
        "beyond the engine's own; 16 chunks of 4 MiB fit into 64 MiB. Puts are cut into commits of four "
        "times as much (of as much, below 64 MiB), stored completely or not at all: lower this if a "
        "commit takes longer than `put_timeout_secs`.",
    )
    max_parallel_reads: PositiveInt = Field(
        32,
        le=256,
        description="Maximum streams open at one time, within `max_inflight_bytes`. Each costs two round trips; 32 "
        "hide them for small chunks, and more did not help on two cores.",
    )
    max_parallel_writes: PositiveInt = Field(
        2,
        le=64,
        description="Maximum commits in progress at one time, if they fit into `max_inflight_bytes` together; a "
        "larger one goes alone and keeps the line busy by itself. Two, so that a small put need not wait "
        "for another's round trips.",
    )
    max_waiting_put_bytes: ByteCount = Field(
        2 * GIB,
        description="Maximum bytes of chunks whose puts wait or are in progress; more is refused and counted as "
        "`not_taken`. They occupy the engine's own memory, which cannot be reused meanwhile: keep this "
        "well below it.",
    )
    put_window_secs: SecsOrNone = Field(
        1.0,
        description="Maximum seconds that uploaded chunks wait to be named together with others, by one call to the "
        "Hub, while more are being uploaded; otherwise they do not wait. No request waits for a put, and "
        "calls are scarce.",
    )
    max_hub_calls_per_minute: Count | None = Field(
        None,
        description="Maximum calls of this instance in this process to the Hub's API in any 60 s. Beyond it, lookups "
        "miss at once, counted as `budget`, and puts wait within their deadline. The Hub's quotas are per"
        " member and shared by a fleet (6,000 calls in 5 minutes are 20 a second). Default: no limit, "
        "since the size of the fleet is unknown here.",
    )
    fingerprint: Annotated[Literal["enforce", "warn", "off"], BeforeValidator(_as_switch)] = Field(
        "warn",
        description="What happens to an engine that differs from the bucket's fingerprint: other weights, chunk size,"
        " layout or hashes under the same model name; see docs/fingerprint.md. `enforce`: its lookups and"
        " gets miss and its puts are refused, also while the fingerprint is unknown. `warn`: it is logged"
        " and counted. Default: `warn`, since a fleet that has never recorded a fingerprint must not "
        "stop.",
    )
    model_revision: Annotated[str, AfterValidator(check_fact)] | None = Field(
        None,
        min_length=1,
        max_length=512,
        description="Revision of the model's weights, such as a commit of its repository: recorded in the fingerprint"
        " and compared. Change it with the weights. LMCache does not know it; without it, new weights of "
        "the same layout are not noticed.",
    )
    fingerprint_refresh_secs: Secs = Field(
        1800.0,
        description="Seconds until the fingerprint is read again; a tenth of that after a conflict, or while none is "
        "recorded. One call each: 1,600 workers make 270 calls in 5 minutes.",
    )
    breaker_failures: Count = Field(
        3,
        description="Transport failures (no answer, 5xx, deadline) of lookups, reads or commits in a row that open "
        "the breaker: from then on they miss at once. Three, so that one lost connection changes nothing.",
    )
    breaker_probe_secs: Secs = Field(
        1.0,
        description="Seconds until an open breaker is probed in the background; doubled after each failure, up to "
        "`breaker_max_probe_secs`.",
    )
    breaker_max_probe_secs: Secs = Field(
        10.0,
        description="Maximum seconds between two probes. 10 s restore full service well within 30 s of the end of an "
        "outage.",
    )
    index: Annotated[Literal["off", "listing", "snapshot"], BeforeValidator(_as_switch)] = Field(
        "off",
        description="Whether lookups use a table of the instance's keys in this process's memory; see docs/index.md. "
        "`snapshot`: a published table, kept current by the writers' journals. `listing`: one that this "
        "process makes by listing the instance. Off, since the first needs a builder on a schedule, and "
        "the second costs a call for 1000 objects.",
    )
    index_miss: Literal["trust", "ask"] = Field(
        "trust",
        description="What a key that is not in the index means. `trust`: a miss, at no cost; a chunk written without "
        "the index is found with the next snapshot. `ask`: the Hub is asked, as without an index. Puts "
        "always ask.",
    )
    index_refresh_secs: Secs = Field(
        60.0,
        description="Minimum seconds between two looks for a new snapshot and new journals; each is a call to the "
        "Hub, and one more for every 1000 journals. Longer if more than 200 processes write journals: "
        "together they make 1000 calls in 5 minutes. With `listing`, the calls of a listing are spread "
        "over time, one in this interval, as far as `index_max_age_secs` permits.",
    )
    index_max_age_secs: Secs = Field(
        6 * 3600.0,
        description="Age at which an index that was not renewed is no longer used: lookups then ask the Hub as "
        "without one. Six hours outlast some failed runs of an hourly builder.",
    )
    index_max_bytes: ByteCount = Field(
        512 * MIB,
        description="Maximum memory of the index; a larger one is not used, and a `listing` that does not fit is "
        "tried again after six hours. A key takes 68 bytes, 76 if hits are known, and while a new "
        "snapshot is loaded there are two: 512 MiB are 7 million keys.",
    )
    index_journal_secs: Secs = Field(
        30.0,
        description="Minimum seconds between two journals of this process, in which it reports what it put, deleted "
        "and read; each is a call to the Hub, and none is written without news. Longer if more than 100 "
        "processes write journals: together they make 1000 calls in 5 minutes.",
    )
    index_journal_entries: PositiveInt = Field(
        2000,
        le=50_000,
        description="Maximum entries of one journal, of 61 bytes each. A journal that is not full is rewritten with "
        "each report, so that there are few to list.",
    )
    index_journal_waiting: Count = Field(
        50_000,
        description="Maximum entries that wait to be written, while the Hub accepts none or there is no snapshot yet;"
        " about 20 MB when full. The oldest are dropped first, and counted: other processes learn of "
        "those keys from the next snapshot.",
    )
    heat: Annotated[Literal["on", "off"], BeforeValidator(_as_switch)] = Field(
        "on",
        description="Whether this process reports, also by journals, which chunks it was served, so that a cleanup "
        "keeps what is read and a warm-up begins with it; see docs/index.md. Needs `index: snapshot` and "
        "a role that reads and writes. On, since chunks whose reads are not reported look idle to all; "
        "switch it off in all processes or in none.",
    )
    heat_secs: Secs = Field(
        300.0,
        description="Minimum seconds between two reports of hits. A report goes with a journal that is due anyway, or"
        " else by one call to the Hub; without hits there is none.",
    )
    heat_keys: PositiveInt = Field(
        200,
        le=10_000,
        description="Keys in a report of hits, of 65 bytes each; up to 40 times as many, and at most 16,384, if more "
        "were read. Hits of further keys wait for the next report. Beyond 32,768 waiting keys hits are "
        "dropped, and time before that moment does not count as idle.",
    )
    endpoint: Annotated[str, AfterValidator(_check_endpoint)] = Field(
        default_factory=_default_endpoint,
        validate_default=True,
        description="The Hub's address. Default: HF_ENDPOINT, or the public Hub.",
    )

    @model_validator(mode="after")
    def _misses_are_believed_no_longer_than_hits(self) -> InstanceSettings:
        if "miss_cache_ttl_secs" in self.model_fields_set and self.miss_cache_ttl_secs > self.metadata_cache_ttl_secs:
            raise ValueError(  # `load` rewords the ValidationError that pydantic makes of it
                f"miss_cache_ttl_secs ({self.miss_cache_ttl_secs}) must not exceed metadata_cache_ttl_secs "
                f"({self.metadata_cache_ttl_secs})"
            )
        return self

    @property
    def reads(self) -> bool:
        """Whether the engine may look up and read chunks."""
        return self.role != "write-only"

    @property
    def writes(self) -> bool:
        """Whether the engine may store and delete chunks."""
        return self.role != "read-only"

    @property
    def effective_miss_ttl_secs(self) -> float:
        """Lifetime of a cached miss in seconds, with the cap applied."""
        return min(self.miss_cache_ttl_secs, self.metadata_cache_ttl_secs)

    @property
    def range_bytes(self) -> int:
        """Bytes per stream; a larger object is read in several streams concurrently."""
        return min(MAX_RANGE_BYTES, self.max_inflight_bytes)

    @property
    def buffer_bytes(self) -> int:
        """Bytes that hf_xet may hold over all streams; the rest of `max_inflight_bytes` is for pieces being copied."""
        return self.max_inflight_bytes * 3 // 4

    @property
    def commit_bytes(self) -> int:
        """Bytes after which a put is split into another commit.

        hf_xet packs its input into units of 64 MiB and keeps about four of them in memory, however long a commit is; a
        short commit takes about two and a half times its own bytes.
        """
        return self.max_inflight_bytes * (1 if self.max_inflight_bytes < _XORB_BYTES else 4)

    def model_post_init(self, _context: Any, /) -> None:
        """Register an inline token for removal from all output."""
        if self.token is not None:
            texts.know(self.token.get_secret_value())

    def resolve_token(self, environ: Mapping[str, str] | None = None) -> str | None:
        """Return the access token: the variable named by `token_env` if set and not empty, else `token`, else None.

        Called for each request, so that a rotated token takes effect without a restart.
        """
        texts.know((os.environ if environ is None else environ).get(self.token_env))
        value = (os.environ if environ is None else environ).get(self.token_env, "").strip()
        if value:
            return value
        inline = self.token.get_secret_value().strip() if self.token is not None else ""
        return inline or None


_Model = TypeVar("_Model", bound=InstanceSettings)

# LMCache's own keys in the same namespace, which name the class that serves the instance and are not its settings.
_LOADER_KEYS = frozenset({"module_path", "class_name"})


def load(extra_config: Mapping[Any, Any] | None, instance: str, declared: Iterable[str] = ()) -> InstanceSettings:
    """Read the settings of one instance.

    Args:
        extra_config: LMCache's `extra_config`, a flat map with dotted keys.
        instance: Plugin name, such as `hfbucket` or `hfbucket.us`.
        declared: All names in `remote_storage_plugins`. Keys of `hfbucket.us` also begin with `hfbucket.`; they are
            distinguished from settings of `hfbucket` by the declared names and by their dot.

    Raises:
        ConfigError: Settings are invalid; the message names the instance, each setting, and the nearest known name.
    """
    values = _own_values(extra_config or {}, instance, frozenset(declared))
    return validated(InstanceSettings, values, instance, f"{KEY_ROOT}{instance}.")


def validated(model: type[_Model], values: Mapping[str, Any], instance: str, where: str) -> _Model:
    """Validate values under the names that users gave them.

    Args:
        model: `InstanceSettings`, or a model with more settings.
        values: Values by setting.
        instance: Name of the instance, for errors.
        where: Text before a setting's name where the user wrote it.

    Raises:
        ConfigError: Settings are invalid; the message names the instance, each setting, and the nearest known name.
    """
    rule_violations = _unknown(model, values, where)
    known = {name: value for name, value in values.items() if name in model.model_fields}
    try:
        settings = model.model_validate(known)
    except ValidationError as error:
        rule_violations += _words(error, model, values, instance, where)
    else:
        if not rule_violations:
            return settings
    # Raised outside the handler, because the chained cause would print the values, which may include a token.
    raise ConfigError(hide_tokens(f"instance {instance!r}: {'; '.join(rule_violations)}"))


def _own_values(extra_config: Mapping[Any, Any], instance: str, declared: frozenset[str]) -> dict[str, Any]:
    head = f"{KEY_ROOT}{instance}."
    values: dict[str, Any] = {}
    for key, value in extra_config.items():
        if not isinstance(key, str) or not key.startswith(head):
            continue
        setting = key[len(head) :]
        if setting in _LOADER_KEYS or _belongs_to_another(setting, instance, declared):
            continue
        values[setting] = value
    return values


def _belongs_to_another(setting: str, instance: str, declared: frozenset[str]) -> bool:
    """Return whether `<instance>.<setting>` belongs to an instance with a longer name, declared or commented out."""
    qualifier, dot, last = setting.rpartition(".")
    if not dot:
        return False
    names = {".".join([instance, *qualifier.split(".")[: n + 1]]) for n in range(qualifier.count(".") + 1)}
    return bool(names & declared) or last in InstanceSettings.model_fields or last in _LOADER_KEYS


def _unknown(model: type[BaseModel], values: Mapping[str, Any], where: str) -> list[str]:
    known = list(model.model_fields)
    rule_violations = []
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            shown = name if close or _PLAIN_NAME.fullmatch(name) else "***"  # it may be a misplaced token
            rule_violations.append(f"unknown setting {where}{shown}{texts.did_you_mean(name, known)}")
    return rule_violations


def _words(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], instance: str, where: str
) -> list[str]:
    """Return the errors as text without the values, which may include a token."""
    rule_violations = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        setting = ".".join(str(part) for part in item["loc"])
        name = f"{where}{setting}" if setting else instance
        if setting == "endpoint" and setting not in values:
            name = "the environment variable HF_ENDPOINT"
        message = "is required" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
        rule_violations.append(f"{name}: {message}{_bounds(model, setting)}")
    return rule_violations


def _bounds(model: type[BaseModel], setting: str) -> str:
    """Return the bounds of a number as text; empty if the setting is unknown or not a number."""
    field = model.model_fields.get(setting)
    if field is None:
        return ""
    limits: dict[str, float] = {}
    for found in _all_metadata(field.annotation, field.metadata):
        for part in getattr(found, "metadata", None) or [found]:  # a `Field` inside a union keeps them together
            for name, tighter in (("gt", max), ("ge", max), ("le", min)):
                bound = getattr(part, name, None)
                if isinstance(bound, (int, float)):
                    limits[name] = tighter(limits.get(name, bound), bound)
    if limits.get("ge", 0) > limits.get("gt", 0):  # the stronger bound
        limits.pop("gt", None)
    shown = [f"{words} {limits[name]:,}" for name, words in _BOUNDS.items() if name in limits]
    return f" (allowed: {', '.join(shown)})" if shown else ""


def _all_metadata(annotation: Any, metadata: Iterable[Any]) -> Iterator[Any]:
    """Yield the annotations of a type, also inside `X | None`."""
    yield from metadata
    for inner in getattr(annotation, "__args__", ()):
        yield from getattr(inner, "__metadata__", ())
