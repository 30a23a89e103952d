"""The options that the commands share, and what they name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.core.units import format_duration, parse_duration
from hfbucket_plugin.errors import ConfigError
from jobs.lock.claims import LONGEST_SECONDS
from jobs.lock.lock import DEFAULT_SECONDS
from jobs.retention import policy

if TYPE_CHECKING:
    from collections.abc import Sequence

LMCacheConfig = Annotated[Path | None, typer.Option(metavar="FILE", help="The LMCache YAML of the engines.")]
Instances = Annotated[
    list[str] | None, typer.Option("--instance", metavar="NAME", help="An instance of the YAML. Repeatable.")
]
AllInstances = Annotated[bool, typer.Option("--all-instances", help="All bucket instances of the YAML.")]
L2Adapters = Annotated[
    list[str] | None,
    typer.Option("--l2-adapter", metavar="JSON", help="An adapter, as lmcache server takes it. Repeatable."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Delete without asking. Without it nothing is ever deleted unasked.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only plan, whatever else is said.")]
MaxDelete = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIMIT",
        help="Refuse a plan that deletes more: 5000 (objects), 30% (of them) or 500GiB. Repeatable. Default: 30%.",
    ),
]
Foreign = Annotated[
    str, typer.Option(metavar="keep|delete", help="What becomes of objects that are no chunks. Ours are always kept.")
]
ForeignAgain = Annotated[
    str,
    typer.Option(
        "--foreign",
        metavar="keep|delete",
        help="delete: allow objects that are not chunks in a plan that was not made with it.",
    ),
]
AcceptShrunk = Annotated[
    bool, typer.Option("--accept-shrunk", help="Believe a listing that lacks much of what there was.")
]
MaxDuration = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="End the command after this, all instances together; the Hub's pauses are waited out within it.",
    ),
]
Parallel = Annotated[int, typer.Option(min=1, max=64, help="Most batches of 1000 deletes at one time.")]
BatchSize = Annotated[int, typer.Option(min=1, max=1000, help="Most objects of a batch.")]
LockLifetime = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help=f"How long the lock of a killed run keeps others out: at most {LONGEST_SECONDS}s.",
        hidden=True,
    ),
]
PlanDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep plans here. Default: temporary files.")]
TempDirOption = Annotated[
    Path | None,
    typer.Option(
        "--tmp-dir", metavar="DIR", help="Put snapshots together here: 200 bytes of disk a key. Default: TMPDIR."
    ),
]
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a JSON line for every object, and summaries.")]
MetricsFile = Annotated[
    Path | None, typer.Option("--metrics-textfile", metavar="FILE", help="For Prometheus' textfile collector.")
]
HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page for people too, with plots; it loads nothing."),
]
Local = Annotated[bool, typer.Option("--local", help="Delete in this process, whatever Ray cluster is configured.")]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="The Ray cluster. Default: RAY_ADDRESS, or that of the job.")
]
MinAge = Annotated[str, typer.Option(metavar="AGE", help="Nothing younger is ever deleted.")]
OwnMinAge = Annotated[
    str | None, typer.Option("--min-age", metavar="AGE", help="Nothing younger is ever deleted. Default: 1h.")
]
StricterMaxDelete = Annotated[
    list[str] | None,
    typer.Option("--max-delete", metavar="LIMIT", help="As of cleanup, beside the limits of the plan. Repeatable."),
]
StricterMinAge = Annotated[
    str | None, typer.Option("--min-age", metavar="AGE", help="Nothing younger is deleted, nor than the plan allows.")
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", metavar="FILE", help="retention.yaml: a policy for each instance.")
]
MaxAge = Annotated[str | None, typer.Option(metavar="AGE", help="Delete what is older, such as 14d.")]
MaxIdle = Annotated[
    str | None, typer.Option(metavar="AGE", help="Delete what was neither put nor read for longer, such as 30d.")
]
MaxBytes = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Delete beyond it what is longest unused, such as 2TiB.")
]
MaxObjects = Annotated[int | None, typer.Option(metavar="N", help="Delete beyond so many what is longest unused.")]
KeepNewest = Annotated[
    int | None, typer.Option(metavar="N", help="Keep the N that were put last, whatever else is said.")
]
WithoutHeat = Annotated[
    bool, typer.Option("--without-heat", help="Go by when objects were put, whatever is known of reads.")
]
KeepPrefix = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Keep keys that start with this. Repeatable.")
]
KeepModel = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Delete all models but those named. Repeatable.")
]

DEFAULT_DURATION = "1h"
DEFAULT_MIN_AGE = format_duration(policy.MIN_AGE)
DEFAULT_LOCK = f"{DEFAULT_SECONDS}s"


@dataclass(frozen=True, slots=True)
class PolicyFlags:
    """A policy as flags give it."""

    file: Path | None
    values: dict[str, Any]

    @property
    def given(self) -> bool:
        """Whether there is one at all."""
        return self.file is not None or bool(self.values)

    def of(self, instance: str) -> policy.Policy:
        """The policy of an instance.

        Raises:
            ConfigError: There is none, there are two, or it is wrong.
        """
        if self.file is None:
            if not self.values:
                raise ConfigError("name what to keep: --policy FILE, or flags such as --max-age 14d")
            return policy.from_values(self.values, "flags")
        if self.values:
            raise ConfigError(f"give --policy FILE or flags ({', '.join(self.values)}), not both")
        return policy.read(self.file, instance)


def policy_flags(  # noqa: PLR0917 - as many as there are
    file: Path | None,
    max_age: str | None,
    max_idle: str | None,
    max_bytes: str | None,
    max_objects: int | None,
    keep_newest: int | None,
    keep_prefix: list[str] | None,
    keep_model: list[str] | None,
    min_age: str | None,
) -> PolicyFlags:
    """The policy that flags and a file give together."""
    values = {
        "max_age": max_age,
        "max_idle": max_idle,
        "max_bytes": max_bytes,
        "max_objects": max_objects,
        "keep_newest": keep_newest,
        "keep_prefix": keep_prefix or None,
        "models": {"keep": keep_model} if keep_model else None,
        "min_age": min_age,
    }
    return PolicyFlags(file, {name: value for name, value in values.items() if value is not None})


def chosen(
    config: Path | None, instances: Sequence[str] | None, l2_adapters: Sequence[str] | None, *, everything: bool
) -> tuple[list[InstanceConfig], list[InstanceConfig]]:
    """The instances that the options name, and all that the configuration names.

    Raises:
        ConfigError: None are named, or wrong ones: what deletes goes by no default.
    """
    if config is not None and not instances and not everything:
        raise ConfigError("name the instances: --instance NAME, or --all-instances")
    if instances and everything:
        raise ConfigError("give --instance or --all-instances, not both")
    if everything and config is None:
        raise ConfigError("--all-instances means those of an LMCache YAML: give --lmcache-config FILE with it")
    named = named_instances(config, instances or (), l2_adapters or ())
    handles = [one.settings.bucket_handle for one in named]
    if len(set(handles)) < len(handles):
        raise ConfigError("two of the instances are the same place in the same bucket: name it once")
    return named, [*named, *(named_instances(config) if config is not None else [])]


def seconds(text: str, option: str) -> float:
    """Seconds of an option.

    Raises:
        ConfigError: It is no duration, or none at all.
    """
    try:
        length = parse_duration(text).total_seconds()
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}") from None
    if not math.isfinite(length) or length <= 0:
        raise ConfigError(f"{option} {text!r}: must be more than nothing")
    return length


def lock_seconds(text: str) -> int:
    """The value of `--lock-lifetime`: whole seconds.

    Raises:
        ConfigError: It is no duration, none at all, or a longer one than any lock holds.
    """
    length = seconds(text, "--lock-lifetime")
    if length > LONGEST_SECONDS:
        raise ConfigError(
            f"--lock-lifetime {text!r}: no lock holds for longer than {LONGEST_SECONDS}s unless it is renewed, and a run renews "
            "its own for as long as it lasts: give less, or leave the option out"
        )
    return max(1, round(length))


def age(text: str) -> timedelta:
    """The value of `--min-age`.

    Raises:
        ConfigError: It is no duration.
    """
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--min-age {text!r}: {error}") from None


def foreign(text: str) -> bool:
    """Whether objects that are no chunks may be deleted.

    Raises:
        ConfigError: Neither `keep` nor `delete`.
    """
    if text not in ("keep", "delete"):
        raise ConfigError(f"--foreign {text!r}: must be keep or delete")
    return text == "delete"


def now() -> datetime:
    """The local clock: what `--since` counts back from where no Hub says what time it is there."""
    return datetime.now(UTC)
