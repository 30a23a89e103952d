"""Resolution of `--from` and `--to`: an instance of the configuration, or a directory, whose path contains a slash."""

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
    """Endpoint that an option names.

    Attributes:
        named: The instance; None for a directory.
        directory: The directory; None for an instance.
    """

    named: InstanceConfig | None = None
    directory: Path | None = None

    @property
    def place(self) -> EndpointRef:
        """Reference to the endpoint in plans and reports."""
        if self.named is None:
            return EndpointRef(None, str(self.directory))
        settings = self.named.settings
        return EndpointRef(self.named.name, str(settings.bucket_handle), settings.endpoint)

    def source(self, *, believe_files: bool) -> SourceEndpoint:
        """Open the endpoint to copy from it.

        Args:
            believe_files: Whether to import files of a directory that no manifest lists.

        Raises:
            ConfigError: If the directory does not exist.
        """
        if self.named is not None:
            return InstanceEnd(self.named.name, self.named.settings)
        return DirectorySource(self.directory or Path(), believe_files=believe_files)

    def destination(self) -> DestinationEndpoint:
        """Open the endpoint to copy to it."""
        if self.named is not None:
            settings = self.named.settings
            return InstanceEnd(self.named.name, settings, may_be_missing=settings.create_bucket_if_missing)
        return DirectoryDestination(self.directory or Path())


def endpoint(text: str, option: str, config: Path | None, l2_adapters: Sequence[str]) -> EndpointSpec:
    """Resolve the value of an option to an endpoint.

    Args:
        text: Value of the option.
        option: Name of the option, for errors.
        config: Path of the LMCache YAML, if any.
        l2_adapters: JSON of MP adapters.

    Raises:
        ConfigError: If the value names neither an instance nor a directory.
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
        endpoints: Source and destination.
        renames: Rename rules of the copies.
        without_manifest: Whether to import a directory without a manifest.

    Raises:
        ConfigError: If both are the same, or `without_manifest` is set for a source that is not a directory.
        RefusedError: If the role of the destination does not write.
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
