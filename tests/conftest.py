"""What holds for every test: an environment in which nothing calls home or reads this user's settings."""

import atexit
import os
import shutil
import sys
import tempfile

# Before huggingface_hub, hf_xet and lmcache are imported: they read these once.
_home = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_XET_CACHE", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=_home,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    LMCACHE_TRACK_USAGE="false",
    DO_NOT_TRACK="1",
)

import pytest  # noqa: E402 - after the environment
from hypothesis import settings  # noqa: E402 - the same

from tests.support.hubs import bucket, hub, hub_factory, new_bucket, session_hub  # noqa: E402 - after the environment

__all__ = ["bucket", "hub", "hub_factory", "new_bucket", "session_hub"]

# How long an example takes is no matter of any test's.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_known_tokens(monkeypatch):
    """What one test gave as a token is an ordinary word in the texts of the next."""
    if (texts := sys.modules.get("hfbucket_plugin.core.texts")) is not None:
        monkeypatch.setattr(texts, "_known", {})
