"""What others wrote is shown on one line, without escapes, and without tokens; at the output of every command."""

import io
import json
import logging
import sys

import pytest

import hfbucket_plugin
import jobs  # noqa: F401 - has its loggers cleaned
import warmer  # noqa: F401 - the same
from hfbucket_plugin.config.settings import InstanceSettings, load
from hfbucket_plugin.core import texts
from hfbucket_plugin.core.keys import BucketHandle
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import console

NASTY = "a\x1b[31mb\nc\r\u202ed\u2066e\u2028f\x85g\u200fh\ud800"
LONG = "hf_testtokentesttokentest"


def test_what_is_not_printable_is_written_as_escapes():
    assert texts.shown(NASTY) == "a\\x1b[31mb\\nc\\r\\u202ed\\u2066e\\u2028f\\x85g\\u200fh\\ud800"
    assert texts.shown("ümläut 模型 🤗") == "ümläut 模型 🤗"
    assert texts.shown_lines("one\n\ttwo\x1b]0;x\x07\u202e") == "one\n\ttwo\\x1b]0;x\\x07\\u202e"


@pytest.mark.parametrize(
    "given",
    [
        "s3cr3t/+=value",
        '"s3cr3t/+=value"',
        "'s3cr3t/+=value' \n",
        "\"'s3cr3t/+=value'\"",
        "Bearer s3cr3t/+=value",
        "s3cr3t/+=value # prod",
    ],
)
def test_a_token_is_cut_in_every_spelling(given):
    texts.know(given)
    for said in ("s3cr3t/+=value", '"s3cr3t/+=value"', "s3cr3t/%2B%3Dvalue", "s3cr3t%2F%2B%3Dvalue", given):
        assert "s3cr3t" not in texts.hide(f"Bearer {said}!")
    assert texts.hide("another value") == "another value"


def test_short_tokens_are_cut_where_they_stand_by_themselves():
    texts.know("tok1")
    assert texts.hide("tok1 'tok1' tok12 atok1 x=tok1") == "*** '***' tok12 atok1 x=***"
    texts.know("x")
    assert texts.hide("x") == "x"


def test_tokens_of_the_environment_and_what_looks_like_one_are_cut(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", '"sk-0123456789"')
    monkeypatch.setenv("CI_TOKEN", "1")
    assert texts.hide(f"sk-0123456789 1 {LONG} hf_cache") == "*** 1 *** hf_cache"


def test_a_variable_that_changes_is_noticed_and_one_of_any_bytes_harms_nobody(monkeypatch):
    for value in ("first-value", "other-value"):
        monkeypatch.setenv("ONE_TOKEN", value)
        assert texts.hide(f"say {value}") == "say ***"
    monkeypatch.setenv("ONE_TOKEN", "bytes\udcff\udcfe-value")
    assert texts.shown("say bytes\udcff\udcfe-value other-value") == "say *** other-value"
    texts.know("lone\ud800surrogate")
    assert texts.shown("x") == "x"


def test_a_variable_that_another_thread_removes_meanwhile_harms_nobody(monkeypatch):
    class Environment(dict):
        def __iter__(self):
            return iter(["GONE_TOKEN", *super().__iter__()])

    texts.know("s3cr3t-value")
    monkeypatch.setattr(texts.os, "environ", Environment(ONE_TOKEN="first-value"))
    monkeypatch.setattr(texts, "_cache", [])

    assert texts.hide("s3cr3t-value first-value") == "*** ***"


def test_many_texts_are_shown_without_a_look_at_each_variable(monkeypatch):
    made, real = [], texts._secrets
    monkeypatch.setattr(texts, "_secrets", lambda: made.append(1) or real())
    monkeypatch.setattr(texts, "_cache", [])
    for _ in range(1000):
        texts.as_json({"a": ["b"] * 10})
    assert made == [1]


def test_json_stays_json():
    texts.know("1234")
    record = json.loads(texts.as_json({"a": ["1234", 1234, None, True], "1234": {"b": '"1234"'}}))
    assert record == {"a": ["***", 1234, None, True], "***": {"b": '"***"'}}


def test_tokens_that_were_rotated_long_ago_are_forgotten():
    for number in range(1000):
        texts.know(f"token-{number:08}")
    assert texts.hide("token-00000999 token-00000000") == "*** token-00000000"
    assert len(texts._known) == 256


def test_a_setting_that_gives_a_token_has_it_known(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", '"abc-def"')
    settings = InstanceSettings.model_validate(
        {"bucket_handle": "hf://buckets/a/b", "token_env": "SOME_VARIABLE", "token": "inline-one"}
    )
    assert texts.hide("inline-one") == "***"
    settings.resolve_token()
    assert texts.hide("the Hub says abc-def") == "the Hub says ***"


@pytest.mark.parametrize("token", ["hf_abc123", "s3cr3t-one", LONG])
def test_a_token_in_the_wrong_place_is_not_repeated(token):
    with pytest.raises(ConfigError) as caught:
        BucketHandle.parse(token)
    assert token not in str(caught.value)
    for values in ({"bucket_handle": token}, {"bucket_handle": "hf://buckets/a/b", token: "x"}):
        with pytest.raises(ConfigError) as caught:
            load({f"remote_storage_plugin.hfbucket.us.{name}": value for name, value in values.items()}, "hfbucket.us")
        assert token not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'bucket_handle'"):
        load({"remote_storage_plugin.hfbucket.us.bucket_handel": "x"}, "hfbucket.us")


def test_the_engines_log_is_clean_whatever_handler_gets_it(caplog):
    texts.know("s3cr3t-one")
    assert hfbucket_plugin.__path__
    log = logging.getLogger("hfbucket_plugin.store.read")
    log.warning("the Hub says %s %r %d", NASTY, "s3cr3t-one", 3)
    error = ValueError(f"{NASTY} s3cr3t-one")
    log.error("a task failed", exc_info=error)
    assert "s3cr3t-one" not in caplog.text
    assert "\x1b" not in caplog.text
    assert "\u202e" not in caplog.text
    first, second = caplog.records
    assert first.getMessage() == f"the Hub says {texts.printable(NASTY)} '***' 3"
    assert "ValueError: a\\x1b[31mb" in second.exc_text


def test_a_record_that_cannot_be_formatted_harms_nobody():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%d", ("no number",), None)
    assert texts._CLEAN.filter(record)


def test_commands_print_clean_lines(capsys):
    texts.know("s3cr3t-one")
    console.line(f"{NASTY} s3cr3t-one")
    console.print_error(f"{NASTY} s3cr3t-one")
    console.json_line({"name": NASTY, "words": "s3cr3t-one"})
    console.stdout_console().print(console.columns(NASTY, ("a", "b"), [(NASTY, "s3cr3t-one")]))
    reported = capsys.readouterr()
    for text in (reported.out, reported.err):
        assert not set(text) & {"\x1b", "\r", "\u202e", "\u2066", "\u2028", "\x85", "\u200f"}
        assert "s3cr3t-one" not in text
    assert reported.err.count("\n") == 1


def test_what_libraries_log_beside_a_command_is_clean(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    texts.log_to_stderr("warmer")
    logging.getLogger("another.package").warning("%s", NASTY)
    assert capsys.readouterr().err == f"warmer: {texts.printable(NASTY)}\n"


def test_loggers_of_inner_packages_are_clean_too():
    for name in ("hfbucket_plugin.cli.checks.engine", "warmer.tiers.disk_budget", "jobs.lock.lock"):
        assert logging.getLogger(name).filters, name


def test_no_token_passes_the_streams_of_a_command(monkeypatch):
    texts.know("s3cret-of-ours")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())

    texts.hide_in_streams()
    texts.hide_in_streams()
    sys.stdout.write(f'{{"error": "s3cret-of-ours", "model": "{LONG}"}}\n')
    sys.stderr.writelines(["Traceback: s3cret-of-ours\n"])

    assert sys.stdout.getvalue() == f'{{"error": "***", "model": "{LONG}"}}\n'
    assert sys.stderr.getvalue() == "Traceback: ***\n"
