"""Both engine surfaces over one bucket, for the tests that both pass."""

import itertools

import pytest

from hfbucket_plugin.core import texts

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def tokens_of_other_tests(monkeypatch):
    """A test's token, such as `first`, is cut from no text of another test."""
    monkeypatch.setattr(texts, "_known", {})


@pytest.fixture(scope="module")
def loop():
    """An engine's event loop."""
    from tests.support.lmcache_classic import running_loop

    with running_loop() as one:
        yield one


@pytest.fixture(params=["classic", "mp"])
def surfaces(request, hub, bucket, tmp_path, loop):
    """Makes surfaces of one kind over one bucket."""
    from tests.support.lmcache_classic import Classic
    from tests.support.lmcache_mp import MP
    from tests.support.surface import PREFIX, Limits

    patient = Limits(lookup=20, get=20, put=30)
    made = []

    def make(limits=patient, **values):
        handle = f"hf://buckets/{bucket}/{PREFIX}"
        number = next(_numbers)
        common = {"handle": handle, "endpoint": hub.endpoint, "limits": limits, "metadata_cache_ttl_secs": 0} | values
        directory = tmp_path / str(number)
        directory.mkdir()
        if request.param == "classic":
            made.append(Classic(f"hfbucket.c{number}", loop, directory, **common))
        else:
            made.append(MP(f"hfbucket.m{number}", directory, **common))
        return made[-1]

    yield make
    hub.control.clear_faults()
    for one in made:
        one.close()


@pytest.fixture
def l2_adapters(hub, bucket, tmp_path):
    """Makes L2 adapters over the bucket of the test, below `v1`."""
    from tests.support.lmcache_mp import MP
    from tests.support.surface import Limits

    patient = Limits(lookup=20, get=20, put=30)
    made = []

    def make(limits=patient, handle=f"hf://buckets/{bucket}/v1", endpoint=hub.endpoint, **values):
        name = f"hfbucket.l{next(_numbers)}"
        values = {"metadata_cache_ttl_secs": 0} | values
        made.append(MP(name, tmp_path, handle=handle, endpoint=endpoint, limits=limits, **values))
        return made[-1]

    yield make
    hub.control.clear_faults()
    for one in made:
        one.close()
