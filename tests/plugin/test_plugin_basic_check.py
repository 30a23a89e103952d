"""LMCache's own check of a remote backend, as an operator runs it."""

import os
import re
import subprocess
import sys

import yaml
from plugin_rig import OURS


def test_put_get_and_exists_pass_with_default_settings(hub, bucket, tmp_path):
    extra = OURS | {"bucket_handle": f"hf://buckets/{bucket}/check"}
    (tmp_path / "lmcache.yaml").write_text(
        yaml.safe_dump(
            {
                "remote_storage_plugins": ["hfbucket"],
                "remote_url": "plugin://hfbucket",
                "extra_config": {f"remote_storage_plugin.hfbucket.{name}": extra[name] for name in extra},
            }
        )
    )
    environment = os.environ | {
        "LMCACHE_CONFIG_FILE": str(tmp_path / "lmcache.yaml"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
    }

    done = subprocess.run(
        [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", "test_remote"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    rows = dict(re.findall(r"^\| ([A-Z][^|]*?) *\|.*?\| +(\d+/\d+) \| +100\.0% \|", done.stdout, re.MULTILINE))
    assert rows == {"EXISTS (non-exist)": "5/5", "PUT": "5/5", "EXISTS (exist)": "5/5", "GET": "5/5"}, done.stdout
    assert "hfbucket_plugin" not in done.stderr or "Traceback" not in done.stderr
    assert hub.control.counters().route("batch").requests >= 1, "it was our Hub that answered"
