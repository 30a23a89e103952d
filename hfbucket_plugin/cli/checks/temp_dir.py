"""Whether temporary files can be written where `verify: hash` needs them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, error, ok
from hfbucket_plugin.cli.words import size
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.scratch import Scratch

if TYPE_CHECKING:
    from hfbucket_plugin.named import NamedInstance

NAME: Final = "temp dir"


def check(named: NamedInstance) -> Finding:
    """Write a file there, and remove it."""
    settings = named.settings
    if settings.verify != "hash":
        return ok(NAME, f"not needed: verify is {settings.verify}")
    scratch = Scratch(settings.download_tmp_dir)
    try:
        with scratch.file() as path:
            path.write_bytes(b"doctor")
            free = shutil.disk_usage(path).free
    except (ConfigError, OSError) as caught:
        advice = (
            f"name another directory with {named.setting('download_tmp_dir')}, or set {named.setting('verify')} to size"
        )
        return error(NAME, f"every get is a miss with verify: hash: {caught}", advice)
    finally:
        scratch.close()
    return ok(NAME, f"{settings.download_tmp_dir} can be written, {size(free)} free")
