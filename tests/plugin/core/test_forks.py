"""What a forked child finds: no lock of its parent's, and nothing that waits for a thread of its parent's."""

import os

from hfbucket_plugin.hub import client as connections
from tests.support.waiting import run_script

FORK = """
import os, sys, threading, time
from types import SimpleNamespace
from tests.support.buckets import instance_settings
from tests.support.waiting import eventually
from hfbucket_plugin.store.chunk_store import ChunkStore
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.fingerprint.model import Fingerprint
from hfbucket_plugin.fingerprint.watch import FingerprintWatch
from hfbucket_plugin.core.telemetry import MemorySink

endpoint, bucket, directory = sys.argv[1:]
settings = instance_settings(
    endpoint, bucket, "kv", download_tmp_dir=directory, index="snapshot", fingerprint="enforce", fingerprint_refresh_secs=3600
)
store = ChunkStore(settings, "x", MemorySink(), 9)
index = store.index
watch = FingerprintWatch(store.bucket, settings, "x", store.breakers, MemorySink())
subject = watch.add("org/model", lambda: Fingerprint(mode="classic", model="org/model", world_size=1, dtype="half"))
known = watch._known["org/model"]
eventually(lambda: not known.busy)
store._temp_dir.directory()

known.busy, known.next_at = True, float("inf")  # a thread of the watch looks
locks = [watch._lock, index._refreshing, index._flushing, index._recent._lock, index._journal._lock, index._starting._lock,
         store._temp_dir._lock._lock, index._journal_due._cond]
for lock in locks:
    lock.acquire()  # as another thread of the parent may at any moment
child = os.fork()
if child == 0:
    index.wrote("org/model@1@0@ab@half", ContentId("0" * 64, 4))
    print(len(index._journal), index.known(["org/model@1@0@ab@half"], misses=True), flush=True)
    index.start()
    print(len(index._journal), index._pid == os.getpid(), flush=True)
    print(store._temp_dir.directory().exists(), flush=True)
    print(watch.refusal(subject, storing=True), flush=True)
    eventually(lambda: subject.state == "agrees")
    print(watch.refusal(subject, storing=True), flush=True)
    store._temp_dir.close()
    os._exit(0)
os.waitpid(child, 0)
for lock in locks:
    lock.release()
store._temp_dir.close()
os._exit(0)
"""


def test_a_child_waits_for_no_lock_and_for_no_look_of_its_parents(hub, bucket, tmp_path):
    arguments = [hub.endpoint, bucket, str(tmp_path / "tmp")]

    done = run_script(FORK, arguments, tmp_path / "home")

    assert done.stdout.splitlines() == ["1 {}", "1 True", "True", "fingerprint_unknown", "None"], done.stderr


def test_a_child_shares_no_connections_with_its_parent(monkeypatch):
    monkeypatch.setattr(connections, "_direct", None)
    monkeypatch.setattr(connections, "_parents", None)
    with connections._without_proxies() as client:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                fresh = connections._without_proxies() is not client
                status = 0 if fresh and not client.is_closed else 2
            finally:
                os._exit(status)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert connections._without_proxies() is client
