"""Where a job is submitted to, and its runtime environment: read, and refused where a secret would travel in it.

Ray keeps a job's runtime environment and command line in its records and shows them in its dashboard to everybody.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.config.yaml_file import parse_yaml, read_yaml
from hfbucket_plugin.core.texts import HUB_TOKEN, LEAST_SECRET, SECRET_NAME, spellings
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ADDRESS_VARIABLES: Final = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""As `ray job submit` has them: the first that is set."""

_TOKEN_SETTING: Final = re.compile(r"(.*\.)?token", re.IGNORECASE)
"""The setting in each of its places: `remote_storage_plugin.<name>.token`, and `token` in `adapter_params`."""

_TOKEN_LINE: Final = re.compile(r"""(^|[\s.{,"'])token["']?\s*[:=]\s*["']?[^\s"'#,}\]]""", re.IGNORECASE | re.MULTILINE)
"""The setting in the text of a file that cannot be parsed, such as one with a key given twice."""

_UPLOADED: Final = frozenset({".yaml", ".yml", ".json", ".env"})
"""Endings of the files in a working directory that are looked into: configurations, and files of variables."""

_MOST_UPLOADED: Final = 10_000
"""Such files in one working directory; more are refused, since each is read."""

_MOST_PARSED_BYTES: Final = 1024 * 1024
"""Longer files are no configurations. Only secrets that are known by what they look like are searched for in them."""

_LONGEST_SECRET: Final = 16 * 1024

_INSTEAD: Final = (
    "it would be shown in Ray's dashboard and kept in the job's record. Set the variable in the environment of the cluster's "
    "nodes, from a secret; token_env names it"
)


def dashboard_address(given: str | None) -> str:
    """Where jobs are submitted to.

    Args:
        given: `--address`.

    Raises:
        ConfigError: No address is configured, or it is none of a dashboard.
    """
    name, address = "--address", given
    for variable in ADDRESS_VARIABLES:
        if not address:
            name, address = variable, os.environ.get(variable)
    if not address:
        raise ConfigError(
            f"no Ray cluster is configured: give --address http://<host>:8265, or set {' or '.join(ADDRESS_VARIABLES)}"
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{name} {address!r} does not read http://<host>:<port>: jobs are submitted to the dashboard, as a rule on port 8265"
        )
    return address.rstrip("/")


def runtime_env(file: Path | None, text: str | None, working_dir: str | None) -> dict[str, Any]:
    """A runtime environment, as `ray job submit` takes it.

    Args:
        file: `--runtime-env`: in YAML.
        text: `--runtime-env-json`.
        working_dir: `--working-dir`; wins over what the others say.

    Raises:
        ConfigError: It cannot be read, is given twice, or holds a secret.
    """
    if file is not None and text is not None:
        raise ConfigError("--runtime-env and --runtime-env-json name two environments; a job has one")
    found: Any = {}
    if file is not None:
        found = _from_file(file)
    elif text is not None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError("--runtime-env-json is no JSON") from None
    where = "--runtime-env" if file is not None else "--runtime-env-json"
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is no mapping of settings")
    _refuse_secrets(found, where)
    if working_dir is not None:
        _refuse_value(working_dir, "--working-dir")  # it may be an address
        found |= {"working_dir": working_dir}
    if isinstance(directory := found.get("working_dir"), str) and Path(directory).is_dir():
        excluded = found.get("excludes")
        _refuse_secrets_below(Path(directory), excluded if isinstance(excluded, list) else [])
    return found


def refuse_secrets_in(command: Sequence[str], submission_id: str | None = None) -> None:
    """Refuse a job with a secret in what Ray records of it.

    Args:
        command: The command line. Words that are JSON, as of `--l2-adapter`, are read: a token in other clothes is found by its setting.
        submission_id: The job's name.

    Raises:
        ConfigError: It holds one; the message never does.
    """
    if submission_id is not None:
        _refuse_value(submission_id, "--submission-id")
    for word in command:
        _refuse_value(word, "the command of the job")
        _, _, value = word.partition("=")
        for text in (word, value):
            if text.lstrip()[:1] in ("{", "["):
                _refuse_document(_json(text), "the command of the job")


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None  # the command itself says so


class _Pairs(dict[str, Any]):
    """An object of JSON. Its text travels, so a key that is given twice counts each time."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _yaml(text: str, name: str) -> Any:
    try:
        return parse_yaml(text, name)
    except ConfigError:
        return None  # reading it reports the fault; its text was looked at


def _is_token(name: str, beside: Mapping[Any, Any], *, anywhere: bool) -> bool:
    """Whether a name is that of the setting; in files of others `token` alone may mean anything."""
    if not _TOKEN_SETTING.fullmatch(name):
        return False
    return anywhere or name.startswith("remote_storage_plugin.") or "bucket_handle" in beside


def _refuse_document(document: Any, where: str, *, anywhere: bool = True) -> None:
    """Refuse a document with the setting `token` in it, or with a secret in any of its texts.

    Args:
        document: Plain values, as JSON and YAML have them.
        where: What the document is, for errors.
        anywhere: Whether `token` is that setting in every mapping, not only in those of instances.
    """
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for name, inner in value.pairs if isinstance(value, _Pairs) else value.items():
                _refuse_value(str(name), where)
                if inner and _is_token(str(name), value, anywhere=anywhere):
                    raise ConfigError(
                        f"{where} holds a value of the setting {str(name).rpartition('.')[2]}; {_INSTEAD}"
                    )
                waiting.append(inner)
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, str):
            _refuse_value(value, where)
            if value.lstrip()[:1] == "{":  # extra_config as JSON in a text
                waiting.append(_json(value))


def _refuse_secrets_below(directory: Path, excluded: Sequence[Any]) -> None:
    """Refuse a working directory whose configurations hold a secret: Ray uploads it, and every node keeps a copy."""
    read = 0
    for path in sorted(directory.rglob("*")):
        inner = path.relative_to(directory)
        if path.suffix not in _UPLOADED and path.name != ".env":
            continue
        if inner.parts[0] == ".git" or _is_excluded(inner, excluded):
            continue
        read += 1
        if read > _MOST_UPLOADED:
            raise ConfigError(
                f"--working-dir holds more than {_MOST_UPLOADED} files that may hold a secret ({', '.join(sorted(_UPLOADED))}): name "
                "those that the job does not need in excludes of the runtime environment"
            )
        with contextlib.suppress(OSError):  # Ray says what it cannot upload
            if path.is_file():
                _refuse_secrets_of(path, f"--working-dir: {str(inner)!r}")


def _refuse_secrets_of(path: Path, where: str) -> None:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(_MOST_PARSED_BYTES)
        _refuse_value(text, where)
        more, end = file.read(_MOST_PARSED_BYTES), text
        if more:
            while more:
                _refuse_value(end[-_LONGEST_SECRET:] + more, where)
                more, end = file.read(_MOST_PARSED_BYTES), more
            return
    document = _yaml(text, where) if path.suffix in {".yaml", ".yml"} else _json(text)
    settings = "bucket_handle" in text or "remote_storage_plugin." in text
    if document is None and settings and _TOKEN_LINE.search(text):  # in a file that is broken, say
        raise ConfigError(f"{where} holds a value of the setting token; {_INSTEAD}")
    _refuse_document(document, where, anywhere=False)


def _is_excluded(path: Path, patterns: Sequence[Any]) -> bool:
    """Whether `excludes`, which reads as a .gitignore does, keeps a file out of what is uploaded; no where this cannot be told."""
    texts = [one for one in patterns if isinstance(one, str)]
    if any(one.startswith("!") for one in texts):  # takes back what the patterns before it say
        return False
    return any(_excludes(one, path) for one in texts)


def _excludes(pattern: str, path: Path) -> bool:
    """Whether a pattern names a file, or a directory above it."""
    directories = pattern.endswith("/")
    bare = pattern.removesuffix("/").removesuffix("/**").removeprefix("**/")
    anchored = "/" in bare
    wanted = bare.removeprefix("/").split("/")
    parts = path.parts[:-1] if directories else path.parts
    if not anchored:
        return any(fnmatch.fnmatchcase(part, bare) for part in parts)
    # A `*` of a path does not stand for a slash.
    return len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _from_file(file: Path) -> Any:
    found = read_yaml(file, "--runtime-env")
    return {} if found is None else found


def _refuse_secrets(found: dict[str, Any], where: str) -> None:
    variables = found.get("env_vars")
    for name, value in variables.items() if isinstance(variables, dict) else ():
        if value and SECRET_NAME.search(str(name)):
            raise ConfigError(f"{where}: env_vars gives {name} a value; {_INSTEAD}")
    _refuse_document(found, where)


def _refuse_value(text: str, where: str) -> None:
    if HUB_TOKEN.search(text):
        raise ConfigError(f"{where} holds what looks like a token of the Hub; {_INSTEAD}")
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and any(len(one) >= LEAST_SECRET and one in text for one in spellings([value])):
            raise ConfigError(f"{where} holds the value of {name}; {_INSTEAD}")
