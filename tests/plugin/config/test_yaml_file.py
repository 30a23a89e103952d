"""YAML that people write for us: what is refused is told by line and column, and never by its values."""

import os
import threading

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbucket_plugin.config import yaml_file
from hfbucket_plugin.config.yaml_file import parse_yaml, read_yaml
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import SECRET


def complaint(text):
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "warm.yaml")
    message = str(refused.value)
    assert message.startswith("warm.yaml is not valid YAML")
    assert "\n" not in message
    assert SECRET not in message
    assert refused.value.__context__ is None, "a traceback would show the file"
    return message


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("a: 1\nb: 2024-13-45", "line 2, column 4", "not a valid date"),
        ("when: 2001-01-01 00:00:00 +96:00", "line 1, column 7", "not a valid date"),
        ("when: 0001-01-01 00:00:00 +23:59", "line 1, column 7", "not a valid date"),
        ("a:\n  n: !!int zzz", "line 2, column 6", "not a valid integer"),
        ("n: !!float zzz", "line 1, column 4", "not a valid number"),
        ("n: !!bool zzz", "line 1, column 4", "not a valid boolean"),
        ("n: !!timestamp zzz", "line 1, column 4", "not a valid date"),
        (f"n: {'9' * 401}", "line 1, column 4", "out of range"),
        (f"n: {'9' * 5000}", "line 1, column 4", "not a valid integer"),
        ("n: -18446744073709551616", "line 1, column 4", "out of range"),
        ("n: 1.0e+400", "line 1, column 4", "out of range"),
        ("[" * 100_000, "line 1, column 65", "nests deeper than 64"),
        ("{a: " * 65, "line 1, column 257", "nests deeper than 64"),
        ("- " * 100, "line 1, column 129", "nests deeper than 64"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1", "'a' is there twice"),
        (f"{SECRET}: 1\n{SECRET}: 2", "line 2, column 1", "a key is there twice"),
        ("a: &a [*a]", "line 1, column 4", "an alias stands for what it is part of"),
        (r't: "\ud800"', "line 1, column 4", "surrogate"),
        (r't: "\Uffffffff"', "line 1", "does not parse"),
        (f"token: {SECRET}\x00", "line 1", "not allowed"),
        (f"token: *{SECRET}", "line 1, column 8", "undefined alias"),
        (f"token: !{SECRET} 1", "line 1, column 8", "tag"),
        ("a: 1\n---\nb: 2", "line 2, column 1", "single document"),
    ],
    ids=lambda value: value[:20],
)
def test_a_document_that_is_refused_says_where_and_why(text, where, problem):
    message = complaint(text)

    assert where in message
    assert problem in message


def test_a_document_of_too_many_values_is_refused(monkeypatch):
    monkeypatch.setattr(yaml_file, "_MAX_NODES", 100)

    assert "line 100, column 3: it holds more than 100 values" in complaint("- 1\n" * 101)


@pytest.mark.parametrize("merge", ["[*%s, *%s]", "{<<: [*%s, *%s]}"])
def test_aliases_that_multiply_are_refused_before_they_are_written_out(merge):
    lines = ["a0: &a0 {x: 1}" if "<<" in merge else "a0: &a0 [1]"]
    lines += [f"a{n}: &a{n} " + merge % (f"a{n - 1}", f"a{n - 1}") for n in range(1, 40)]

    assert "stand for more than" in complaint("\n".join(lines))


def test_aliases_and_merges_of_ordinary_size_are_taken():
    text = "base: &base {a: 1, b: 2}\none: {<<: *base, a: 3}\ntwo: [*base, *base]\n"

    assert parse_yaml(text, "x") == yaml.safe_load(text)


def test_a_file_is_read_with_a_byte_order_mark_and_up_to_its_bound(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path, "--config") == {"a": 1}
    path.write_bytes(b"a: 1\n# " + b"x" * yaml_file.MAX_BYTES)
    with pytest.raises(ConfigError, match="longer than"):
        read_yaml(path, "--config")
    path.write_bytes(b"a: 1\nb: \xff")
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        read_yaml(path, "--config")
    with pytest.raises(ConfigError, match="longer than"):
        read_yaml(tmp_path.__class__("/dev/zero"), "--config")


def test_a_pipe_is_read_and_one_that_nobody_writes_to_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("a: 1\n"))
    writer.start()
    assert read_yaml(path, "--config") == {"a": 1}
    writer.join()

    monkeypatch.setattr(yaml_file, "_PIPE_SECS", 0.05)
    with pytest.raises(ConfigError, match="nothing was written"):
        read_yaml(path, "--config")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=5,
)


@settings(max_examples=60)
@given(PLAIN)
def test_what_yaml_writes_is_read_back_as_yaml_reads_it(value):
    text = yaml.safe_dump(value, allow_unicode=True)
    assert repr(parse_yaml(text, "x")) == repr(yaml.safe_load(text))


@settings(max_examples=60)
@given(st.text(max_size=200) | st.text(alphabet="[]{}&*!-:?|>'\"%@`,# \n\tab0.~<=+\\eux", max_size=60))
def test_any_text_is_taken_or_refused_by_one_line(text):
    try:
        parse_yaml(text, "x")
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is right
