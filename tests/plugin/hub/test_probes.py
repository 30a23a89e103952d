"""A breaker closes when anything representative succeeds: other contents, real requests, and the time that the work has."""

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.hub.transfer import xet_hashes
from localhub.faults import Fault
from tests.support.surface import content, store_of
from tests.support.waiting import eventually


@pytest.fixture
def hash_of(tmp_path):
    """The Xet hash of a chunk's content."""

    def of(number):
        path = tmp_path / f"content-{number}"
        path.write_bytes(content(number))
        return xet_hashes([path])[0]

    return of


def served(surface, number):
    return surface.get([number])[0] is not None


QUICK = {"breaker_probe_secs": 0.05, "breaker_max_probe_secs": 0.1}


def opened_by_one_bad_content(hub, surface, xet_hash):
    hub.control.add_fault(Fault(route="reconstruction", path=xet_hash, status=500))
    eventually(lambda: not served(surface, 0) and store_of(surface).breakers.is_open("read"))


def test_a_content_that_cannot_be_read_does_not_keep_the_others_from_being_read(hub, surfaces, hash_of):
    surfaces().put([0, 1])
    reader = surfaces(breaker_failures=3, **QUICK)
    assert served(reader, 1)
    assert served(reader, 0)

    opened_by_one_bad_content(hub, reader, hash_of(0))

    eventually(lambda: not store_of(reader).breakers.is_open("read"))
    assert reader.lookup([1]) == [True]
    assert served(reader, 1)
    assert eventually(lambda: reader.lookup([0]) == [False]), "what failed beside it is quarantined"


def test_where_no_other_content_is_known_a_real_request_closes_it(hub, surfaces, hash_of):
    surfaces().put([0, 1])
    reader = surfaces(breaker_failures=3, **QUICK)
    assert served(reader, 0)

    opened_by_one_bad_content(hub, reader, hash_of(0))

    assert eventually(lambda: reader.lookup([1]) == [True])
    assert served(reader, 1)
    assert not store_of(reader).breakers.is_open("read")


def test_a_process_whose_first_gets_meet_one_bad_content_recovers(hub, surfaces, hash_of):
    surfaces().put([0, 1])
    reader = surfaces(breaker_failures=3, **QUICK)

    opened_by_one_bad_content(hub, reader, hash_of(0))

    assert eventually(lambda: reader.lookup([1]) == [True] and served(reader, 1))


@pytest.mark.parametrize("part", ["read", "write", "lookup"])
def test_a_probe_has_the_time_that_its_work_has(surfaces, monkeypatch, part):
    surface = surfaces()
    store = store_of(surface)
    worker = {"read": store._reader, "write": store._writer, "lookup": store._existence}[part]
    given = []
    monkeypatch.setattr(worker, "probe", given.append)

    store.breakers._probes[part]()

    limits = {
        "read": store._get_secs,
        "write": store.settings.put_timeout_secs,
        "lookup": store.settings.lookup_timeout_secs,
    }
    [deadline] = given
    assert deadline.seconds == limits[part]


def test_a_probe_of_writing_does_not_wait_behind_puts(surfaces):
    writer = store_of(surfaces(max_parallel_writes=1))._writer
    writer._threads.close()

    writer.probe(Deadline.after(30))
