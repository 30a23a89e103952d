import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from warming import classic_key, content

from warmer.errors import TierError
from warmer.tiers import open_tier
from warmer.tiers.declaration import DirectoryDeclaration
from warmer.tiers.file_lease import FileLease
from warmer.tiers.leftovers import RunFiles, sweep

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


def test_a_chunk_appears_whole_and_at_once(tier, declaration):
    draft = tier.draft(KEY, 10)
    assert draft.lease.write(5, b"world")
    assert visible(declaration) == []
    assert draft.lease.write(0, b"hello")
    assert not tier.holds(KEY, 10)
    draft.publish()
    draft.discard()
    assert declaration.file(KEY).read_bytes() == b"helloworld"
    assert tier.holds(KEY, 10)
    assert not tier.holds(KEY, 9)


def test_a_discarded_chunk_leaves_nothing(tier, declaration):
    before = files(declaration)
    draft = tier.draft(KEY, 10)
    draft.discard()
    draft.discard()
    assert files(declaration) == before


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
    directory.rename(directory.with_name("elsewhere"))  # by whoever owns the tier
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


def test_a_key_too_long_for_a_file_name_is_a_failure_of_that_chunk(tier):
    key = classic_key(1, "m" * 300)
    with pytest.raises(TierError, match="name too long"):
        tier.holds(key, 1)


def test_a_tier_whose_directory_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierError, match="file"):
        open_tier(DirectoryDeclaration("fs.warm", (tmp_path / "file" / "tier",)))


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(tier, declaration, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    draft = tier.draft(KEY, 3)
    draft.lease.write(0, b"abc")
    draft.publish()
    assert declaration.file(KEY).read_bytes() == b"abc"


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
from warmer.tiers.declaration import DirectoryDeclaration
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


def test_a_key_that_no_file_can_bear_is_the_chunks_failure(tier):
    odd = f"{KEY}@t%\x00"

    with pytest.raises(TierError, match="null byte"):
        tier.holds(odd, 10)
