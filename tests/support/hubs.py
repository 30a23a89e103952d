"""Hubs for tests.

`hf_xet` remembers, under `HF_HOME`, which xorbs it uploaded to which endpoint, and does not upload them again. A Hub
with an empty root at an address that this session used before would therefore refuse later uploads. So one Hub lives
as long as the session, tests on it take a fresh bucket each, and no other Hub is ever given a port that was used.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localhub.process import RunningHub, start

HubFactory = Callable[..., RunningHub]

_used_ports: set[int] = set()
_bucket_numbers = itertools.count(1)


def start_on_fresh_port(root: Path, **options: object) -> RunningHub:
    """Start a Hub whose address no client of this session has met."""
    while True:
        running = start(root, **options)  # type: ignore[arg-type]
        if running.port not in _used_ports:
            _used_ports.add(running.port)
            return running
        running.stop()


@pytest.fixture(scope="session")
def session_hub() -> Iterator[RunningHub]:
    """The Hub of the whole session, with faults and without access control."""
    root = Path(tempfile.mkdtemp(prefix="localhub-"))
    try:
        with start_on_fresh_port(root, faults=True) as running:
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def hub(session_hub: RunningHub) -> Iterator[RunningHub]:
    """The Hub of the session without faults and with counters at zero."""
    session_hub.control.clear_faults()
    session_hub.control.reset_counters()
    yield session_hub
    session_hub.control.clear_faults()


@pytest.fixture
def hub_factory(tmp_path: Path) -> Iterator[HubFactory]:
    """Starts Hubs with options of `localhub.process.start`; `root` is a directory below the test's own by default."""
    running: list[RunningHub] = []
    roots = itertools.count(1)

    def make(root: Path | None = None, **options: object) -> RunningHub:
        running.append(start_on_fresh_port(root or tmp_path / f"hub-{next(roots)}", **options))
        return running[-1]

    try:
        yield make
    finally:
        for one in running:
            one.stop()


@pytest.fixture
def new_bucket(hub: RunningHub) -> Callable[..., str]:
    """Makes buckets on `hub`, with options of `HfApi.create_bucket`, and returns their ids."""
    from huggingface_hub import HfApi

    def make(**options: object) -> str:
        bucket_id = f"tests/bucket-{os.getpid()}-{next(_bucket_numbers)}"
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(bucket_id, **options)
        return bucket_id

    return make


@pytest.fixture
def bucket(new_bucket: Callable[..., str]) -> str:
    """The id of a bucket on `hub` that no other test uses."""
    return new_bucket()
