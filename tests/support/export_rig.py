"""Two bucket instances, `hfbucket.us` and `hfbucket.eu`, and the exports between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from typer.testing import CliRunner

from hfbucket_plugin.core.keys import encode_name
from jobs.cli.app import app
from tests.support.depot import ROOT, Depot, Ran, ended
from tests.support.plugin_support import SECRET

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from localhub.process import RunningHub

US, EU = "hfbucket.us", "hfbucket.eu"
__all__ = ["ExportRig", "ended", "names"]

DATA_ROUTES = ("xorb-upload", "shard-upload", "reconstruction", "xorb-data", "file-data")
"""Whatever carries data, or says where it is."""


@dataclass
class ExportRig:
    """The two instances.

    Attributes:
        us: The bucket of one, with things that are done to it.
        eu: The bucket of the other.
        tokens: What each instance's token is called, and is.
    """

    hub: RunningHub
    directory: Path
    us: Depot
    eu: Depot
    tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def on(cls, hub: RunningHub, directory: Path, us: str, eu: str) -> ExportRig:
        own = {}
        for name, bucket in (("us", us), ("eu", eu)):
            (directory / name).mkdir()
            own[name] = Depot(hub, bucket, directory / name, prefix=f"kv/{name}")
        return cls(hub, directory, own["us"], own["eu"])

    @property
    def config(self) -> Path:
        extra = {}
        for name, depot in ((US, self.us), (EU, self.eu)):
            values = {
                "bucket_handle": f"hf://buckets/{depot.bucket_id}/{depot.prefix}",
                "endpoint": self.hub.endpoint,
                "token_env": f"JOBS_TEST_{name[-2:].upper()}",
            } | depot.settings
            extra |= {f"remote_storage_plugin.{name}.{key}": value for key, value in values.items()}
        path = self.directory / "rig.yaml"
        path.write_text(json.dumps({"remote_storage_plugins": [US, EU], "extra_config": extra}), encoding="utf-8")
        return path

    def arguments(self, *more: str, source: str = US, to: str = EU) -> list[str]:
        return ["export", "--lmcache-config", str(self.config), "--from", source, "--to", to, *more]

    def export(self, *more: str, source: str = US, to: str = EU) -> Ran:
        return self.command(self.arguments(*more, source=source, to=to))

    def apply(self, plan: str, *more: str) -> Ran:
        return self.command(["apply", plan, *more])

    @staticmethod
    def command(arguments: list[str]) -> Ran:
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert SECRET not in done.output
        return Ran(done.exit_code, done.stdout, done.stderr)

    def started(self, *more: str, source: str = US, to: str = EU) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", *self.arguments(*more, source=source, to=to)],
            env=environment | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TMPDIR": str(self.directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def listing(self, depot: Depot) -> dict[str, tuple[str, int]]:
        """Name → hash and size of what an instance holds, by huggingface_hub, but for records of ours."""
        api = HfApi(endpoint=self.hub.endpoint, token=self.tokens.get("admin", False))
        head = f"{depot.prefix}/"
        return {
            item.path.removeprefix(head): (item.xet_hash, item.size)
            for item in api.list_bucket_tree(depot.bucket_id, recursive=True)
            if item.type == "file" and item.path.startswith(head) and "/.hfbucket/" not in item.path
        }

    def data_requests(self) -> dict[str, int]:
        """Requests of clients that carried data, by route, since the counters were reset."""
        routes = self.hub.control.counters().routes
        return {name: routes[name].requests for name in DATA_ROUTES if name in routes}


def names(keys: Iterable[str]) -> set[str]:
    return {encode_name(one) for one in keys}
