"""What `doctor` says of the machine and the variables around an instance."""

import tempfile

import pytest

from hfbucket_plugin.cli.checks import environment
from hfbucket_plugin.cli.findings import Severity
from hfbucket_plugin.config.instances import InstanceConfig
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from tests.support.buckets import HEAD, INSTANCE, PREFIX, SECRET, TOKEN_ENV, instance_settings

CHECKS = dict(environment.CHECKS)


@pytest.fixture
def found(tmp_path):
    """Carries out one check of an instance, and returns what it found."""

    def check(name, environ=None, mode="classic", own=None, overrides=(), **settings):
        settings = {
            "token_env": TOKEN_ENV,
            "endpoint": "https://hub.example",
            "download_tmp_dir": str(tmp_path / "tmp"),
        } | settings
        endpoint = settings.pop("endpoint")
        config = EngineConfig("/etc/lmcache.yaml", (INSTANCE,), {}, engine=own or {}, overrides=overrides)
        one = InstanceConfig(
            INSTANCE,
            instance_settings(endpoint, "org/bucket", PREFIX, **settings),
            mode,
            config if mode == "classic" else None,
        )
        return CHECKS[name](one, {"HF_HOME": str(tmp_path / "hf")} | (environ or {}))

    return check


def test_well_kept_surroundings(found):
    for name in CHECKS:
        assert found(name).severity is Severity.OK, name
        assert found(name, mode="mp").severity is Severity.OK, name


def test_a_download_tmp_dir_that_cannot_be_written(found, tmp_path):
    (tmp_path / "file").write_text("in the way")
    finding = found(environment.DIRECTORIES, download_tmp_dir=str(tmp_path / "file" / "x"))

    assert finding.severity is Severity.WARNING
    assert f"{tmp_path}/file/x" in finding.found
    assert f"{HEAD}download_tmp_dir" in finding.fix


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_XET_CACHE"])
def test_a_root_of_hf_xets_that_cannot_be_written(found, tmp_path, variable):
    (tmp_path / "file").write_text("in the way")
    finding = found(environment.DIRECTORIES, {variable: str(tmp_path / "file")})

    assert finding.severity is Severity.WARNING
    assert f"({variable}) cannot be written" in finding.found
    assert "HF_XET_CACHE" in finding.fix


def test_no_temporary_directory(found, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("none")))

    assert "TMPDIR" in found(environment.DIRECTORIES).fix


def test_nothing_stays_in_the_directories(found, tmp_path):
    found(environment.DIRECTORIES)

    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "severity", "words"),
    [
        ({"HTTPS_PROXY": f"http://user:{SECRET}@proxy:3128"}, Severity.OK, "HTTPS_PROXY uses proxy:3128"),
        ({"all_proxy": "proxy:3128"}, Severity.OK, "all_proxy uses proxy:3128"),
        ({"HTTP_PROXY": ""}, Severity.OK, "no proxy"),
        ({"https_proxy": "ftp://proxy"}, Severity.WARNING, "https_proxy is not the address"),
        ({"HTTPS_PROXY": "http://[proxy"}, Severity.WARNING, "HTTPS_PROXY is not the address"),
        ({"SSL_CERT_FILE": "/nowhere/ca.pem"}, Severity.WARNING, "SSL_CERT_FILE does not name a file"),
        ({"REQUESTS_CA_BUNDLE": "/"}, Severity.WARNING, "REQUESTS_CA_BUNDLE does not name a file"),
        ({"SSL_CERT_DIR": __file__}, Severity.WARNING, "SSL_CERT_DIR does not name a directory"),
        ({"SSL_CERT_FILE": ""}, Severity.WARNING, "SSL_CERT_FILE does not name a file"),
        ({"SSL_CERT_FILE": __file__}, Severity.OK, "SSL_CERT_FILE is "),
    ],
)
def test_proxies_and_certificates(found, environ, severity, words):
    finding = found(environment.PROXY, environ)

    assert finding.severity is severity
    assert words in finding.found
    assert SECRET not in str(finding)


def test_a_socks_proxy_needs_a_package(found, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    finding = found(environment.PROXY, {"ALL_PROXY": "socks5://proxy:1080"})

    assert finding.severity is Severity.WARNING
    assert "socksio" in finding.fix


@pytest.mark.parametrize(
    ("endpoint", "environ", "severity", "words"),
    [
        ("https://huggingface.co", {}, Severity.OK, "well spelled"),
        ("http://127.0.0.1:80", {}, Severity.OK, "well spelled"),
        ("http://localhost:80", {}, Severity.OK, "well spelled"),
        ("http://hub.example", {}, Severity.WARNING, "clear text"),
        ("https://hf.co", {}, Severity.WARNING, "only leads on"),
        ("https://huggingface.co", {"HF_ENDPOINT": " "}, Severity.NOTE, "set and empty"),
        ("https://huggingface.co", {"HF_ENDPOINT": "https://huggingface.co/"}, Severity.OK, "well spelled"),
        ("https://huggingface.co", {"HF_ENDPOINT": "https://mirror"}, Severity.NOTE, "which comes first"),
    ],
)
def test_the_spelling_of_an_endpoint(found, endpoint, environ, severity, words):
    finding = found(environment.ENDPOINT, environ, endpoint=endpoint)

    assert finding.severity is severity
    assert words in finding.found


@pytest.mark.parametrize(
    ("environ", "severity", "words"),
    [
        ({TOKEN_ENV: SECRET}, Severity.OK, "looks like"),
        ({TOKEN_ENV: "password1"}, Severity.NOTE, "does not look like"),
        ({TOKEN_ENV: ""}, Severity.OK, "set and empty"),
        ({}, Severity.OK, "is not set"),
    ],
)
def test_the_shape_of_a_token(found, environ, severity, words):
    finding = found(environment.TOKEN, environ)

    assert finding.severity is severity
    assert words in finding.found
    assert "password1" not in str(finding)
    assert SECRET not in str(finding)


@pytest.mark.parametrize(
    ("environ", "severity", "words"),
    [
        ({"LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_CONFIG_FILE": "/etc/lmcache.yaml"}, Severity.OK, "no LMCACHE_"),
        ({"LMCACHE_CONFIG_FILE": "/other.yaml"}, Severity.WARNING, "/other.yaml"),
        ({"LMCACHE_CHUNK_SIZE": "1"}, Severity.NOTE, "LMCACHE_CHUNK_SIZE come before /etc/lmcache.yaml"),
        ({"LMCACHE_CHUNK_SIZE": "1", "LMCACHE_CHUNKSIZE": "1"}, Severity.NOTE, "not heeded: LMCACHE_CHUNKSIZE"),
    ],
)
def test_variables_of_lmcache(found, environ, severity, words):
    finding = found(environment.VARIABLES, environ, overrides=("LMCACHE_CHUNK_SIZE",))

    assert finding.severity is severity
    assert words in finding.found


def test_an_mp_server_heeds_no_variable(found):
    assert (
        "not heeded: LMCACHE_CHUNK_SIZE" in found(environment.VARIABLES, {"LMCACHE_CHUNK_SIZE": "1"}, mode="mp").found
    )


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"internal_api_server_host": "0.0.0.0"}, ["listens on 0.0.0.0"]),  # noqa: S104 - a value in a file
        ({"internal_api_server_host": "::"}, ["listens on ::"]),
        ({"run_script_api_enabled": True}, ["/run_script"]),
        ({"internal_api_server_host": "10.0.0.1", "run_script_api_enabled": True}, ["10.0.0.1", "/run_script"]),
    ],
)
def test_ports_that_are_open_to_others(found, own, words):
    finding = found(environment.PORTS, own={"internal_api_server_enabled": True} | own)

    assert finding.severity is Severity.WARNING
    assert all(word in finding.found for word in words)


@pytest.mark.parametrize(
    "own",
    [
        {"internal_api_server_host": "0.0.0.0"},  # noqa: S104 - a value in a file
        {"internal_api_server_enabled": True},
        {"internal_api_server_enabled": True, "internal_api_server_host": "localhost"},
        {"internal_api_server_enabled": True, "internal_api_server_host": "0.0.0.0", "internal_api_server_socket_path_prefix": "/run/x"},  # noqa: S104 - same
    ],
)  # fmt: skip
def test_ports_that_are_not(found, own):
    assert found(environment.PORTS, own=own).severity is Severity.OK
