import os

import hf_xet
import pytest

from localhub.formats.hashing import EMPTY_FILE_HASH, chunk_hash, file_hash, from_hex, to_hex, xorb_hash


def test_text_form_of_hashes():
    digest = bytes(range(32))
    assert to_hex(digest) == "07060504030201000f0e0d0c0b0a090817161514131211101f1e1d1c1b1a1918"
    assert from_hex(to_hex(digest)) == digest
    assert from_hex(to_hex(digest).upper()) == digest


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "g" * 64, "+" + "0" * 63, " " * 64])
def test_invalid_hashes_are_refused(text):
    with pytest.raises(ValueError, match="not a Xet hash"):
        from_hex(text)


def test_hashes_of_files_of_one_chunk_are_those_of_hf_xet(tmp_path):
    for content in (b"", b"x", os.urandom(5000)):
        path = tmp_path / "file"
        path.write_bytes(content)
        nodes = [(chunk_hash(content), len(content))] if content else []
        assert to_hex(file_hash(nodes)) == hf_xet.hash_files([str(path)])[0].hash
    assert file_hash([]) == EMPTY_FILE_HASH


def test_a_tree_of_one_chunk_is_the_chunk_and_the_order_of_several_counts():
    nodes = [(chunk_hash(bytes([one])), 1) for one in range(200)]
    assert xorb_hash(nodes[:1]) == nodes[0][0]
    assert xorb_hash(nodes) != xorb_hash(nodes[::-1])
    assert xorb_hash(nodes) != xorb_hash([(digest, size + 1) for digest, size in nodes])
