"""Options of each command, one model per command."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path  # noqa: TC003 - pydantic evaluates the annotations
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt

from hfbucket_plugin.config.instances import named_instances
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.options import Option
from hfbucket_plugin.tools.selection import Bytes, Selection, Texts
from jobs.batch.apply import in_process
from jobs.deletion.guards import DEFAULT_PERCENT, MaxDelete
from jobs.export.plan import OnConflict
from jobs.lock.claims import LONGEST_SECONDS
from jobs.lock.lock import DEFAULT_SECONDS
from jobs.retention import policy as policies
from jobs.retention.policy import MIN_AGE, Duration

if TYPE_CHECKING:
    from hfbucket_plugin.config.instances import InstanceConfig


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("must be more than nothing")
    return value


def _no_longer_than_a_lock(value: timedelta) -> timedelta:
    if value.total_seconds() > LONGEST_SECONDS:
        raise ValueError(
            f"no lock holds for longer than {LONGEST_SECONDS}s unless it is renewed, and a run renews its own for as long as "
            "it lasts: give less, or leave the option out"
        )
    return value


def _limits(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    return MaxDelete.parse(list(texts)) if isinstance(texts, list | tuple) else value


Span = Annotated[Duration, AfterValidator(_positive)]
"""Positive duration, or a text such as `30min`."""

Limits = Annotated[MaxDelete, BeforeValidator(_limits)]
"""Limits of one run, or texts such as `5000`, `30%` and `500GiB`."""

Width = Annotated[int, Field(ge=1, le=64)]
"""Maximum number of concurrent batches."""


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def inputs(self) -> list[tuple[str, Path | None]]:
        """Return the input files with the names of their options: no output may be one of them."""
        return []


class Outputs(_Options):
    """Files that a job writes for programs."""

    report: Annotated[Path | None, Option("FILE")] = Field(
        None, description="Write a JSON line for every object, and the summary as the last line, to this file."
    )
    metrics_textfile: Annotated[Path | None, Option("FILE")] = Field(
        None, description="Write metrics for Prometheus' textfile collector to this file."
    )


class _Running(Outputs):
    """How long a job may take, and where it runs."""

    max_duration: Annotated[Span, Option("TIME")] = Field(
        timedelta(hours=1),
        description="End the command after this, all instances together; the Hub's pauses count. Default: 1h.",
    )
    lock_lifetime: Annotated[Annotated[Span, AfterValidator(_no_longer_than_a_lock)], Option("TIME", hidden=True)] = (
        Field(
            timedelta(seconds=DEFAULT_SECONDS),
            description=f"How long the lock of a killed run keeps others out: at most {LONGEST_SECONDS}s.",
        )
    )

    @property
    def lock_secs(self) -> int:
        """`lock_lifetime` in whole seconds."""
        return max(1, round(self.lock_lifetime.total_seconds()))

    def deadline(self) -> Deadline:
        """Return the deadline of a command that starts now."""
        return Deadline.after(self.max_duration.total_seconds())


class _Distributed(_Running):
    """Which machines do the work."""

    parallel: Annotated[Width, Option("N")] = Field(
        4, description="Run at most N batches of 1000 deletes at one time, 1 to 64. Default: 4."
    )
    local: bool = Field(False, description="Work in this process even if a Ray cluster is configured.")
    address: Annotated[str | None, Option("HOST:PORT")] = Field(
        None, description="The Ray cluster. Default: RAY_ADDRESS, or the cluster of the job that this is."
    )

    def runs_here(self, *, at_once: bool = False) -> bool:
        """Return whether to work in this process; see `jobs.batch.apply.in_process`.

        Raises:
            ConfigError: If the address is of an unsupported kind.
        """
        return in_process(self.address, local=self.local, at_once=at_once)


class _Adapters(_Options):
    """The configuration of engines, classic or MP."""

    lmcache_config: Annotated[Path | None, Option("FILE")] = Field(None, description="The LMCache YAML of the engines.")
    l2_adapter: Annotated[Texts, Option("JSON", many=True)] = Field(
        (), description="An adapter's JSON, as `lmcache server` takes it."
    )

    @property
    def config_name(self) -> str | None:
        """The path of the YAML as plans record it."""
        return None if self.lmcache_config is None else str(self.lmcache_config.absolute())

    def inputs(self) -> list[tuple[str, Path | None]]:
        """See `_Options.inputs`."""
        return [("--lmcache-config", self.lmcache_config)]


class DeletionOptions(_Distributed, _Adapters):
    """How objects are deleted."""

    yes: bool = Field(False, description="Delete without asking. Without it nothing is ever deleted unasked.")
    dry_run: bool = Field(False, description="Only plan, whatever other options say.")
    max_delete: Annotated[Limits, Option("LIMIT", many=True)] = Field(
        MaxDelete(percent=DEFAULT_PERCENT),
        description="Refuse a plan that deletes more: 5000 (objects), 30% (of them) or 500GiB. Default: 30%.",
    )
    foreign: Annotated[Literal["keep", "delete"], Option("keep|delete")] = Field(
        "keep", description="Whether to delete objects that are not chunks. Ours are always kept. Default: keep."
    )
    accept_shrunk: bool = Field(False, description="Believe a listing that has much less than the last run left.")
    without_heat: bool = Field(False, description="Go by when objects were put, even if reads are known.")
    batch_size: Annotated[Annotated[int, Field(ge=1, le=1000)], Option("N")] = Field(
        1000, description="Delete at most N objects in a batch, 1 to 1000. Default: 1000."
    )
    plan_dir: Annotated[Path | None, Option("DIR")] = Field(
        None, description="Keep plans in this directory. Default: temporary files."
    )

    @property
    def unasked(self) -> bool:
        """Whether to delete without asking."""
        return self.yes and not self.dry_run

    @property
    def deletes_foreign(self) -> bool:
        """Whether objects that are not chunks may be deleted."""
        return self.foreign == "delete"


class _Instances(_Adapters):
    """Which instances."""

    instance: Annotated[Texts, Option("NAME", many=True)] = Field((), description="An instance of the YAML.")

    def instances(self, *, everything: bool = False) -> tuple[list[InstanceConfig], list[InstanceConfig]]:
        """Read the configuration.

        Args:
            everything: Whether to select all instances of the YAML.

        Returns:
            The selected instances, and all that the configuration names.

        Raises:
            ConfigError: If no instance is named, or an unknown one: a deletion has no default instance.
        """
        return chosen(self.lmcache_config, self.instance, self.l2_adapter, everything=everything)


class InstanceOptions(_Instances):
    """Some instances, or all of the YAML."""

    all_instances: bool = Field(False, description="All bucket instances of the YAML.")

    def chosen(self) -> tuple[list[InstanceConfig], list[InstanceConfig]]:
        """See `instances`."""
        return self.instances(everything=self.all_instances)


class _PolicyOptions(_Options):
    """A policy: a file, or options that say the same for all instances."""

    policy: Annotated[Path | None, Option("FILE")] = Field(
        None, description="retention.yaml: a policy for each instance."
    )
    max_age: Annotated[Duration | None, Option("AGE")] = Field(
        None, description="Delete objects that the Hub received longer ago, such as 14d."
    )
    max_idle: Annotated[Duration | None, Option("AGE")] = Field(
        None, description="Delete objects that were neither put nor read for longer, such as 30d."
    )
    max_bytes: Annotated[Bytes | None, Option("SIZE")] = Field(
        None, description="Keep at most this many bytes, such as 2TiB; delete the least recently used first."
    )
    max_objects: Annotated[PositiveInt | None, Option("N")] = Field(
        None, description="Keep at most N objects; delete the least recently used first."
    )
    keep_newest: Annotated[NonNegativeInt | None, Option("N")] = Field(
        None, description="Keep the N objects that were put last, whatever other options say."
    )
    keep_prefix: Annotated[Texts, Option("TEXT", many=True)] = Field((), description="Keep keys that start with this.")
    keep_model: Annotated[Texts, Option("NAME", many=True)] = Field(
        (), description="Delete all models but those named."
    )
    min_age: Annotated[Duration | None, Option("AGE")] = Field(
        None, description="Never delete anything younger. Default: 1h."
    )
    without_heat: bool = Field(False, description="Go by when objects were put, even if reads are known.")

    @property
    def has_policy(self) -> bool:
        """Whether there is a policy at all."""
        return self.policy is not None or bool(self._limits())

    def policy_of(self, instance: str) -> policies.Policy:
        """Return the policy of an instance.

        Raises:
            ConfigError: If there is no policy, there are two, or it is invalid.
        """
        limits = self._limits()
        if self.policy is None:
            if not limits:
                raise ConfigError("name what to keep: --policy FILE, or flags such as --max-age 14d")
            return policies.from_values(limits, "flags")
        if limits:
            raise ConfigError(f"give --policy FILE or flags ({', '.join(limits)}), not both")
        return policies.read(self.policy, instance)

    def _limits(self) -> dict[str, Any]:
        names = ("max_age", "max_idle", "max_bytes", "max_objects", "keep_newest", "min_age")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.keep_prefix:
            values["keep_prefix"] = self.keep_prefix
        return values | ({"models": {"keep": self.keep_model}} if self.keep_model else {})


class CleanupOptions(DeletionOptions, _PolicyOptions, InstanceOptions):
    """A cleanup: delete what the policy of an instance does not keep."""

    def inputs(self) -> list[tuple[str, Path | None]]:
        """See `_Options.inputs`."""
        return [*super().inputs(), ("--policy", self.policy)]


class RemoveOptions(DeletionOptions, _Instances):
    """Delete keys by name."""

    prefix: Annotated[tuple[str, ...], Option("TEXT", many=True)] = Field(
        (), description="Delete keys that start with this."
    )
    key_file: Annotated[Path | None, Option("FILE")] = Field(None, description="A file with one key a line.")
    min_age: Annotated[Duration, Option("AGE")] = Field(
        MIN_AGE, description="Never delete anything younger. Default: 1h."
    )

    def inputs(self) -> list[tuple[str, Path | None]]:
        """See `_Options.inputs`."""
        return [*super().inputs(), ("--key-file", self.key_file)]


class ApplyOptions(DeletionOptions):
    """Carry out a plan that was made before."""

    max_delete: Annotated[Limits, Option("LIMIT", many=True)] = Field(
        MaxDelete(), description="As for cleanup, beside the limits of the plan."
    )
    min_age: Annotated[Duration | None, Option("AGE")] = Field(
        None, description="Delete nothing younger, nor anything younger than the plan allows."
    )
    foreign: Annotated[Literal["keep", "delete"], Option("keep|delete")] = Field(
        "keep", description="delete: allow objects that are not chunks in a plan that was not made with it."
    )


class ExportOptions(_Distributed, _Adapters):
    """Copy chunks from one instance or directory to another."""

    source: Annotated[str, Option("NAME|DIR/", name="--from")] = Field(
        description="An instance, or a directory, which has a slash in it."
    )
    destination: Annotated[str, Option("NAME|DIR/", name="--to")] = Field(
        description="Where chunks go: an instance or a directory."
    )
    selection: Selection = Field(default_factory=lambda: Selection.model_validate({}))
    mode: Annotated[Literal["auto", "copy", "stream"], Option("auto|copy|stream")] = Field(
        "auto",
        description="copy: the Hub copies by hash, no bytes move. stream: bytes go through here. auto: what the Hub permits. "
        "Default: auto.",
    )
    on_conflict: Annotated[OnConflict, Option("skip|newer|overwrite")] = Field(
        OnConflict.SKIP,
        description="What to do with a chunk under whose key the destination has something else; it is reported in any case. "
        "Default: skip.",
    )
    rename: Annotated[Texts, Option("OLD=NEW", many=True)] = Field(
        (), description="Rewrite the start of keys: old-model@=new-model@."
    )
    mirror: bool = Field(
        False,
        description="Then delete selected chunks that the source does not have, with the safety checks of cleanup.",
    )
    without_manifest: bool = Field(False, description="Import files of a directory that no manifest lists.")
    yes: bool = Field(False, description="Replace and delete without asking. Adding needs no confirmation.")
    dry_run: bool = Field(False, description="Only plan, whatever other options say.")
    max_delete: Annotated[Limits, Option("LIMIT", many=True)] = Field(
        MaxDelete(percent=DEFAULT_PERCENT),
        description="Refuse a mirror that deletes more: 5000 (objects), 30% (of them) or 500GiB. Default: 30%.",
    )
    min_age: Annotated[Duration, Option("AGE")] = Field(
        MIN_AGE, description="Never delete anything younger. Default: 1h."
    )
    parallel: Annotated[Width, Option("N")] = Field(
        4, description="Run at most N batches at one time, 1 to 64. Default: 4."
    )
    window: Annotated[Bytes, Option("SIZE")] = Field(
        512 * 1024 * 1024, description="Most memory for chunks in transfer. Default: 512MiB."
    )
    accept_shrunk: bool = Field(False, description="Believe a listing that has much less than the last run left.")
    plan_dir: Annotated[Path | None, Option("DIR")] = Field(
        None, description="Keep plans in this directory. Default: temporary files."
    )
    local: bool = Field(False, description="Send bytes through this process even if a Ray cluster is configured.")

    def inputs(self) -> list[tuple[str, Path | None]]:
        """See `_Options.inputs`."""
        keys: list[tuple[str, Path | None]] = [("--keys-from", path) for path in self.selection.keys_from]
        return [*super().inputs(), ("--prompts", self.selection.prompts), *keys]

    def deletion(self) -> DeletionOptions:
        """Return the options of a mirror's deletion at the destination."""
        shared = DeletionOptions.model_fields.keys() & (ExportOptions.model_fields.keys() - {"parallel"})
        return DeletionOptions.model_construct(**{name: getattr(self, name) for name in shared})


class IndexOptions(_Running, InstanceOptions):
    """Build the key index of instances."""

    full: bool = Field(False, description="Build from a listing, due or not; also if the pointer cannot be read.")
    full_every: Annotated[Span, Option("TIME")] = Field(
        timedelta(hours=24), description="Build from a listing when the last one is older than this. Default: 24h."
    )
    verify: bool = Field(False, description="Only compare the index with a listing; exit 3 if they differ.")
    keep: Annotated[PositiveInt, Option("N")] = Field(
        2, description="Keep N snapshots, the present one included. Default: 2."
    )
    grace: Annotated[Duration, Option("TIME")] = Field(
        timedelta(hours=1), description="Delete no old snapshot or journal that is younger. Default: 1h."
    )
    dry_run: bool = Field(False, description="Build the snapshot, and write nothing.")
    accept_shrunk: bool = Field(False, description="Believe a listing that is empty or has much less than there was.")
    temp_dir: Annotated[Path | None, Option("DIR", name="--tmp-dir")] = Field(
        None, description="Where snapshots are put together. Default: a temporary directory."
    )


class StatusOptions(_PolicyOptions, InstanceOptions):
    """Report what instances hold."""

    max_delete: Annotated[Limits, Option("LIMIT", many=True)] = Field(
        MaxDelete(percent=DEFAULT_PERCENT),
        description="The limits of the next cleanup: 5000 (objects), 30% (of them) or 500GiB. Default: 30%.",
    )


def chosen(
    config: Path | None, instances: tuple[str, ...], l2_adapters: tuple[str, ...], *, everything: bool
) -> tuple[list[InstanceConfig], list[InstanceConfig]]:
    """Return the instances that options select, and all that the configuration names.

    Raises:
        ConfigError: If no instance is named, or an unknown one: a deletion has no default instance.
    """
    if config is not None and not instances and not everything:
        raise ConfigError("name the instances: --instance NAME, or --all-instances")
    if instances and everything:
        raise ConfigError("give --instance or --all-instances, not both")
    if everything and config is None:
        raise ConfigError("--all-instances means those of an LMCache YAML: give --lmcache-config FILE with it")
    named = named_instances(config, instances, l2_adapters)
    handles = [one.settings.bucket_handle for one in named]
    if len(set(handles)) < len(handles):
        raise ConfigError("two of the instances are the same place in the same bucket: name it once")
    return named, [*named, *(named_instances(config) if config is not None else [])]
