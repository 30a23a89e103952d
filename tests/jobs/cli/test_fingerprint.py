"""`python -m jobs fingerprint` on a real local Hub, and that nothing else touches what it shows."""

import json

import pytest

from hfbucket_plugin.fingerprint.model import Fingerprint, FingerprintClaim, Record
from tests.support.buckets import DAY, INSTANCE, MODEL, PREFIX, all_paths, download, key, upload

HEAD = f"{PREFIX}/.hfbucket/fingerprints/org%2Fmodel"


def engine(chunk_size=256, **values):
    known = {"mode": "classic", "model": MODEL, "world_size": 2, "dtype": "bfloat16", "written_by": "host-a"}
    return Fingerprint(chunk_size=chunk_size, **known | values)


RECORDED, OTHER, GONE = engine(), engine(128, written_by="host-b"), engine(64)


@pytest.fixture
def met(depot):
    """An instance in which two fleets met, and a third one was there."""
    record = Record(model=MODEL).having(RECORDED).having(engine(512, world_size=4))
    upload(
        depot.hub.endpoint,
        depot.bucket_id,
        {f"{HEAD}.json": record.to_json()}
        | {f"{HEAD}/{one.digest}.json": FingerprintClaim.to_json(one) for one in (RECORDED, OTHER, GONE)},
    )
    return depot


def fingerprint(depot, command, *arguments):
    return depot.run(f"fingerprint {command}", *arguments)


def recorded(depot):
    return Record.from_json(download(depot.hub.endpoint, depot.bucket_id, f"{HEAD}.json"), MODEL, HEAD)


def test_show_tells_what_is_recorded_and_who_is_not_like_it(met):
    ran = fingerprint(met, "show")

    assert ran.code == 0
    first, second, *claims = ran.stdout.splitlines()
    assert first.startswith(
        f"{INSTANCE}: {MODEL}: classic, world size 2, bfloat16: recorded {RECORDED.digest}: chunk_size 256"
    )
    assert "world size 4" in second
    assert len(claims) == 2
    assert f"claimed {OTHER.digest}: CONFLICT: chunk_size is 256 in the bucket and 128 there." in ran.stdout
    assert "written_by host-b" in ran.stdout


def test_show_for_programs(met):
    rows = [json.loads(line) for line in fingerprint(met, "show", "--json", "--model", MODEL).stdout.splitlines()]

    assert [(row["kind"], row["digest"]) for row in rows][:1] == [("recorded", RECORDED.digest)]
    assert {row["digest"] for row in rows if row["conflict"]} == {OTHER.digest, GONE.digest}
    assert Fingerprint.model_validate(rows[0]["fingerprint"]) == RECORDED


def test_show_where_nothing_is_and_where_it_cannot_be_read(depot):
    assert fingerprint(depot, "show").stdout == f"{INSTANCE}: no fingerprint is recorded\n"

    upload(depot.hub.endpoint, depot.bucket_id, {f"{HEAD}.json": b"garbage", f"{HEAD}/{'0' * 16}.json": b"{}"})
    ran = fingerprint(depot, "show")

    assert ran.code == 3
    assert ran.stdout.count("unreadable") == 2


def test_accept_says_what_it_does_and_does_it_when_told(met):
    shown = fingerprint(met, "accept", "--model", MODEL, "--digest", OTHER.digest[:8])

    assert shown.code == 0
    before, after, changes = shown.stdout.splitlines()
    assert "before: " in before
    assert "chunk_size 256" in before
    assert "after: " in after
    assert "chunk_size 128" in after
    assert changes.endswith("changes: chunk_size is 256 in the bucket and 128 from then on")
    assert recorded(met).of(RECORDED.space) == RECORDED
    assert "nothing was changed" in shown.stderr

    done = fingerprint(met, "accept", "--model", MODEL, "--digest", OTHER.digest[:8], "--yes")

    assert done.code == 0
    assert recorded(met).of(RECORDED.space) == OTHER
    assert {one.world_size for one in recorded(met).variants} == {2, 4}, "others stay"
    assert len(all_paths(met.hub.endpoint, met.bucket_id)) == 4


def test_accept_clears_what_is_not_like_it(met):
    done = fingerprint(met, "accept", "--model", MODEL, "--digest", OTHER.digest, "--clear-claims", "--yes")

    assert done.code == 0
    left = [path for path in all_paths(met.hub.endpoint, met.bucket_id) if path.startswith(f"{HEAD}/")]
    assert left == [f"{HEAD}/{OTHER.digest}.json"]
    assert done.stdout.count("to be deleted") == 2


def test_accept_takes_a_file_and_fixes_a_record_that_cannot_be_read(met, tmp_path):
    upload(met.hub.endpoint, met.bucket_id, {f"{HEAD}.json": b"garbage"})
    lines = [json.loads(line) for line in fingerprint(met, "show", "--json").stdout.splitlines()]
    (line,) = [line for line in lines if line["digest"] == GONE.digest]
    path = tmp_path / "right.json"
    path.write_text(json.dumps(line))

    done = fingerprint(met, "accept", "--from-file", str(path), "--yes")

    assert done.code == 0, done.stderr
    assert "before: " in done.stdout
    assert "not JSON" in done.stdout
    assert recorded(met).variants == (GONE,)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name the fingerprint"),
        (["--digest", "0"], 2, "--model NAME"),
        (["--digest", "zz", "--model", MODEL], 4, "no claim of 'org/model' with the digest 'zz': there are"),
        (["--digest", "", "--model", MODEL], 2, "--digest is empty"),
        (["--from-file", "/nowhere"], 2, "cannot be read"),
        (["--from-file", "/dev/null"], 2, "not JSON"),
    ],
)
def test_accept_refuses(met, arguments, code, words):
    ran = fingerprint(met, "accept", *arguments, "--yes")

    assert ran.code == code
    assert words in ran.stderr
    assert recorded(met).of(RECORDED.space) == RECORDED


def test_accept_does_not_overwrite_what_a_later_release_recorded(met):
    newer = json.dumps({"schema": 2, "model": MODEL, "variants": {"of": "another form"}}).encode()
    upload(met.hub.endpoint, met.bucket_id, {f"{HEAD}.json": newer})

    ran = fingerprint(met, "accept", "--model", MODEL, "--digest", OTHER.digest, "--yes")

    assert ran.code == 4
    assert "install the release that wrote it" in ran.stderr
    assert download(met.hub.endpoint, met.bucket_id, f"{HEAD}.json") == newer


def test_accept_does_not_overwrite_what_nobody_was_shown(met, monkeypatch):
    def asked(*_):
        upload(met.hub.endpoint, met.bucket_id, {f"{HEAD}.json": Record(model=MODEL).having(GONE).to_json()})
        return True

    monkeypatch.setattr("hfbucket_plugin.tools.console.at_terminal", lambda: True)
    monkeypatch.setattr("jobs.cli.fingerprint._asked", asked)
    ran = fingerprint(met, "accept", "--model", MODEL, "--digest", OTHER.digest)

    assert ran.code == 4
    assert "changed since it was shown" in ran.stderr
    assert recorded(met).variants == (GONE,)


def test_a_cleanup_passes_them_by(met):
    met.put({key(number): b"x" * 100 for number in range(3)}, age=20 * DAY)
    own = [path for path in all_paths(met.hub.endpoint, met.bucket_id) if "/.hfbucket/fingerprints/" in path]
    met.make_older(own, 400 * DAY)

    ran = met.cleanup("--max-age", "1d", "--foreign", "delete", "--max-delete", "100%", "--yes")

    assert ran.code == 0, ran.stderr
    left = all_paths(met.hub.endpoint, met.bucket_id)
    assert set(own) <= set(left)
    assert not [path for path in left if "/.hfbucket/" not in path]
