import json
import os
from collections import Counter
from pathlib import Path

import pytest

from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import classic_key, content, mp_key
from warmer.plan.key_files import keys_of, look_up_keys


def written(tmp_path, *lines):
    path = tmp_path / "keys"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_keys_one_a_line(tmp_path):
    keys = [classic_key(1, "ü/mo del"), mp_key(2), classic_key(3)]
    assert list(keys_of(written(tmp_path, keys[0], "", *keys[1:]))) == keys
    path = tmp_path / "windows"
    path.write_bytes(("\r\n".join(keys) + "\r\n").encode())
    assert list(keys_of(path)) == keys


def test_keys_of_an_earlier_report_or_plan(tmp_path):
    failure = json.dumps({"event": "failure", "node": "n", "key": classic_key(1), "kind": "transport"})
    chunk = json.dumps({"key": classic_key(2), "path": "p", "xet_hash": "00", "size": 1})
    summary = json.dumps({"event": "summary", "failed": 1})
    assert list(keys_of(written(tmp_path, failure, chunk, summary))) == [classic_key(1), classic_key(2)]


def test_keys_of_the_directory_of_an_engine(tmp_path):
    (tmp_path / f"{classic_key(1).replace('/', '-SEP-')}.data").touch()
    (tmp_path / "org-SEP-model@0x01000100@0@00001002.data").touch()
    (tmp_path / "something else").touch()
    assert sorted(keys_of(tmp_path)) == sorted([mp_key(2), classic_key(1)])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no key", "line 2: 'no key'"),
        ("{", "line 2"),
        ('{"key": 3}', "line 2: its key is no text"),
        (f"junk\u2028{classic_key(2)}", "line 2: character 5 is U\\+2028"),
        (f"{classic_key(2)}\x0b{classic_key(3)}", "line 2: .*U\\+000B"),
        (json.dumps({"key": "org/m\ud800@1@0@1001@bfloat16"}), "line 2: .*U\\+D800"),
        (json.dumps({"key": classic_key(2, "org/m\x85")}), "line 2: .*U\\+0085"),
    ],
)
def test_what_is_no_key_is_named_with_its_line(tmp_path, line, said):
    with pytest.raises(ConfigError, match=said):
        list(keys_of(written(tmp_path, classic_key(1), line)))


def test_what_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a regular file"):
            list(keys_of(path))
    with pytest.raises(ConfigError, match="No such file"):
        list(keys_of(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        list(keys_of(tmp_path / "binary"))


def test_keys_are_looked_up_in_their_order_and_once(hub, warehouse):
    warehouse.put({classic_key(n): content(n, 100) for n in range(4)})
    skipped = Counter()
    asked = [classic_key(n) for n in (3, 0, 9, 3, 2)]
    hub.control.reset_counters()
    entries = list(look_up_keys(warehouse.open(), asked, skipped))
    assert [entry.text for entry in entries] == [classic_key(n) for n in (3, 0, 2)]
    assert all(entry.uploaded_at is not None and entry.content.size == 100 for entry in entries)
    assert skipped == {"not_in_bucket": 1}
    assert hub.control.counters().route("paths-info").requests == 1
