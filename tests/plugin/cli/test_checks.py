"""What the checks judge, without a Hub."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.cli.checks import access, bucket, endpoint, engine
from hfbucket_plugin.cli.findings import Finding, Severity, exit_code, from_error
from hfbucket_plugin.config.instances import InstanceConfig
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core import texts
from hfbucket_plugin.core.concurrency import call_with_deadline
from hfbucket_plugin.core.keys import BucketHandle, ContentId, encode_name
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    BudgetError,
    ConfigError,
    DeadlineError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.tools.inventory import Classifier, ObjectKind
from tests.support.buckets import HEAD, INSTANCE, PREFIX, SECRET, TOKEN_ENV, instance_settings, key, l2_key
from tests.support.models import untimed

OURS = {f"{HEAD}module_path": "hfbucket_plugin.adapter"}
SEEDED = {"PYTHONHASHSEED": "0"}


def named(mode="classic", own=None, extra=None, **settings):
    config = EngineConfig("lmcache.yaml", (INSTANCE,), OURS | (extra or {}), engine=own or {})
    settings = {"token_env": TOKEN_ENV} | settings
    return InstanceConfig(
        INSTANCE,
        instance_settings("http://hub", "org/bucket", PREFIX, **settings),
        mode,
        config if mode == "classic" else None,
    )


def reported(finding):
    return str(finding)


# --- the engine --------------------------------------------------------------------------------------------------------

WRONG = [
    ({"save_unfull_chunk": True}, {}, "save_unfull_chunk must be false"),
    ({"save_unfull_chunk": "true"}, {}, "save_unfull_chunk must be false"),
    ({"enable_blending": True}, {}, "save_unfull_chunk must be false"),
    ({}, {"save_chunk_meta": True}, "extra_config.save_chunk_meta must be false"),
    ({"use_layerwise": True}, {}, "use_layerwise must be false"),
    ({"remote_serde": "cachegen"}, {}, "remote_serde must be naive, not 'cachegen'"),
]
RIGHT = [{}, {"save_unfull_chunk": "false"}, {"remote_serde": None}, {"use_layerwise": False}]


def findings(one, environ=SEEDED):
    return {finding.check: finding for finding in engine.check_engine(one, environ)}


@pytest.mark.parametrize(("own", "extra", "words"), WRONG)
def test_settings_of_the_engine_that_the_connector_refuses(own, extra, words):
    finding = findings(named(own=own, extra=extra))["engine"]

    assert finding.severity is Severity.ERROR
    assert words in finding.found
    assert "lmcache.yaml" in finding.fix


@pytest.mark.parametrize("own", RIGHT)
def test_settings_of_the_engine_that_will_do(own):
    assert findings(named(own=own))["engine"].severity is Severity.OK


def test_they_are_those_that_the_connector_refuses(tmp_path):
    import yaml
    from lmcache.v1.config import LMCacheEngineConfig

    from hfbucket_plugin.engine.classic import _check_engine

    path = tmp_path / "lmcache.yaml"
    for own, extra in [(own, extra) for own, extra, _ in WRONG] + [(own, {}) for own in RIGHT]:
        path.write_text(yaml.safe_dump(own | {"extra_config": extra or {"x": 1}}))
        config = LMCacheEngineConfig.from_file(str(path))
        config.validate()
        try:
            _check_engine(config, INSTANCE)
            theirs = ""
        except ConfigError as error:
            theirs = str(error).removeprefix(f"instance {INSTANCE!r}: ")
        assert "; ".join(engine.refused(EngineConfig.read(path))) == theirs, (own, extra)


@pytest.mark.parametrize(
    ("own", "get", "fits"),
    [
        ({}, None, True),
        ({}, 9.9, True),
        ({}, 10.0, False),
        ({"blocking_timeout_secs": 20}, 15.0, True),
        ({"blocking_timeout_secs": "20"}, 25.0, False),
        ({"blocking_timeout_secs": 0}, 9.0, True),
        ({"blocking_timeout_secs": "soon"}, 11.0, False),
        ({"blocking_timeout_secs": None}, 9.0, True),
    ],
)
def test_a_get_must_end_before_lmcache_gives_it_up(own, get, fits):
    finding = findings(named(own=own, **({} if get is None else {"get_timeout_secs": get})))["engine"]

    assert (finding.severity is Severity.OK) is fits
    assert fits or f"{HEAD}get_timeout_secs" in finding.found


def test_an_instance_that_the_builtin_backend_serves():
    finding = findings(named(extra={f"{HEAD}module_path": None}))["engine"]

    assert finding.severity is Severity.NOTE
    assert f"{HEAD}module_path" in finding.fix


@pytest.mark.parametrize(
    ("environ", "severity"),
    [({}, "warning"), ({"PYTHONHASHSEED": "random"}, "warning"), ({"PYTHONHASHSEED": ""}, "warning"), (SEEDED, "ok")],
)
def test_the_seed_of_the_hashes(environ, severity):
    assert str(findings(named(), environ)["hash seed"].severity) == severity


def test_mp_mode_has_no_engine_of_ours():
    assert set(findings(named("mp"), {})) == {"config"}


# --- the token ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "settings", "severity", "words"),
    [
        ({TOKEN_ENV: SECRET}, {}, "ok", f"from the environment variable {TOKEN_ENV}"),
        ({}, {}, "warning", f"set {TOKEN_ENV}, or name another variable with {HEAD}token_env"),
        ({TOKEN_ENV: " "}, {}, "warning", "is not set here"),
        ({}, {"role": "read-only"}, "note", "only public buckets can be read"),
        ({}, {"token": SECRET}, "warning", f"set {TOKEN_ENV} instead"),
        ({TOKEN_ENV: SECRET}, {"token": SECRET}, "note", f"{HEAD}token is not used"),
        ({TOKEN_ENV: f"{SECRET}\n{SECRET}"}, {}, "error", "cannot be sent"),
        ({TOKEN_ENV: f"{SECRET}é"}, {}, "error", "cannot be sent"),
    ],
)
def test_tokens(environ, settings, severity, words):
    finding = access.check_token(named(**settings), environ)

    assert str(finding.severity) == severity
    assert words in reported(finding)
    assert SECRET not in repr(finding)


# --- the way and the clock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "settings", "severity"),
    [
        ([0.01, 0.02, 5.0], {}, "ok"),
        ([1.0, 0.2, 3.0], {}, "warning"),
        ([1.0, 2.0, 3.0], {"lookup_timeout_secs": 2.5}, "ok"),
        ([1.0, 2.0, 3.0], {"role": "write-only"}, "ok"),
    ],
)
def test_a_way_that_is_longer_than_a_lookup_waits(rounds, settings, severity):
    finding = endpoint.judge_way(named(**settings), 0.5, rounds)

    assert str(finding.severity) == severity
    assert severity == "ok" or f"{HEAD}lookup_timeout_secs" in finding.fix
    assert "the first took 500 ms" in finding.found


@untimed
@given(st.floats(-1e6, 1e6))
def test_clocks(ahead):
    hub = datetime(2025, 6, 1, tzinfo=UTC)
    finding = endpoint.judge_clock(endpoint.Greeting(0.1, format_datetime(hub, usegmt=True), hub.timestamp() + ahead))

    assert (finding.severity is Severity.OK) is (abs(ahead) <= endpoint.MAX_SKEW_SECS)


@untimed
@given(st.text() | st.sampled_from(["", "0", "Sun, 01 Jun 2025", "Sun, 01 Jun 2025 00:00:00 -0000"]))
def test_a_date_may_be_anything(date):
    assert endpoint.judge_clock(endpoint.Greeting(0.1, date, time.time())).severity is not Severity.ERROR


# --- the bucket and the rights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "o/b exists"),
        ({"private": None, "size": "?", "totalFiles": 3, "region": 7}, "o/b exists"),
        (
            {"private": True, "region": "eu", "size": 0, "totalFiles": 1},
            "o/b exists, private, region eu, 0 B in 1 object",
        ),
        ({"private": False}, "o/b exists, public"),
    ],
)
def test_records_of_buckets(record, words):
    finding = bucket.describe("o/b", record)

    assert finding.found == words
    assert finding.severity is (Severity.NOTE if record.get("private") is False else Severity.OK)


def test_rights_and_roles():
    expected = {
        ("read-write", "read", True): "ok",
        ("read-write", "read", False): "error",
        ("read-write", "write", True): "ok",
        ("read-write", "write", False): "error",
        ("read-only", "read", True): "ok",
        ("read-only", "read", False): "error",
        ("read-only", "write", True): "note",
        ("read-only", "write", False): "ok",
        ("write-only", "read", True): "ok",
        ("write-only", "read", False): "ok",
        ("write-only", "write", True): "ok",
        ("write-only", "write", False): "error",
    }
    combinations = product(["read-write", "read-only", "write-only"], ["read", "write"], [True, False])
    assert {
        (role, right, granted): str(access.judge(named(role=role), right, None if granted else "403").severity)
        for role, right, granted in combinations
    } == expected


# --- listings ----------------------------------------------------------------------------------------------------------

BUCKET = SimpleNamespace(handle=BucketHandle("org", "bucket", PREFIX))
NOW = datetime(2025, 6, 1, tzinfo=UTC)


def listed(name, size=100, age=0):
    when = None if age is None else NOW - timedelta(seconds=age)
    return Classifier(BUCKET).classify(ObjectInfo(f"{PREFIX}/{name}", ContentId("0" * 64, size), when))


def look(*objects, own=ObjectKind.CLASSIC):
    return bucket.look(objects, own)


def test_kinds_of_objects():
    names = {
        encode_name(key(1)): ObjectKind.CLASSIC,
        encode_name(l2_key(1)): ObjectKind.MP,
        encode_name("test@1@0@0@bfloat16"): ObjectKind.PROBE,
        ".hfbucket/bad/x": ObjectKind.OWN,
        ".hfbucket": ObjectKind.FOREIGN,
        "README.md": ObjectKind.FOREIGN,
        f"sub/{encode_name(key(1))}": ObjectKind.FOREIGN,
    }

    assert {name: listed(name).shown_kind for name in names} == names


def test_the_sample_is_of_the_engines_kind_then_new_then_large():
    old, new, large = (encode_name(key(number)) for number in (1, 2, 3))
    seen = look(listed(old, age=9), listed(new, age=1), listed(large, 200, age=1), listed(encode_name(l2_key(1))))
    assert seen.sample.text == key(3)
    assert look(listed(old, age=None)).sample.text == key(1)
    assert look(listed(old), listed(encode_name(l2_key(1)), age=9), own=ObjectKind.MP).sample.text == l2_key(1)


def test_no_sample_of_what_is_too_large_or_a_probe():
    too_large = listed(encode_name(key(1)), bucket.MAX_SAMPLE_BYTES + 1)

    assert look(too_large, listed(encode_name("test@1@0@0@half")), listed("README.md")).sample is None


@pytest.mark.parametrize(
    ("mode", "names", "severity"),
    [
        ("classic", [], "ok"),
        ("classic", [key(1)], "ok"),
        ("classic", [l2_key(1)], "warning"),
        ("mp", [key(1)], "warning"),
        ("mp", [l2_key(1)], "ok"),
        ("classic", [key(1), l2_key(1)], "ok"),
        ("mp", ["test@1@0@0@half"], "ok"),
        ("classic", ["no key"], "note"),
    ],
)
def test_listings_and_modes(mode, names, severity):
    finding = bucket.judge(named(mode), look(*(listed(encode_name(name)) for name in names)))

    assert str(finding.severity) == severity


def test_a_listing_that_goes_on():
    seen = look(*(listed(encode_name(key(number))) for number in range(bucket.FIRST)))

    assert bucket.judge(named(), seen).found == "the first 1,000 objects: 1,000 with classic keys"


# --- errors and codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "severity", "advice"),
    [
        (ThrottledError("x"), "warning", f"{HEAD}max_hub_calls_per_minute"),
        (BudgetError("x"), "warning", f"{HEAD}max_hub_calls_per_minute"),
        (TransportError("x"), "error", f"{HEAD}endpoint"),
        (DeadlineError("x"), "error", "HF_ENDPOINT"),
        (AccessDeniedError("x", 403), "error", f"{HEAD}token_env"),
        (BucketMissingError("x"), "error", f"{HEAD}bucket_handle"),
        (ConfigError(f"instance {INSTANCE!r}: x"), "error", ""),
    ],
)
def test_errors_become_findings(error, severity, advice):
    finding = from_error("check", error, named())

    assert (str(finding.severity), finding.found) == (severity, "x")
    assert advice in finding.fix


@untimed
@given(st.lists(st.sampled_from(Severity)))
def test_the_exit_code_is_that_of_the_worst(severities):
    worst = max(severities, default=Severity.OK)
    expected = {Severity.OK: 0, Severity.NOTE: 0, Severity.WARNING: 1, Severity.ERROR: 3}[worst]

    assert exit_code([Finding("x", severity, "") for severity in severities]) == expected


@untimed
@given(st.text(), st.text())
def test_a_finding_shows_no_secret_and_stays_on_its_line(before, after):
    texts.know(SECRET)
    cleaned = Finding("x", Severity.OK, before + SECRET + after, SECRET).cleaned()

    assert SECRET not in str(cleaned)
    assert str(cleaned).isprintable()


def test_a_secret_of_several_lines_is_not_shown_either():
    texts.know("a-first\na-second")

    assert Finding("x", Severity.OK, "it said a-first\na-second!").cleaned().found == "it said ***!"


def test_a_temp_dir_that_is_not_needed():
    assert engine.check_temp_dir(named()).found == "not needed: verify is size"


def test_a_bounded_call_hands_on_what_it_returns_and_raises():
    assert call_with_deadline("x", lambda deadline: deadline.seconds, 7.0) == 7.0
    with pytest.raises(ZeroDivisionError):
        call_with_deadline("x", lambda _: 1 / 0, 7.0)
