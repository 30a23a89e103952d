"""Checks of the machine and the environment variables that an engine started like this process finds."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from hfbucket_plugin.cli.findings import Finding, note, ok, warning
from hfbucket_plugin.config.lmcache_yaml import NO_SETTINGS, VARIABLE_HEAD
from hfbucket_plugin.core.files import TempDir
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.hub import xet_home

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hfbucket_plugin.config.instances import InstanceConfig

DIRECTORIES: Final = "environment directories"
PROXY: Final = "environment proxy"
ENDPOINT: Final = "environment endpoint"
TOKEN: Final = "environment token"  # noqa: S105 - the name of a check
VARIABLES: Final = "environment variables"
PORTS: Final = "environment ports"

_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_TOKEN_SHAPE: Final = re.compile(r"(hf|api_org)_.+")
_LOOPBACK: Final = "127.0.0.1"
_ELSEWHERE: Final = frozenset({"hf.co", "www.huggingface.co"})
"""Addresses that redirect to the Hub's own: the token is not sent along."""


def _directories(named: InstanceConfig, environ: Mapping[str, str]) -> Finding:
    wrong, advice, well = [], [], []
    temp_dir = TempDir(named.settings.download_tmp_dir)
    try:
        temp_dir.directory()
        well.append(str(temp_dir.root))
    except ConfigError as caught:
        wrong.append(caught.message)
        advice.append(f"name another directory with {named.setting('download_tmp_dir')}")
    finally:
        temp_dir.close()
    root, variable = xet_home.cache_root(environ)
    if (why := xet_home.why_not(root)) is None:
        well.append(f"{root} ({variable})")
    else:
        wrong.append(
            f"{root} ({variable}) cannot be written: {why}: an engine can neither read nor store through hf_xet"
        )
        advice.append("set HF_XET_CACHE, or HF_HOME, to a directory that the engine's user may write to")
    try:
        well.append(tempfile.gettempdir())
    except OSError:
        wrong.append("there is no directory for temporary files")
        advice.append("set TMPDIR to one that can be written")
    if wrong:
        return warning(DIRECTORIES, "; ".join(wrong), "; ".join(advice))
    return ok(DIRECTORIES, f"can be written: {', '.join(dict.fromkeys(well))}")


def _proxy(_: InstanceConfig, environ: Mapping[str, str]) -> Finding:
    wrong, advice, notes = [], [], []
    for name in [variable for upper in _PROXIES for variable in (upper, upper.lower())]:
        value = environ.get(name, "")
        if not value:
            continue
        host, scheme = _host(value)
        if host is None or scheme not in {"http", "https", "socks5", "socks5h"}:
            wrong.append(f"{name} is not the address of a proxy")
            advice.append(f"write {name} as http://host:port")
        elif scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            wrong.append(f"{name} names a SOCKS proxy, for which the package socksio is missing")
            advice.append("pip install socksio")
        else:
            notes.append(f"{name} uses {host}")
    for name in _CERTIFICATES:
        if name not in environ:
            continue
        value = environ[name]
        if not value or not os.access(value, os.R_OK) or Path(value).is_dir() != (name == "SSL_CERT_DIR"):
            what = "a directory" if name == "SSL_CERT_DIR" else "a file"
            wrong.append(f"{name} does not name {what} that can be read")
            advice.append(f"unset {name}, or have it name the certificates of your authority")
        else:
            notes.append(f"{name} is {value}")
    if wrong:
        return warning(PROXY, "; ".join(wrong), "; ".join(dict.fromkeys(advice)))
    return ok(PROXY, "; ".join(notes) or "no proxy and no certificates of your own are set")


def _host(address: str) -> tuple[str | None, str]:
    """Return the host and port of a proxy without its password, and the scheme."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return None, ""
    return host, parts.scheme


def _endpoint(named: InstanceConfig, environ: Mapping[str, str]) -> Finding:
    endpoint, setting = named.settings.endpoint, named.setting("endpoint")
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if host in _ELSEWHERE:
        return warning(
            ENDPOINT,
            f"{endpoint} only leads on to the Hub",
            f"write https://huggingface.co in {setting} or HF_ENDPOINT",
        )
    if parts.scheme == "http" and not _is_loopback(host):
        return warning(
            ENDPOINT,
            f"{endpoint} is not encrypted: the token travels in clear text",
            f"use https in {setting} or HF_ENDPOINT",
        )
    if "HF_ENDPOINT" in environ and not environ["HF_ENDPOINT"].strip():
        return note(ENDPOINT, f"HF_ENDPOINT is set and empty: {endpoint} is used", "unset it")
    other = environ.get("HF_ENDPOINT", endpoint).strip().rstrip("/")
    if other != endpoint.rstrip("/"):
        return note(ENDPOINT, f"HF_ENDPOINT is not what {setting} says, which comes first", "set one of them")
    return ok(ENDPOINT, f"{endpoint} is well spelled")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token(named: InstanceConfig, environ: Mapping[str, str]) -> Finding:
    token = named.settings.resolve_token(environ)
    variable = named.settings.token_env
    if token is None:
        empty = f"{variable} is set and empty" if variable in environ else f"{variable} is not set"
        return ok(TOKEN, f"nothing to look at: {empty}")
    if not _TOKEN_SHAPE.fullmatch(token):
        return note(
            TOKEN, "does not look like a token of the Hub's, which begins with hf_ or api_org_", f"look at {variable}"
        )
    return ok(TOKEN, "looks like a token of the Hub's")


def _variables(named: InstanceConfig, environ: Mapping[str, str]) -> Finding:
    own = sorted(name for name in environ if name.startswith(VARIABLE_HEAD))
    heeded = set(own).intersection(named.engine.overrides if named.engine is not None else ())
    other = [name for name in own if name not in heeded and name not in NO_SETTINGS]
    file = environ.get("LMCACHE_CONFIG_FILE")
    if named.engine is not None and file and Path(file).absolute() != Path(named.engine.source).absolute():
        return warning(
            VARIABLES,
            f"LMCACHE_CONFIG_FILE names {file}, and not {named.engine.source}: an engine that is started like this reads that",
            "give --lmcache-config the same file, or unset the variable",
        )
    if other:
        where = (
            "the settings of an MP server are its options"
            if named.engine is None
            else "LMCache has no such setting, or drops the value"
        )
        return note(
            VARIABLES, f"not heeded: {', '.join(other)}: {where}", "unset them, or correct their names or values"
        )
    if heeded:
        return note(
            VARIABLES,
            f"{', '.join(sorted(heeded))} come before {named.engine.source if named.engine else 'the file'}, here and in an engine "
            "that is started like this",
            "see that they are the same for all",
        )
    return ok(VARIABLES, "no LMCACHE_* variable changes the configuration")


def _ports(named: InstanceConfig, _: Mapping[str, str]) -> Finding:
    if named.engine is None:
        return ok(PORTS, "those of an MP server are its options; --http-host is loopback unless it is given")
    own = named.engine.engine
    if own.get("internal_api_server_enabled") is not True:
        return ok(PORTS, "LMCache's internal API server is off")
    host = str(own.get("internal_api_server_host") or _LOOPBACK)
    start = own.get("internal_api_server_port_start", 6999)
    socket = own.get("internal_api_server_socket_path_prefix")
    wrong, advice = [], []
    if not socket and not _is_loopback(host):
        wrong.append(f"LMCache's internal API server listens on {host}, from port {start} on, without authentication")
        advice.append("set internal_api_server_host to 127.0.0.1, or let a firewall keep others out")
    if own.get("run_script_api_enabled") is True:
        wrong.append("its /run_script runs any Python that it is sent, in the engine")
        advice.append("set run_script_api_enabled to false")
    if wrong:
        return warning(PORTS, "; ".join(wrong), "; ".join(advice))
    return ok(PORTS, f"LMCache's internal API server listens on {socket or host} only, and runs no scripts")


CHECKS: Final[tuple[tuple[str, Callable[[InstanceConfig, Mapping[str, str]], Finding]], ...]] = (
    (DIRECTORIES, _directories),
    (PROXY, _proxy),
    (ENDPOINT, _endpoint),
    (TOKEN, _token),
    (VARIABLES, _variables),
    (PORTS, _ports),
)
"""Checks in their order. Each receives the instance and the environment of the process at its start."""
