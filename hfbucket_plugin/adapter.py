"""What LMCache's configuration names to be served by this package.

The two keys of an instance are `module_path: hfbucket_plugin.adapter` and `class_name: HFBucketConnectorAdapter`.

LMCache ships a backend of its own for the type `hfbucket`, and its `ConnectorManager` lets the first adapter that can
parse a URL win: built-in ones come first, and none of them sees the configuration. An external class under that name is
imported, constructed, and then silently never used. So the manager is taught one rule, here and nowhere else: *an
instance whose `module_path` and `class_name` name this adapter is served by it*. The same rule serves type names that
LMCache does not know, keeps out of the way of other plugins, and leaves to the built-in backend what is the built-in's.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

from lmcache.v1.storage_backend.connector import (
    ConnectorAdapter,
    ConnectorManager,
    extract_plugin_type,
)

from hfbucket_plugin.config import settings
from hfbucket_plugin.engine.classic import HFBucketConnector
from hfbucket_plugin.engine.health_monitor import lift_threshold
from hfbucket_plugin.errors import ConfigError, HFBucketError

if TYPE_CHECKING:
    from lmcache.v1.storage_backend.connector import ConnectorContext
    from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

_log = logging.getLogger(__name__)

PLUGIN_TYPE: Final = "hfbucket"
_SCHEME: Final = "plugin://"
_MARK: Final = "_lmcache_hfbucket_rule"


class HFBucketConnectorAdapter(ConnectorAdapter):
    """Makes connectors for bucket instances. LMCache constructs it without arguments."""

    def __init__(self) -> None:
        super().__init__(_SCHEME)
        _teach_manager()

    def can_parse(self, url: str) -> bool:
        """Whether a URL is of our own type. Other types that name us come in by the manager's rule."""
        return url.startswith(_SCHEME) and extract_plugin_type(url.removeprefix(_SCHEME)) == PLUGIN_TYPE

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """Make the connector of the instance that the context names.

        Raises:
            ConfigError: A setting is missing, unknown or impossible. LMCache logs the message and runs without the
                connector, so it is logged as an error here too, where it cannot be overlooked.
        """
        instance = _instance_name(context)
        try:
            if context.config is None or context.metadata is None:
                raise ConfigError(f"instance {instance!r}: LMCache gave no configuration or no metadata")
            own = settings.load(context.config.extra_config, instance, context.config.remote_storage_plugins or ())
            lift_threshold(context.config, lambda name: _is_ours(context.config, name))
            return HFBucketConnector(
                context.local_cpu_backend, context.config, context.metadata, settings=own, instance=instance
            )
        except HFBucketError as error:
            _log.error("%s", error)
            raise


def _instance_name(context: ConnectorContext) -> str:
    """The plugin name; in `remote_url: plugin://…` mode only the URL holds it."""
    name: str = context.plugin_name or context.url.removeprefix(_SCHEME)
    return name


def _adapter_named_by(context: ConnectorContext) -> HFBucketConnectorAdapter | None:
    """Our adapter, if the configuration names it (or a subclass of it) for this instance."""
    return _adapter_of(context.config, _instance_name(context))


def _is_ours(config: Any, instance: str) -> bool:
    return _adapter_of(config, instance) is not None


def _adapter_of(config: Any, instance: str) -> HFBucketConnectorAdapter | None:
    extra = (config.extra_config if config is not None else None) or {}
    head = f"{settings.KEY_ROOT}{instance}."
    module_path, class_name = extra.get(f"{head}module_path"), extra.get(f"{head}class_name")
    if not module_path or not class_name:
        return None
    try:
        named = getattr(importlib.import_module(module_path), class_name, None)
    except ImportError:
        return None  # LMCache has logged it when it loaded the plugins
    if isinstance(named, type) and issubclass(named, HFBucketConnectorAdapter):
        return named()
    return None


def _teach_manager() -> None:
    """Let instances that name us be served by us; once a process, whatever the order in which plugins load."""
    original = ConnectorManager.create_connector
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_connector(self: Any) -> Any:
        if str(self.context.url).startswith(_SCHEME) and (ours := _adapter_named_by(self.context)) is not None:
            return ours.create_connector(self.context)
        return original(self)

    setattr(create_connector, _MARK, True)
    ConnectorManager.create_connector = create_connector
