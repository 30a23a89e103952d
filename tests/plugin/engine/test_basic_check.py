"""LMCache's own checks of a remote backend and of an L2 adapter, as an operator runs them."""

import json
import os
import re
import subprocess
import sys

import yaml

from tests.support.buckets import paths
from tests.support.lmcache_classic import OURS


def rows_of(mode, *options, env, cwd):
    """The rows in which everything passed."""
    done = subprocess.run(
        [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", mode, *options],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "hfbucket_plugin" not in done.stderr or "Traceback" not in done.stderr
    return dict(re.findall(r"^\| ([A-Z][^|]*?) *\|.*?\| +(\d+/\d+) \| +100\.0% \|", done.stdout, re.MULTILINE))


def test_put_get_and_exists_pass_with_default_settings(hub, bucket, tmp_path):
    extra = OURS | {"bucket_handle": f"hf://buckets/{bucket}/check"}
    (tmp_path / "lmcache.yaml").write_text(
        yaml.safe_dump(
            {
                "remote_storage_plugins": ["hfbucket"],
                "remote_url": "plugin://hfbucket",
                "max_local_cpu_size": 0.5,  # GiB; all of it is written at the start
                "extra_config": {f"remote_storage_plugin.hfbucket.{name}": extra[name] for name in extra},
            }
        )
    )
    environment = os.environ | {
        "LMCACHE_CONFIG_FILE": str(tmp_path / "lmcache.yaml"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
    }

    assert rows_of("test_remote", env=environment, cwd=tmp_path) == {
        "EXISTS (non-exist)": "5/5",
        "PUT": "5/5",
        "EXISTS (exist)": "5/5",
        "GET": "5/5",
    }
    assert hub.control.counters().route("batch").requests >= 1, "it was our Hub that answered"


def test_an_l2_adapter_passes_in_every_row(hub, bucket, tmp_path):
    spec = {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {"bucket_handle": f"hf://buckets/{bucket}/check", "endpoint": hub.endpoint},
    }
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}

    assert rows_of(
        "test_l2_adapter", "--obj-size", "12345", "--l2-adapter", json.dumps(spec), env=environment, cwd=tmp_path
    ) == {"LOOKUP (absent)": "5/5", "STORE": "5/5", "LOOKUP (exist)": "5/5", "LOAD": "5/5"}
    assert len(paths(hub.endpoint, bucket)) == 5
