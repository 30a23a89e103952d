"""Several jobs on one instance, in real processes."""

import signal

from localhub.faults import Fault
from tests.support.buckets import NEW, OLD, ended
from tests.support.waiting import eventually


def hanging(depot, *more):
    """A cleanup that holds the lock and hangs in its first batch."""
    control = depot.hub.control
    fault = control.add_fault(Fault(route="paths-info", hang=True))
    process = depot.started("cleanup", "--max-age", "14d", "--yes", *more)
    eventually(lambda: control.hits(fault) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


def test_two_at_once_one_works_and_one_names_it(stocked):
    first = hanging(stocked)

    second = ended(stocked.started("rm", OLD[0], "--yes"))
    stocked.hub.control.clear_faults()
    worked = ended(first)

    assert second.code == 4
    assert "is locked by cleanup on" in second.stderr
    assert f"pid {first.pid}" in second.stderr
    assert second.summary["result"] == "refused"
    assert (worked.code, worked.counts("deleted")) == (0, [4]), worked.stderr
    assert not [path for path in stocked.all_paths() if "/locks/" in path]


def test_after_a_kill_the_next_one_takes_over(stocked):
    first = hanging(stocked, "--lock-lifetime", "2s")
    first.kill()
    first.communicate()
    stocked.hub.control.clear_faults()
    assert [path for path in stocked.all_paths() if "/locks/" in path]

    worked = eventually(lambda: (ran := stocked.cleanup("--max-age", "14d", "--yes")).code != 4 and ran)

    assert (worked.code, worked.counts("deleted")) == (0, [4]), worked.stderr
    assert stocked.left() == stocked.paths_of(NEW)
    assert not [path for path in stocked.all_paths() if "/locks/" in path]


def test_a_lock_that_was_lost_stops_the_deleting(stocked):
    """A holder that slept for longer than its lock lived deletes nothing when it wakes up."""
    first = hanging(stocked, "--lock-lifetime", "2s", "--batch-size", "1", "--parallel", "1")
    first.send_signal(signal.SIGSTOP)
    # Only the lock's routes are asked by this one: there is nothing that it may delete.
    other = eventually(lambda: (ran := stocked.run("rm", "nobody", "--yes")).code != 4 and ran)
    assert other.code == 0, other.stderr
    stocked.hub.control.clear_faults()
    first.send_signal(signal.SIGCONT)
    late = ended(first)

    assert late.code == 4, late.stderr
    assert "nothing more is deleted" in late.stderr
    assert late.counts("deleted") == [0]
    assert len(stocked.left()) == 24


def test_one_that_is_stopped_while_it_lists_lets_the_next_one_in(stocked):
    control = stocked.hub.control
    fault = control.add_fault(Fault(route="tree", path_regex=r"/tree/kv/us/$", hang=True))
    process = stocked.started("cleanup", "--max-age", "14d", "--yes")
    eventually(lambda: control.hits(fault))
    process.terminate()
    ran = ended(process)
    control.clear_faults()

    assert ran.code == 5, ran.stderr
    assert not [path for path in stocked.all_paths() if "/locks/" in path]
    assert stocked.cleanup("--max-age", "14d", "--yes").counts("deleted") == [4]
