"""What `--from` and `--to` name: an instance of the configuration, or a directory, which is written with a slash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfbucket_plugin.config.instances import named_instances
from hfbucket_plugin.core.keys import SCHEME
from hfbucket_plugin.errors import ConfigError, RefusedError
from jobs.export.bucket import InstanceEnd
from jobs.export.directory import DirectoryDestination, DirectorySource
from jobs.export.plan import EndpointRef, Renames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.config.instances import InstanceConfig
    from jobs.export.endpoint import DestinationEndpoint, SourceEndpoint


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """One end.

    Attributes:
        named: The instance; None for a directory.
        directory: The directory; None for an instance.
    """

    named: InstanceConfig | None = None
    directory: Path | None = None

    @property
    def place(self) -> EndpointRef:
        """As plans and reports name it."""
        if self.named is None:
            return EndpointRef(None, str(self.directory))
        settings = self.named.settings
        return EndpointRef(self.named.name, str(settings.bucket_handle), settings.endpoint)

    def source(self, *, believe_files: bool) -> SourceEndpoint:
        """Open it to copy from it.

        Args:
            believe_files: Whether files of a directory are imported that no manifest vouches for.

        Raises:
            ConfigError: There is no such directory.
        """
        if self.named is not None:
            return InstanceEnd(self.named.name, self.named.settings)
        return DirectorySource(self.directory or Path(), believe_files=believe_files)

    def destination(self) -> DestinationEndpoint:
        """Open it to copy to it."""
        if self.named is not None:
            settings = self.named.settings
            return InstanceEnd(self.named.name, settings, may_be_missing=settings.create_bucket_if_missing)
        return DirectoryDestination(self.directory or Path())


def endpoint(text: str, option: str, config: Path | None, l2_adapters: Sequence[str]) -> EndpointSpec:
    """What an option names.

    Args:
        text: Its value.
        option: Its name, for errors.
        config: The LMCache YAML; None for none.
        l2_adapters: The JSON of MP adapters.

    Raises:
        ConfigError: It names neither an instance nor a directory.
    """
    if text.startswith(SCHEME):
        raise ConfigError(
            f"{option} {text!r}: name the instance that has this bucket_handle; tokens belong to instances"
        )
    if "/" in text or text in (".", ".."):
        return EndpointSpec(directory=Path(text).absolute())
    for one in named_instances(None, (), l2_adapters) if l2_adapters else ():
        if one.name == text:
            return EndpointSpec(named=one)
    if not text or config is None:
        raise ConfigError(
            f"{option} {text!r}: names an instance of --lmcache-config FILE or the name of an --l2-adapter, or a directory "
            "with a slash, such as ./backup"
        )
    return EndpointSpec(named=named_instances(config, [text])[0])


def check_endpoints(endpoints: tuple[EndpointSpec, EndpointSpec], renames: Renames, *, without_manifest: bool) -> None:
    """Check that chunks can be copied from one endpoint to the other.

    Args:
        endpoints: Where chunks come from, and where they go.
        renames: What the copies are called.
        without_manifest: Whether a directory without a manifest is to be imported.

    Raises:
        ConfigError: Both are the same, or the source is no directory to be imported without a manifest.
        RefusedError: The role of the destination does not write.
    """
    source, destination = endpoints
    if source.place.same_as(destination.place) and not renames.rules:
        raise ConfigError(f"--from and --to are the same place: {source.place.where}")
    if destination.named is not None and not destination.named.settings.writes:
        raise RefusedError(
            f"--to {destination.place.name!r}: role is {destination.named.settings.role}, so nothing is copied there"
        )
    if without_manifest and source.directory is None:
        raise ConfigError("--without-manifest is about a directory: --from names an instance")
