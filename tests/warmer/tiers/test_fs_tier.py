import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hfbucket_plugin.core import run_lock
from tests.support.buckets import classic_key, content
from warmer.report.outcomes import TierError, TierFullError
from warmer.tiers import disk_budget as rooms
from warmer.tiers import open_tier
from warmer.tiers.declare import DirectoryDeclaration, FileLayout, TierOptions
from warmer.tiers.directory import FileLease
from warmer.tiers.run_files import RunFiles, began, sweep

KEY = classic_key(1)


@pytest.fixture
def declaration(tmp_path):
    return DirectoryDeclaration("fs.warm", (tmp_path / "a" / "b", tmp_path / "c"))


@pytest.fixture
def tier(declaration):
    opened = open_tier(declaration)
    yield opened
    opened.close()


def files(declaration):
    return sorted(path.name for base in declaration.base_paths for path in base.rglob("*") if path.is_file())


def visible(declaration):
    return [name for name in files(declaration) if name.endswith(".data")]


def test_temporary_files_are_never_taken_for_chunks(tier, declaration):
    tier.draft(KEY, 10)
    assert [path for base in declaration.base_paths for path in base.glob("*.data")] == []
    assert all(name.startswith(".hfbucket-warm-") for name in files(declaration))


def test_a_temporary_file_lies_beside_its_chunk_or_in_a_directory_there(tier, declaration):
    for number in range(20):
        key = classic_key(number)
        draft = tier.draft(key, 1)
        assert draft.path.resolve().parent.parent == declaration.file(key).parent
        assert draft.path.resolve().parent.stat().st_mode & 0o777 == 0o700
        draft.lease.write(0, b"x")
        assert draft.path.parent == declaration.file(key).parent


def test_nobody_else_can_put_or_read_anything_where_files_are_made(tier, declaration):
    first = tier.draft(KEY, 1)
    directory = first.path.resolve().parent
    directory.rename(directory.with_name("elsewhere"))  # by the owner of the tier
    directory.mkdir()
    second = tier.draft(KEY, 1)
    assert second.path.resolve().parent == directory.with_name("elsewhere")
    second.path.write_bytes(b"x")
    second.publish()
    assert declaration.file(KEY).read_bytes() == b"x"


def test_a_directory_that_is_gone_is_not_made_again(tier, declaration):
    draft = tier.draft(KEY, 1)
    shutil.rmtree(declaration.file(KEY).parent)
    with pytest.raises(OSError, match="No such file"):
        draft.path.write_bytes(b"x")
    with pytest.raises(TierError, match="No such file"):
        draft.publish()
    assert not declaration.file(KEY).parent.exists()


def test_a_directory_in_the_place_of_a_chunk_is_not_the_chunk(tier, declaration):
    declaration.file(KEY).mkdir()
    assert not tier.holds(KEY, declaration.file(KEY).stat().st_size)
    draft = tier.draft(KEY, 0)
    with pytest.raises(TierError, match=r"tier 'fs\.warm'"):
        draft.publish()


def test_closing_removes_all_that_is_ours(tier, declaration):
    declaration.file(KEY).write_bytes(b"chunk")
    tier.draft(classic_key(2), 10).lease.write(0, b"some")
    tier.draft(classic_key(3), 10).path.write_bytes(b"some")
    tier.close()
    assert files(declaration) == [declaration.file(KEY).name]


LEAVE_BEHIND = """
import os, sys
from pathlib import Path
from warmer.tiers import open_tier
from warmer.tiers.declare import DirectoryDeclaration
tier = open_tier(DirectoryDeclaration("fs.warm", (Path(sys.argv[1]),)))
tier.draft("org/model@1@0@1@half", 1000).lease
tier.draft("org/model@1@0@2@half", 1000).path.write_bytes(b"some")
os._exit(9)
"""


def test_what_a_dead_run_left_is_swept_and_nothing_else(tmp_path):
    subprocess.run([sys.executable, "-c", LEAVE_BEHIND, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 3
    assert len([path for path in tmp_path.rglob("*.part") if path.is_file()]) == 2
    foreign = [".hfbucket-warm-notes", "key@1@0@1@half.data", "key.tmp", ".hfbucket-warm-0123.lock", ".other.part"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"not ours")
    alive = RunFiles(tmp_path)
    alive.temporary(1).write_bytes(b"being written")
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= set(foreign)
    assert len(left) == len(foreign) + 2
    assert sweep(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == left
    alive.close()
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)


def test_many_runs_may_begin_in_one_directory_at_once(tmp_path):
    runs, errors = [], []

    def begin():
        try:
            runs.extend([RunFiles(tmp_path) for _ in range(20)])
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(tmp_path.glob("*.lock"))) == len(runs) == 160
    for run in runs:
        run.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def lease(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    one = FileLease(descriptor, 10)
    yield one
    one.close()


def test_a_lease_takes_pieces_anywhere_in_the_file_and_nowhere_else(lease, tmp_path):
    assert lease.write(4, b"456789")
    assert lease.write(0, b"0123")
    for at, piece in ((-1, b"x"), (10, b"x"), (9, b"xx")):
        with pytest.raises(ValueError, match="do not fit"):
            lease.write(at, piece)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_after_a_revoke_nothing_is_written_though_the_descriptor_is_another_files(lease, tmp_path):
    assert lease.live
    lease.close()
    assert not lease.live
    reused = [os.open(tmp_path / f"other-{n}", os.O_RDWR | os.O_CREAT) for n in range(20)]
    assert not lease.write(0, b"late")
    assert all(Path(tmp_path / f"other-{n}").stat().st_size == 0 for n in range(20))
    for descriptor in reused:
        os.close(descriptor)


def test_ranges_written_by_many_threads_all_arrive(tmp_path):
    data = content(1, 1_000_000)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    one = FileLease(descriptor, len(data))
    spans = [range(start, len(data), 70_000) for start in range(0, 70_000, 10_000)]
    threads = [
        threading.Thread(target=lambda span=span: [one.write(at, data[at : at + 10_000]) for at in span])
        for span in spans
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close(fsync=True)
    assert (tmp_path / "file").read_bytes() == data


def older(declaration, numbers, size=1000):
    """Chunk files that were written a day ago."""
    for number in numbers:
        file = declaration.file(classic_key(number))
        file.write_bytes(b"x" * size)
        os.utime(file, (time.time() - 86_400 + number,) * 2)


def put(tier, number, size=1000):
    draft = tier.draft(classic_key(number), size)
    draft.lease.write(0, b"y" * size)
    draft.publish()


@pytest.fixture
def listings(monkeypatch):
    """How often a directory was listed."""
    seen, real = [], rooms.chunk_files

    def counted(declaration, directory):
        seen.append(directory)
        return real(declaration, directory)

    monkeypatch.setattr(rooms, "chunk_files", counted)
    return seen


def one_directory(path, **options):
    path.mkdir(exist_ok=True)
    return DirectoryDeclaration("fs.warm", (path,), options=TierOptions(**options))


def test_eviction_lists_the_directory_once_for_a_share_of_it(tmp_path, listings):
    declaration = one_directory(tmp_path / "t", evict=True, max_bytes=400_000)
    older(declaration, range(400))
    with contextlib.closing(open_tier(declaration)) as tier:
        assert len(listings) == 1
        for number in range(1000, 1300):
            put(tier, number)
    # After each sixteenth of the budget, 25 chunks; in each of these looks the next files to go are found too.
    assert len(listings) == 1 + 300 // 26
    assert len(visible(declaration)) == 400


def test_without_a_budget_eviction_lists_the_directory_once_for_a_share_of_it(tmp_path, listings, monkeypatch):
    monkeypatch.setattr(rooms, "_CANDIDATES", 10)
    declaration = one_directory(tmp_path / "t", evict=True, min_free_bytes=1)
    older(declaration, range(400))
    monkeypatch.setattr(rooms, "free_bytes", lambda path: 400_000 - 1000 * len([*path.glob("*.data")]) + 500)
    with contextlib.closing(open_tier(declaration)) as tier:
        for number in range(1000, 1100):
            put(tier, number)
    assert len(listings) == -(-100 // 25)  # a sixteenth of 400 files is picked in each
    assert len(visible(declaration)) == 400


def test_chunks_that_are_refused_do_not_list_the_directory_each(tmp_path, listings, monkeypatch):
    monkeypatch.setattr(rooms, "_VISITS", 1)
    declaration = one_directory(tmp_path / "t", max_bytes=401_000)
    older(declaration, range(400))
    with contextlib.closing(open_tier(declaration)) as tier:
        for number in range(64):  # a smaller one that fits comes between them
            with pytest.raises(TierFullError):
                tier.draft(classic_key(1000 + number), 1001)
            tier.draft(classic_key(2000 + number), 1).discard()
    assert len(listings) == 1 + 7  # at the first, and when twice as many were refused


def test_a_node_does_not_wait_for_the_listing_of_a_large_tier(tmp_path, monkeypatch):
    declaration = one_directory(tmp_path / "t", max_bytes=2000)
    older(declaration, range(2))
    go_on, real, done = threading.Event(), rooms.chunk_files, []

    def slow(*given):
        go_on.wait()
        return real(*given)

    monkeypatch.setattr(rooms, "chunk_files", slow)
    monkeypatch.setattr(rooms, "_OPENING_SECS", 0.0)
    with contextlib.closing(open_tier(declaration)) as tier:
        assert tier.holds(classic_key(1), 1000)

        def refused():
            with pytest.raises(TierFullError):
                tier.draft(classic_key(9), 1000)
            done.append(1)

        waiting = threading.Thread(target=refused)
        waiting.start()
        assert tier.holds(classic_key(0), 1000)  # while the other one waits
        assert done == []
        go_on.set()
        waiting.join()
        assert done == [1]


def test_what_another_run_found_right_stays_whatever_its_options_are(tmp_path):
    declaration = one_directory(tmp_path / "t")
    older(declaration, range(4))
    with contextlib.closing(open_tier(declaration)) as found:
        assert all(found.holds(classic_key(number), 1000) for number in (0, 2))
        evicting = one_directory(tmp_path / "t", evict=True, max_bytes=4000)
        with contextlib.closing(open_tier(evicting)) as other:
            put(other, 100, 2000)
            with pytest.raises(TierFullError):
                other.draft(classic_key(101), 1000)
            assert [declaration.file(classic_key(n)).exists() for n in (*range(4), 100)] == [
                True,
                False,
                True,
                False,
                True,
            ]


def test_what_another_run_found_right_and_cannot_touch_stays(tmp_path, monkeypatch):
    declaration = one_directory(tmp_path / "t")
    older(declaration, range(4))

    def refused(path, *_, **__):
        raise PermissionError(1, "Operation not permitted")

    with contextlib.closing(open_tier(declaration)) as found:
        evicting = open_tier(one_directory(tmp_path / "t", evict=True, max_bytes=4000))
        monkeypatch.setattr(os, "utime", refused)
        assert all(
            found.holds(classic_key(number), 1000) for number in (0, 2)
        )  # after the other one picked what is to go
        monkeypatch.undo()
        put(evicting, 100, 2000)
        assert [declaration.file(classic_key(n)).exists() for n in range(4)] == [True, False, True, False]
        evicting.close()
    assert {path.suffix for path in (tmp_path / "t").iterdir()} == {".data"}


def swapping(monkeypatch, name, target):
    """A user who may write to the parent puts a link in the place of each directory that is made under a name."""
    real = os.mkdir

    def made(path, *given, **more):
        real(path, *given, **more)
        if str(path).endswith(name):
            place = Path(f"/proc/self/fd/{more['dir_fd']}") / path
            place.rename(f"{place}.moved")
            place.symlink_to(target)

    monkeypatch.setattr(os, "mkdir", made)


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_link_in_the_place_of_a_new_directory_is_not_given_away(tmp_path, monkeypatch, below):
    owned, secret = tmp_path / "engine", tmp_path / "secret"
    for path in (owned, secret):
        path.mkdir()
    changed = []
    monkeypatch.setattr(os, "chown", lambda *given: changed.append(given))
    swapping(monkeypatch, "tier", secret)
    with pytest.raises(TierError, match=r"tier 'fs\.warm'"):
        open_tier(DirectoryDeclaration("fs.warm", (Path(f"{owned}/tier{below}"),), options=TierOptions(chown="5001")))
    assert changed == []
    assert [*secret.iterdir()] == []


def test_another_directory_in_the_place_of_a_new_one_is_not_given_away(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_bytes(b"")
    real, changed = os.mkdir, []

    def made(path, *given, **more):
        real(path, *given, **more)
        (tmp_path / "tier").rename(tmp_path / "moved")
        (tmp_path / "theirs").rename(tmp_path / "tier")

    monkeypatch.setattr(os, "mkdir", made)
    monkeypatch.setattr(os, "chown", lambda *given: changed.append(given))
    with pytest.raises(TierError, match="was replaced while it was being made"):
        open_tier(DirectoryDeclaration("fs.warm", (tmp_path / "tier",), options=TierOptions(chown="5001")))
    assert changed == []


def test_what_is_made_for_one_run_alone_is_that_runs_or_nothing_is_written(tier, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    swapping(monkeypatch, "-run.part", other)
    with pytest.raises(TierError, match=r"tier 'fs\.warm'"):
        tier.draft(KEY, 10)
    assert [*other.iterdir()] == []


def owned_by(monkeypatch, user, *, of_directories_alone=False):
    """All that `os.fstat` says of belongs to a user, as on a share that gives what root makes to another one."""
    real = os.fstat

    def found(descriptor):
        fields = list(real(descriptor))
        if not of_directories_alone or stat.S_ISDIR(fields[0]):
            fields[4] = user
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", found)


def test_what_another_user_made_in_the_place_of_what_is_for_one_run_alone_is_not_written(tier, monkeypatch):
    owned_by(monkeypatch, 5001, of_directories_alone=True)
    with pytest.raises(TierError, match=r"was replaced while it was being made.* belongs to user 5001"):
        tier.draft(KEY, 10)


@pytest.mark.parametrize("share", ["gives files to another user", "gives directories its own mode"])
def test_a_share_with_users_or_modes_of_its_own_is_filled(tier, declaration, monkeypatch, share):
    if share == "gives files to another user":
        owned_by(monkeypatch, 65534)
    else:
        real = os.mkdir
        monkeypatch.setattr(os, "mkdir", lambda path, *_, **more: real(path, 0o755, dir_fd=more["dir_fd"]))
    draft = tier.draft(KEY, 10)
    assert draft.roomy == (share == "gives files to another user")
    draft.lease.write(0, b"0123456789")
    draft.publish()
    assert declaration.file(KEY).read_bytes() == b"0123456789"
    assert [path.name for made in declaration.base_paths[0].glob("*-run.part") for path in made.iterdir()] == []


def test_links_in_the_place_of_temporary_files_lead_nowhere(tmp_path):
    victim, declaration = (
        tmp_path / "victim",
        DirectoryDeclaration("fs.warm", (tmp_path / "t",), FileLayout(alignment=4096)),
    )
    victim.write_bytes(b"root only")
    (tmp_path / "t").mkdir()
    with contextlib.closing(open_tier(declaration)) as tier:
        draft = tier.draft(KEY, 10)
        draft.lease.write(0, b"0123456789")
        draft.path.unlink()
        draft.path.symlink_to(victim)
        draft.publish()  # the link itself, which is the tier's owner's own doing
        assert victim.read_bytes() == b"root only"
        assert not tier.holds(KEY, 10)
        old = victim.stat().st_mtime_ns
        declaration.file(KEY).unlink(missing_ok=True)
        declaration.file(KEY).symlink_to(victim)
        assert not tier.holds(KEY, 9)
        assert victim.stat().st_mtime_ns == old


def test_a_lock_file_that_is_a_link_belongs_to_no_run(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"x")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / f".hfbucket-warm-{'0' * 16}.lock").symlink_to(victim)
    (tmp_path / "t" / f".hfbucket-warm-{'1' * 16}.lock").mkdir()
    os.mkfifo(tmp_path / "t" / f".hfbucket-warm-{'2' * 16}.lock")
    assert sweep(tmp_path / "t") == []
    assert len([*(tmp_path / "t").iterdir()]) == 3


@pytest.fixture
def without_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_dead_runs_are_told_by_their_processes(tmp_path):
    declaration = one_directory(tmp_path / "t")
    subprocess.run([sys.executable, "-c", NO_LOCKS + LEAVE_BEHIND, str(tmp_path / "t")], check=False)
    assert len([*(tmp_path / "t").iterdir()]) == 3
    alive = RunFiles(tmp_path / "t")
    assert sweep(tmp_path / "t") == []
    with contextlib.closing(open_tier(declaration)) as tier:
        put(tier, 1)
        assert tier.holds(classic_key(1), 1000)
    alive.close()
    assert files(declaration) == [declaration.file(classic_key(1)).name]


NO_LOCKS = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
"""


@pytest.mark.parametrize("lease", ["flock", "record"])
def test_a_run_of_another_node_is_dead_only_when_it_is_silent(tmp_path, lease):
    lock = tmp_path / f".hfbucket-warm-{'0' * 16}.lock"
    record = {"lease": lease, "host": "node-2", "boot": "another", "processes": "pid:[1]", "pid": 1, "started": "1"}
    lock.write_text(json.dumps(record))
    (tmp_path / f".hfbucket-warm-{'0' * 16}-1.part").write_bytes(b"being written there")
    now = lock.stat().st_ctime_ns
    assert sweep(tmp_path, now + int(run_lock.STALE_SECS * 1e9)) == []
    RunFiles(tmp_path).close()
    assert lock.exists()
    assert sweep(tmp_path, now + int(run_lock.STALE_SECS * 1e9) + 1) == ["0" * 16]
    assert [*tmp_path.iterdir()] == []


def test_a_run_that_lives_touches_its_lock_and_its_beginning_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECS", 0.001)
    touched, real = threading.Event(), run_lock.touch

    def touch(descriptor):
        changed = real(descriptor)
        touched.set()
        return changed

    run = RunFiles(tmp_path)
    monkeypatch.setattr(run_lock, "touch", touch)
    (lock,) = tmp_path.glob("*.lock")
    before = lock.stat()
    assert touched.wait(60)
    assert lock.stat().st_ctime_ns > before.st_ctime_ns
    assert lock.stat().st_mtime_ns == before.st_mtime_ns == began(tmp_path)
    run.close()
