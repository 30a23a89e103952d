"""How policies are written, and what is said of those that cannot be meant."""

from datetime import timedelta

import pytest

from hfbucket_plugin.core.units import format_duration, parse_bytes, parse_duration
from hfbucket_plugin.errors import ConfigError
from jobs.retention import policy


@pytest.mark.parametrize(
    ("text", "seconds"), [("14d", 1209600), ("1h", 3600), ("30min", 1800), ("90s", 90), ("2w", 1209600), ("1.5h", 5400)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == timedelta(seconds=seconds)
    assert parse_duration(format_duration(parse_duration(text))) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["14", 14, "", "d", "-1d", "1 month", "1D", None, True, "٣d", "99999999999w"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="invalid"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("2TiB", 2 << 40), ("500GB", 500 * 10**9), (7, 7), ("7", 7), ("1.5KiB", 1536), ("10 B", 10)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["2T", "-1", -1, "1.5", True, 1.5, None, "GiB", "2tib"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="invalid"):
        parse_bytes(text)


FILE = """
default: {max_age: 30d}
instances:
  hfbucket.us:
    max_age: 14d
    max_bytes: 2TiB
    min_age: 2h
    keep_newest: 100
    keep_prefix: ["org/model@8@"]
    models: {keep: [org/model, org/other]}
    rules:
      - {prefix: "org/model@1@", max_age: 3d}
      - {model: org/other, max_objects: 5}
"""


def test_a_file_has_a_policy_for_each_instance(tmp_path):
    path = tmp_path / "retention.yaml"
    path.write_text(FILE)

    us = policy.read(path, "hfbucket.us")
    assert (us.max_age, us.max_bytes, us.min_age) == (timedelta(days=14), 2 << 40, timedelta(hours=2))
    assert [rule.matches("org/model@1@0@ff@half") for rule in us.rules] == [True, False]
    assert policy.read(path, "hfbucket.eu").max_age == timedelta(days=30)
    assert policy.from_values(us.record(), "plan") == us


@pytest.mark.parametrize(
    ("values", "reported"),
    [
        ({"max_aeg": "1d"}, "did you mean 'max_age'"),
        ({"max_age": "14"}, "max_age: invalid duration"),
        ({"max_age": "0s"}, "max_age"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"keep_prefix": [""], "max_age": "1d"}, "keep_prefix.0"),
        ({"models": {"keep": []}}, "models.keep"),
        ({"rules": [{"max_age": "1d"}]}, "a rule needs prefix or model"),
        ({"rules": [{"prefix": "", "max_age": "1d"}]}, "rules.0.prefix"),
        ({"keep_newest": 5}, "deletes nothing"),
        ({}, "deletes nothing"),
        ([], "must be a mapping"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, reported):
    with pytest.raises(ConfigError, match=reported):
        policy.from_values(values, "here")


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("instances: {hfbucket.eu: {max_age: 1d}}", "no policy for instance 'hfbucket.us' and no default"),
        ("max_age: 1d", "must be a mapping with instances"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not valid YAML at line 1, column 5"),
        ("default: {max_age: !!int 9 days}", "is not valid YAML at line 1, column 20: a value is not a valid integer"),
    ],
)
def test_files_that_say_nothing_for_an_instance(tmp_path, text, reported):
    path = tmp_path / "retention.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reported):
        policy.read(path, "hfbucket.us")


@pytest.mark.parametrize(
    "text",
    [
        "instances:\n  us: {max_age: 14d, keep_prefix: [org/precious@]}\n  us: {max_age: 7d}\n",
        "default:\n  max_age: 14d\n  max_age: 7d\n",
        "default: {max_age: 14d}\ninstances: {}\ndefault: {max_age: 7d}\n",
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, text):
    path = tmp_path / "retention.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is there twice"):
        policy.read(path, "us")


@pytest.mark.parametrize("setting", ["max_objects", "keep_newest", "max_bytes"])
@pytest.mark.parametrize("value", [True, False, 5.0, "yes"])
def test_a_number_is_no_yes_or_no(setting, value):
    with pytest.raises(ConfigError, match=setting):
        policy.from_values({"max_age": "14d", setting: value}, "flags")
