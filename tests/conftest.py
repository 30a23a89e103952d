"""What holds for every test: an environment in which nothing calls home or reads this user's settings."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

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

DOCS = Path(__file__).parent / "docs"

__all__ = ["bucket", "hub", "hub_factory", "new_bucket", "session_hub"]

# How long an example takes is no matter of any test's.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_known_tokens(monkeypatch):
    """What one test gave as a token is an ordinary word in the texts of the next."""
    if (texts := sys.modules.get("hfbucket_plugin.core.texts")) is not None:
        monkeypatch.setattr(texts, "_known", {})


def pytest_collection_modifyitems(items):
    """Mark tests by what they use, keep together what shares something, and begin with what takes longest."""
    for item in items:
        if "cluster" in item.fixturenames:
            item.add_marker("cluster")
            item.add_marker(pytest.mark.xdist_group("the shared cluster"))
        elif item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group("clusters of their own"))
        elif _shares_with_its_module(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if DOCS in item.path.parents:
            item.add_marker("docs")
    items.sort(key=_turn)


def _shares_with_its_module(item):
    """Whether a test has a fixture that is made once for its module, which workers would make each."""
    definitions = (found[-1] for found in item._fixtureinfo.name2fixturedefs.values())
    return any(one.scope == "module" for one in definitions)


def _turn(item):
    kinds = ("cluster", "engine", "slow")
    return next((turn for turn, kind in enumerate(kinds) if item.get_closest_marker(kind)), len(kinds))
