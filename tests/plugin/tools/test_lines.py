import os

import pytest

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.lines import MAX_LINE_BYTES, check_characters, key_lines, lines_of


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.txt"


def test_lines_end_with_newlines_only_and_byte_order_marks_before_them_are_dropped(file):
    file.write_bytes(
        "\ufeffone\r\ntwo\u2028three\x0b\x0c\x1c\x85\rfour\n\n\ufefffrom another file\nlast\ufeff".encode()
    )

    assert list(lines_of(file, "--it")) == [
        (1, "one"),
        (2, "two\u2028three\x0b\x0c\x1c\x85\rfour"),
        (3, ""),
        (4, "from another file"),
        (5, "last\ufeff"),
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\t", "\0", "\x7f"])
def test_a_control_character_in_a_key_is_an_error_that_names_the_line(file, character):
    file.write_bytes(f"one\n\njunk{character}two\n".encode())

    with pytest.raises(ConfigError, match=rf"--it '.*keys.txt', line 3: character 5 is U\+{ord(character):04X}"):
        list(key_lines(file, "--it"))


def test_blank_lines_are_left_out_and_letters_of_all_scripts_are_kept(file):
    file.write_bytes("\n  \norg/m ü 模型@1\r\n".encode())

    assert list(key_lines(file, "--it")) == [(3, "org/m ü 模型@1")]


def test_a_lone_surrogate_is_named():
    with pytest.raises(ValueError, match=r"character 2 is U\+D800"):
        check_characters("a\ud800")


def test_what_is_not_utf_8_is_named_with_its_line(file):
    file.write_bytes(b"one\n\xff\n")

    with pytest.raises(ConfigError, match="line 2: not valid UTF-8"):
        list(lines_of(file, "--it"))


def test_a_line_without_end_is_not_read_to_its_end(file):
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)

    with pytest.raises(ConfigError, match=f"line 1: longer than {MAX_LINE_BYTES} bytes"):
        list(lines_of(file, "--it"))


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path, file):
    os.mkfifo(file)

    for path in (file, tmp_path, "/dev/zero"):
        with pytest.raises(ConfigError, match="is not a regular file"):
            list(lines_of(path, "--it"))


def test_what_is_not_there_is_named(file):
    with pytest.raises(ConfigError, match=r"--it '.*keys\.txt' cannot be read: No such file"):
        list(key_lines(file, "--it"))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(key_lines("a\0b", "--it"))
