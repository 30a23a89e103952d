import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.tools.selection import ChunkRef
from localhub.faults import Fault
from tests.support.buckets import INSTANCE, Warehouse, classic_key, content
from warmer.check import node as checking
from warmer.node.reuse import EarlierTier
from warmer.node.worker import NodeConfig, NodeWarmer
from warmer.report.outcomes import Copied, Failed, Present, TierError
from warmer.tiers import NodeInfo, open_tier
from warmer.tiers import disk_budget as rooms

# hf_xet ends some streams early and without an error when the store fails: those read as `integrity`.
UNREACHABLE = {"transport", "deadline", "integrity"}


@pytest.fixture
def stocked(warehouse):
    # Of seeds of their own: what shares its start with another test's content is stored in two places.
    warehouse.put({classic_key(n): content(7_000_000 + n, 20_000 + n) for n in range(6)})
    return warehouse


@pytest.fixture
def node(stocked):
    """Opens node warmers, and closes them."""
    opened = []

    def make(chunk_timeout=30.0, **options):
        opened.append(
            NodeWarmer(stocked.open(chunk_timeout / 3), open_tier(stocked.declaration(**options)), chunk_timeout)
        )
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def kinds(outcomes):
    return [outcome.kind if isinstance(outcome, Failed) else type(outcome).__name__ for outcome in outcomes]


def assert_clean(warehouse: Warehouse):
    """Nothing but whole chunks, and the lock of the run that goes on."""
    for key, data in warehouse.in_tier().items():
        assert data == warehouse.chunks[key]
    assert [name for name in warehouse.leftovers() if not name.endswith(".lock")] == []


def test_chunks_are_copied_byte_by_byte(stocked, node):
    plan = stocked.plan()
    began = time.monotonic()
    outcomes = node().copy(plan)
    assert outcomes == [Copied(chunk.key, chunk.size) for chunk in plan]
    assert all(0 < outcome.seconds <= time.monotonic() - began for outcome in outcomes)
    assert stocked.in_tier() == stocked.chunks
    assert_clean(stocked)


def test_a_chunk_larger_than_a_range_is_read_in_parallel_and_whole(stocked, node):
    key = classic_key(100)
    stocked.put({key: content(100, 9 * 1024 * 1024 + 7)})
    node().copy(stocked.plan(key))
    assert stocked.in_tier() == {key: stocked.chunks[key]}


def test_a_node_asks_for_longer_pieces_than_an_engine(hub, stocked):
    stocked.put({classic_key(9): content(9, 8 * 1024 * 1024)})
    settings = EngineConfig.read(stocked.config).instance(INSTANCE)
    config = NodeConfig(INSTANCE, settings, stocked.declaration(), token_expected=False)
    node = config.open(NodeInfo("this-node"))
    (chunk,) = [chunk for chunk in stocked.plan() if chunk.key == classic_key(9)]
    hub.control.reset_counters()
    try:
        assert node.copy([chunk]) == [Copied(chunk.key, chunk.size)]
    finally:
        node.close()
    # One piece, where an engine's would be four of 2 MiB.
    assert hub.control.counters().routes["reconstruction"].requests == 1


def test_a_node_does_not_wait_for_a_pause_of_the_hub_before_it_answers(hub, stocked, node):
    """A node that did would be taken for one that does not answer; each chunk waits by itself."""
    hub.control.add_fault(Fault(route="xet-read-token", status=429, headers={"Retry-After": "75"}, times=1))
    began = time.monotonic()

    node(chunk_timeout=900.0).check_access()

    assert time.monotonic() - began < 60, "the default of --node-timeout"
    assert hub.control.counters().route("xet-read-token").requests == 1


def test_an_empty_chunk_is_an_empty_file(stocked, node):
    key = classic_key(100)
    stocked.put({key: b""})
    assert node().copy(stocked.plan(key)) == [Copied(key, 0)]
    assert stocked.in_tier() == {key: b""}


def test_what_is_there_is_not_fetched(hub, stocked, node):
    one = node()
    one.copy(stocked.plan())
    hub.control.reset_counters()
    plan = stocked.plan()
    assert one.copy(plan) == [Present(chunk.key, chunk.size) for chunk in plan]
    assert hub.control.counters().route("xorb-data").requests == 0


def test_a_file_of_another_size_is_replaced(stocked, node):
    plan = stocked.plan()
    one = node()
    stocked.declaration().file(plan[0].key).write_bytes(b"half")
    assert kinds(one.copy(plan[:1])) == ["Copied"]
    assert stocked.in_tier() == {plan[0].key: stocked.chunks[plan[0].key]}


def test_a_chunk_that_was_deleted_meanwhile_is_missing(stocked, node):
    plan = stocked.plan()
    outcomes = node().copy([replace(plan[0], gone=True), *plan[1:]])
    assert kinds(outcomes) == ["missing"] + ["Copied"] * 5
    assert plan[0].key in outcomes[0].message
    assert_clean(stocked)


def test_content_that_the_store_does_not_hold_is_missing(stocked, node):
    plan = stocked.plan()
    outcomes = node().copy([ChunkRef(classic_key(77), "x", "ab" * 32, 100), *plan])
    assert kinds(outcomes) == ["missing"] + ["Copied"] * 6
    assert_clean(stocked)


def test_wrong_bytes_are_fetched_once_more(hub, stocked, node):
    plan = stocked.plan()
    hub.control.add_fault(Fault(route="xorb-data", flip_at=(2000,), times=1))
    assert kinds(node().copy(plan[:1])) == ["Copied"]
    assert_clean(stocked)


def test_bytes_that_stay_wrong_are_reported_and_never_appear(hub, stocked, node):
    plan = stocked.plan()
    hub.control.add_fault(Fault(route="xorb-data", flip_at=(2000,)))
    outcomes = node().copy(plan)
    assert kinds(outcomes) == ["integrity"] * 6
    assert stocked.in_tier() == {}
    assert_clean(stocked)


def test_a_cut_connection_is_tried_again(hub, stocked, node):
    hub.control.add_fault(Fault(route="xorb-data", truncate_at=5000, times=2))
    assert kinds(node().copy(stocked.plan())) == ["Copied"] * 6
    assert stocked.in_tier() == stocked.chunks


@pytest.mark.parametrize(
    ("fault", "tries"),
    [
        ({}, 1),
        ({"flip_at": (2000,)}, 2),
        ({"flip_at": (2000,), "times": 6}, 2),
        ({"truncate_at": 5000}, 3),
        ({"truncate_at": 5000, "times": 6}, 2),
        ({"status": 500}, 3),
    ],
)
def test_where_there_is_a_cap_each_try_is_counted_those_of_hf_xet_too(hub, stocked, fault, tries):
    plan = stocked.plan()
    settings = EngineConfig.read(stocked.config).instance(INSTANCE)
    bucket = open_bucket(settings, INSTANCE, telemetry.MemorySink(), 10.0, bulk=True, counted=True)
    one = NodeWarmer(bucket, open_tier(stocked.declaration()), 30.0)
    try:
        if fault:
            hub.control.add_fault(Fault(route="xorb-data", **fault))
        hub.control.reset_counters()
        outcomes = one.copy(plan)
    finally:
        one.close()
    assert [outcome.asked for outcome in outcomes] == [tries * chunk.size for chunk in plan]
    assert hub.control.counters().route("xorb-data").requests == tries * len(plan)


def test_half_a_chunk_never_appears(hub, stocked, node):
    hub.control.add_fault(Fault(route="xorb-data", truncate_at=5000))
    outcomes = node(6.0).copy(stocked.plan())
    assert set(kinds(outcomes)) <= UNREACHABLE
    assert stocked.in_tier() == {}
    assert_clean(stocked)


@pytest.mark.parametrize("route", ["xet-read-token", "reconstruction", "xorb-data"])
def test_one_500_is_passed_over(hub, stocked, node, route):
    hub.control.add_fault(Fault(route=route, status=500, times=1))
    assert kinds(node().copy(stocked.plan())) == ["Copied"] * 6
    assert_clean(stocked)


def test_500_for_ever_is_a_transport_failure(hub, stocked, node):
    hub.control.add_fault(Fault(route="reconstruction", status=500))
    assert set(kinds(node(6.0).copy(stocked.plan()))) <= UNREACHABLE
    assert_clean(stocked)


def test_a_refused_token_costs_one_request_and_not_one_for_each_chunk(hub, stocked, node):
    plan = stocked.plan()
    hub.control.reset_counters()
    hub.control.add_fault(Fault(route="xet-read-token", status=403))
    outcomes = node().copy(plan)
    assert kinds(outcomes) == ["denied"] * 6
    assert hub.control.counters().route("xet-read-token").requests == 1
    assert stocked.in_tier() == {}


@pytest.mark.parametrize("route", ["xet-read-token", "reconstruction", "xorb-data"])
def test_a_hub_that_hangs_is_given_up(hub, stocked, node, route):
    hub.control.add_fault(Fault(route=route, hang=True))
    started = time.monotonic()
    outcomes = node(1.5).copy(stocked.plan())
    assert set(kinds(outcomes)) <= UNREACHABLE
    assert time.monotonic() - started < 30  # far above the 1.5 s that it may take, far below hf_xet's own minutes
    assert_clean(stocked)


def test_a_tier_without_room_is_a_failure_of_the_tier(stocked, node, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    one = node()
    monkeypatch.setattr(rooms, "free_bytes", lambda _: 0)
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    outcomes = one.copy(stocked.plan())
    assert kinds(outcomes) == ["no_room"] * 6
    assert "No space left" in outcomes[0].message
    assert_clean(stocked)


def copying(hub, fault, one, warehouse, outcomes):
    """A thread that copies all there is, and has come as far as a fault that hangs."""
    thread = threading.Thread(target=lambda: outcomes.extend(one.copy(warehouse.plan())))
    thread.start()
    while not hub.control.hits(fault):
        time.sleep(0.01)
    return thread


def filling_up(monkeypatch, warehouse):
    """The disk is full from the first byte on, for files whose blocks were not reserved."""
    tier = open_tier(warehouse.declaration())
    private = tier.private

    def full(directory):
        path = private(directory)
        path.symlink_to("/dev/full")
        return path

    monkeypatch.setattr(tier, "private", full)
    return tier


def test_a_disk_that_fills_up_is_asked_for_blocks_first_then(stocked, monkeypatch):
    one = NodeWarmer(stocked.open(10), filling_up(monkeypatch, stocked), 30)
    try:
        outcomes = one.copy(stocked.plan())
        assert kinds(outcomes) == ["Copied"] * 6
        assert stocked.in_tier() == stocked.chunks
        assert_clean(stocked)
    finally:
        one.close()


def test_a_disk_that_is_full_is_no_room_however_it_is_found_out(stocked, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    one = NodeWarmer(stocked.open(10), filling_up(monkeypatch, stocked), 30)
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    try:
        assert kinds(one.copy(stocked.plan())) == ["no_room"] * 6
        assert_clean(stocked)
    finally:
        one.close()


def test_what_is_being_fetched_is_nobody_elses_to_read_or_replace(hub, stocked, node):
    number = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    one, outcomes = node(chmod=0o600), []
    thread = copying(hub, number, one, stocked, outcomes)
    (private,) = stocked.tier.glob("*-run.part")
    assert private.stat().st_mode & 0o777 == 0o700
    assert [path for path in stocked.tier.glob("*.part") if path != private] == []
    assert len(list(private.iterdir())) == 6
    hub.control.clear_faults()
    thread.join(60)
    assert kinds(outcomes) == ["Copied"] * 6
    assert {path.stat().st_mode & 0o777 for path in stocked.tier.glob("*.data")} == {0o600}


def test_a_tier_that_is_removed_in_mid_copy_is_a_failure_of_the_tier(hub, stocked, node):
    number = hub.control.add_fault(Fault(route="reconstruction", hang=True))
    one, outcomes = node(), []
    thread = copying(hub, number, one, stocked, outcomes)
    shutil.rmtree(stocked.tier)
    hub.control.clear_faults()
    thread.join(60)
    assert kinds(outcomes) == ["tier"] * 6
    assert not stocked.tier.exists()


def with_an_empty_one(warehouse):
    chunks = {classic_key(1): content(1, 1000), classic_key(2): b"", classic_key(3): content(3, 1000)}
    warehouse.chunks.clear()
    warehouse.put(chunks)
    return [chunk for chunk in warehouse.plan() if chunk.key in chunks], chunks


@pytest.mark.parametrize("verify", ["hash", "length"])
def test_an_empty_chunk_is_received_beside_others(warehouse, verify):
    plan, chunks = with_an_empty_one(warehouse)
    one = NodeWarmer(warehouse.open(), open_tier(warehouse.declaration()), verify=verify)
    outcomes = one.receive(plan, [np.frombuffer(chunks[chunk.key], np.uint8) for chunk in plan])
    one.close()
    assert kinds(outcomes) == ["Copied"] * 3
    assert warehouse.in_tier() == chunks


@pytest.mark.parametrize("verify", ["hash", "length"])
def test_an_empty_chunk_is_reused_beside_others(hub, warehouse, tmp_path, verify):
    plan, chunks = with_an_empty_one(warehouse)
    earlier = replace(warehouse.declaration(), base_paths=(tmp_path / "earlier",))
    (tmp_path / "earlier").mkdir()
    for key, data in chunks.items():
        earlier.file(key).write_bytes(data)
    one = NodeWarmer(warehouse.open(), open_tier(warehouse.declaration()), verify=verify, earlier=[earlier])
    hub.control.reset_counters()
    outcomes = one.copy(plan)
    one.close()
    assert [(kind, one.reused) for kind, one in zip(kinds(outcomes), outcomes, strict=True)] == [("Copied", True)] * 3
    assert warehouse.in_tier() == chunks
    assert not hub.control.counters().route("xorb-data").requests


def test_what_the_store_lacks_for_a_moment_is_fetched_all_the_same(hub, stocked, node):
    hub.control.add_fault(Fault(route="reconstruction", status=404, times=3))
    assert kinds(node().copy(stocked.plan())) == ["Copied"] * 6
    assert_clean(stocked)


def test_what_the_store_lacks_and_the_bucket_lists_is_no_chunk_that_was_deleted(hub, stocked, node):
    hub.control.add_fault(Fault(route="reconstruction", status=404))
    outcomes = node().copy(stocked.plan())
    assert kinds(outcomes) == ["integrity"] * 6
    assert "the bucket lists it all the same" in outcomes[0].message


def test_stopping_frees_what_hangs_and_leaves_nothing(hub, stocked, node):
    number = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    one, outcomes = node(), []
    thread = copying(hub, number, one, stocked, outcomes)
    one.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert kinds(outcomes) == ["interrupted"] * 6
    assert_clean(stocked)


COPY_AND_DIE = """
import sys, pickle
from pathlib import Path
from tests.support.buckets import Warehouse
from warmer.node.worker import NodeWarmer
from warmer.tiers import NodeInfo; from warmer.tiers import open_tier
endpoint, bucket, directory = sys.argv[1:]
warehouse = Warehouse(endpoint, bucket, Path(directory))
node = NodeWarmer(warehouse.open(), open_tier(warehouse.declaration()), 100.0)
print("ready", flush=True)
node.copy(warehouse.plan())
"""


def test_a_node_killed_in_mid_copy_leaves_nothing_visible_and_the_next_run_completes(hub, stocked, node):
    plan = stocked.plan()
    # Half of what a chunk has arrives, and then nothing.
    number = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    child = subprocess.Popen(
        [sys.executable, "-c", COPY_AND_DIE, stocked.endpoint, stocked.bucket_id, str(stocked.directory)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout.readline() == b"ready\n"
        while not hub.control.hits(number):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    hub.control.clear_faults()
    assert stocked.in_tier() == {}
    assert any(name.endswith(".part") for name in stocked.leftovers())
    assert kinds(node().copy(plan)) == ["Copied"] * 6
    assert stocked.in_tier() == stocked.chunks
    assert_clean(stocked)


def arrays(contents):
    return [np.frombuffer(data, dtype=np.uint8) for data in contents]


def test_what_was_fetched_for_others_is_kept_and_received_byte_by_byte(stocked, node, tmp_path):
    plan = stocked.plan()
    outcomes, kept = node().fetch(plan, keep=True)
    assert kinds(outcomes) == ["Copied"] * 6
    assert [bytes(content) for content in kept] == [stocked.chunks[chunk.key] for chunk in plan]
    shutil.rmtree(stocked.tier)
    stocked.tier.mkdir()
    assert node().receive(plan, kept) == [Copied(chunk.key, chunk.size, received=True) for chunk in plan]
    assert stocked.in_tier() == stocked.chunks


def test_only_what_was_fetched_is_kept(stocked, node):
    plan = stocked.plan()
    one = node()
    one.copy(plan[:2])
    outcomes, kept = one.fetch([*plan[:3], replace(plan[3], gone=True)], keep=True)
    assert kinds(outcomes) == ["Present", "Present", "Copied", "missing"]
    assert [bytes(content) for content in kept] == [stocked.chunks[plan[2].key]]


def test_what_is_there_is_not_received(stocked, node):
    plan = stocked.plan()
    one = node()
    assert one.lacks(plan)
    one.copy(plan)
    assert not one.lacks(plan)
    contents = arrays(stocked.chunks[chunk.key] for chunk in plan)
    assert one.receive(plan, contents) == [Present(chunk.key, chunk.size) for chunk in plan]


def test_wrong_bytes_of_another_node_never_appear(stocked, node):
    plan = stocked.plan()[:3]
    wrong = arrays([b"x" * plan[0].size, stocked.chunks[plan[1].key], b"short"])
    assert node().receive(plan, wrong) == [None, Copied(plan[1].key, plan[1].size, received=True), None]
    assert set(stocked.in_tier()) == {plan[1].key}
    assert_clean(stocked)


def test_where_only_lengths_count_nothing_is_hashed(stocked, monkeypatch):
    def never(_):
        raise AssertionError("hashed")

    monkeypatch.setattr("warmer.node.receive.xet_hashes", never)
    one = NodeWarmer(stocked.open(), open_tier(stocked.declaration()), verify="length")
    plan = stocked.plan()
    assert kinds(one.copy(plan[:3])) == ["Copied"] * 3
    contents = arrays([b"x" * plan[3].size, b"short"])
    assert one.receive(plan[3:5], contents) == [Copied(plan[3].key, plan[3].size, received=True), None]
    one.close()


@pytest.fixture
def second(stocked):
    """Opens warmers of another tier, which is filled after the first."""
    opened = []

    def make(*others, verify="hash"):
        declaration = replace(stocked.declaration(), base_paths=(stocked.directory / "second",))
        earlier = [*others, stocked.declaration()]
        opened.append(NodeWarmer(stocked.open(10), open_tier(declaration), verify=verify, earlier=earlier))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_what_a_tier_before_holds_does_not_come_from_the_hub_again(hub, stocked, node, second):
    plan = stocked.plan()
    node().copy(plan[1:])
    hub.control.reset_counters()
    outcomes, kept = second().fetch(plan, keep=True)
    assert outcomes == [Copied(chunk.key, chunk.size, reused=chunk is not plan[0]) for chunk in plan]
    assert [bytes(content) for content in kept] == [stocked.chunks[chunk.key] for chunk in plan]
    assert stocked.in_tier(stocked.directory / "second") == stocked.chunks
    assert hub.control.counters().route("xorb-data").bytes_out < 2 * plan[0].size


def test_with_all_of_it_in_a_tier_before_a_hub_that_is_gone_does_not_matter(hub, stocked, node, second):
    plan = stocked.plan()
    node().copy(plan)
    hub.control.add_fault(Fault(route="xet-read-token", status=500))
    assert second().copy(plan) == [Copied(chunk.key, chunk.size, reused=True) for chunk in plan]


@pytest.mark.parametrize("verify", ["hash", "length"])
def test_what_a_tier_before_holds_wrongly_comes_from_the_hub(stocked, node, second, verify):
    """It was taken for present by its size: nobody has compared it with anything yet."""
    plan = stocked.plan()
    node().copy(plan)
    file = stocked.declaration().file(plan[0].key)
    file.write_bytes(bytes(plan[0].size))
    one = second(verify=verify)
    assert one.reuse(plan[:2]) == [None, Copied(plan[1].key, plan[1].size, reused=True)]
    assert one.copy(plan[:1]) == [Copied(plan[0].key, plan[0].size)]
    assert stocked.in_tier(stocked.directory / "second") == {chunk.key: stocked.chunks[chunk.key] for chunk in plan[:2]}
    assert one.reuse(plan[:1]) == [Present(plan[0].key, plan[0].size)]


@pytest.mark.parametrize("verify", ["hash", "length"])
def test_what_a_tier_before_holds_wrongly_is_put_right_there_and_told(stocked, node, second, verify):
    plan = stocked.plan()
    node().copy(plan)
    file = stocked.declaration().file(plan[0].key)
    file.write_bytes(bytes(plan[0].size))
    one = second(verify=verify)
    first, other = one.copy(plan[:2])
    assert (first.repaired, first.left, other.repaired) == (("fs.warm",), (), ())
    assert file.read_bytes() == stocked.chunks[plan[0].key]
    one.close()
    assert_clean(stocked)


def test_what_a_tier_before_holds_wrongly_is_put_right_from_what_another_node_has_fetched(stocked, node, second):
    plan = stocked.plan()
    node().copy(plan)
    file = stocked.declaration().file(plan[0].key)
    file.write_bytes(bytes(plan[0].size))
    one = second()
    assert one.reuse(plan[:1]) == [None]
    (outcome,) = one.receive(plan[:1], arrays([stocked.chunks[plan[0].key]]))
    assert (outcome.received, outcome.repaired) == (True, ("fs.warm",))
    assert file.read_bytes() == stocked.chunks[plan[0].key]


def test_what_cannot_be_put_right_for_want_of_room_is_removed(stocked, second):
    plan = stocked.plan()
    full = replace(stocked.declaration(max_bytes=10), name="fs.full", base_paths=(stocked.directory / "full",))
    full.base_paths[0].mkdir()
    full.file(plan[0].key).write_bytes(bytes(plan[0].size))
    (outcome,) = second(full).copy(plan[:1])
    assert outcome.repaired == ("fs.full",)
    assert not full.file(plan[0].key).exists()


def test_what_cannot_be_put_right_is_told(stocked, node, second, monkeypatch):
    plan = stocked.plan()
    node().copy(plan)
    file = stocked.declaration().file(plan[0].key)
    file.write_bytes(bytes(plan[0].size))
    one = second()

    def refused(*_):
        raise TierError("a tier that is read-only")

    monkeypatch.setattr(EarlierTier, "repair", refused)
    (outcome,) = one.copy(plan[:1])
    assert outcome.repaired == ()
    assert "cannot be repaired: a tier that is read-only" in outcome.left[0]


def test_what_is_wrong_and_cannot_be_fetched_is_told(hub, stocked, node, second):
    plan = stocked.plan()
    node().copy(plan)
    stocked.declaration().file(plan[0].key).write_bytes(bytes(plan[0].size))
    hub.control.add_fault(Fault(route="xorb-data", status=500))
    (outcome,) = second().copy(plan[:1])
    assert isinstance(outcome, Failed)
    assert "tier 'fs.warm' holds something else in its place" in outcome.message


def test_what_is_there_is_hashed_and_replaced_where_that_was_asked_for(hub, stocked, node):
    plan = stocked.plan()
    node().copy(plan)
    file = stocked.declaration().file(plan[0].key)
    file.write_bytes(bytes(plan[0].size))
    assert kinds(node().copy(plan)) == ["Present"] * 6
    hub.control.reset_counters()
    one = NodeWarmer(stocked.open(10), open_tier(stocked.declaration()), verify_present=True)
    assert one.lacks(plan)
    assert not one.lacks(plan[1:])
    outcomes = one.copy(plan)
    assert kinds(outcomes) == ["Copied"] + ["Present"] * 5
    assert outcomes[0].repaired == ("fs.warm",)
    assert stocked.in_tier() == stocked.chunks
    assert kinds(one.copy(plan)) == ["Present"] * 6
    file.write_bytes(bytes(plan[0].size - 1))  # another length is missing, as ever
    assert kinds(one.receive(plan[:2], arrays([stocked.chunks[chunk.key] for chunk in plan[:2]]))) == [
        "Copied",
        "Present",
    ]
    one.close()


def test_what_is_there_is_hashed_once_for_all_looks_at_it(stocked, node, monkeypatch):
    plan, hashed = stocked.plan(), []
    node().copy(plan)
    real = checking.xet_hashes
    monkeypatch.setattr(checking, "xet_hashes", lambda paths: hashed.append(len([*paths])) or real(paths))
    one = NodeWarmer(stocked.open(10), open_tier(stocked.declaration()), verify_present=True)
    assert not one.lacks(plan)
    assert kinds(one.copy(plan)) == ["Present"] * 6
    assert hashed == [6]
    one.close()


def test_of_several_tiers_before_each_is_asked(hub, stocked, node, second):
    plan = stocked.plan()
    node().copy(plan)
    third = replace(stocked.declaration(), base_paths=(stocked.directory / "third",))
    shutil.copytree(stocked.tier, stocked.directory / "third", ignore=shutil.ignore_patterns(".*"))
    third.file(plan[0].key).write_bytes(bytes(plan[0].size))
    third.file(plan[1].key).unlink()
    hub.control.add_fault(Fault(route="xorb-data", status=500))
    assert second(third).copy(plan) == [Copied(chunk.key, chunk.size, reused=True) for chunk in plan]


def test_no_room_is_made_for_what_neither_a_tier_before_nor_the_hub_gives(hub, stocked):
    plan = stocked.plan()
    stored = sum(chunk.size for chunk in plan)
    declaration = stocked.declaration(max_bytes=stored, evict=True)
    one = NodeWarmer(stocked.open(1), open_tier(declaration), 3.0)
    one.copy(plan)
    one.close()
    stocked.put({classic_key(100 + n): content(n, 20_000) for n in range(6)})
    more = [chunk for chunk in stocked.plan() if chunk not in plan]
    before = stocked.in_tier()
    hub.control.add_fault(Fault(route="xet-read-token", status=500))
    empty = replace(declaration, base_paths=(stocked.directory / "none",))
    two = NodeWarmer(stocked.open(1), open_tier(declaration), 3.0, earlier=[empty])
    assert kinds(two.copy(more)) == ["transport"] * 6
    two.close()
    assert stocked.in_tier() == before


def test_a_node_that_cannot_have_a_tier_before_takes_part_without_it(stocked):
    elsewhere = replace(stocked.declaration(), base_paths=(stocked.directory / "{label:rack}",))
    settings = EngineConfig.read(stocked.config).instance(INSTANCE)
    config = NodeConfig(INSTANCE, settings, stocked.declaration(), token_expected=False, earlier=(elsewhere,))
    node = config.open(NodeInfo("this-node"))
    try:
        assert kinds(node.copy(stocked.plan())) == ["Copied"] * 6
    finally:
        node.close()


def test_a_disk_that_does_not_take_what_is_reused_asks_the_hub_for_nothing(hub, stocked, node, second, monkeypatch):
    plan = stocked.plan()
    node().copy(plan)
    one = second()
    hub.control.reset_counters()
    monkeypatch.setattr("warmer.tiers.directory.os.pwrite", full_disk)
    assert kinds(one.copy(plan)) == ["no_room"] * 6
    assert hub.control.counters().route("xorb-data").requests == 0


def full_disk(*_):
    raise OSError(errno.ENOSPC, "full")


def test_nothing_is_reused_after_the_order_to_stop(stocked, node, second):
    plan = stocked.plan()
    node().copy(plan)
    one = second()
    one.stop()
    assert kinds(one.reuse(plan)) == ["interrupted"] * 6
    assert stocked.in_tier(stocked.directory / "second") == {}


def test_without_a_tier_before_nothing_is_reused(stocked, node):
    assert node().reuse(stocked.plan()) == [None] * 6


def test_nothing_is_received_after_the_order_to_stop(stocked, node):
    plan = stocked.plan()
    one = node()
    one.stop()
    contents = arrays(stocked.chunks[chunk.key] for chunk in plan)
    assert kinds(one.receive(plan, contents)) == ["interrupted"] * 6
    assert stocked.in_tier() == {}
    assert_clean(stocked)
