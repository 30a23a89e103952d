"""Address and runtime environment of a submitted job; refuses a job whose environment contains a secret.

Ray keeps a job's runtime environment and command line in its records, and its dashboard shows them to everybody.
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
"""Environment variables of the address, as in `ray job submit`; the first that is set applies."""

_TOKEN_SETTING: Final = re.compile(r"(.*\.)?token", re.IGNORECASE)
"""Name of the token setting, in each of its places: `remote_storage_plugin.<name>.token`, `token` in `adapter_params`."""

_TOKEN_LINE: Final = re.compile(r"""(^|[\s.{,"'])token["']?\s*[:=]\s*["']?[^\s"'#,}\]]""", re.IGNORECASE | re.MULTILINE)
"""Token setting in the text of a file that cannot be parsed, such as one with a duplicate key."""

_UPLOADED: Final = frozenset({".yaml", ".yml", ".json", ".env"})
"""Suffixes of the files in a working directory that are searched: configurations, and files of environment variables."""

_MOST_UPLOADED: Final = 10_000
"""Maximum number of such files in a working directory; more are refused, because each is read."""

_MOST_PARSED_BYTES: Final = 1024 * 1024
"""Maximum size of a configuration; longer files are only searched for secrets of a recognizable form."""

_LONGEST_SECRET: Final = 16 * 1024

_INSTEAD: Final = (
    "it would be shown in Ray's dashboard and kept in the job's record. Set the variable in the environment of the cluster's "
    "nodes, from a secret; token_env names it"
)


def dashboard_address(given: str | None) -> str:
    """Return the address of the dashboard to which jobs are submitted.

    Args:
        given: Value of `--address`; None if not given.

    Raises:
        ConfigError: No address is configured, or it is not that of a dashboard.
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
    """Return a runtime environment in the format of `ray job submit`.

    Args:
        file: Value of `--runtime-env`, a YAML file.
        text: Value of `--runtime-env-json`.
        working_dir: Value of `--working-dir`; overrides the other two.

    Raises:
        ConfigError: The environment cannot be read, is given twice, or contains a secret.
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
        _refuse_value(working_dir, "--working-dir")  # may be a URL, with a secret in it
        found |= {"working_dir": working_dir}
    if isinstance(directory := found.get("working_dir"), str) and Path(directory).is_dir():
        excluded = found.get("excludes")
        _refuse_secrets_below(Path(directory), excluded if isinstance(excluded, list) else [])
    return found


def refuse_secrets_in(command: Sequence[str], submission_id: str | None = None) -> None:
    """Refuse a job whose records in Ray would contain a secret.

    Args:
        command: Command line. Words that are JSON, such as that of `--l2-adapter`, are parsed: a token without a recognizable
            form is found by its setting.
        submission_id: Name of the job; None if not given.

    Raises:
        ConfigError: The command or the name contains a secret; the message does not.
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
        return None  # the command itself reports the error


class _Pairs(dict[str, Any]):
    """JSON object that keeps the values of duplicate keys, because the whole text is sent."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _yaml(text: str, name: str) -> Any:
    try:
        return parse_yaml(text, name)
    except ConfigError:
        return None  # reported when the file is read; its text was searched already


def _is_token(name: str, beside: Mapping[Any, Any], *, anywhere: bool) -> bool:
    """Return whether a name is that of the token setting; in foreign files, `token` alone may mean something else."""
    if not _TOKEN_SETTING.fullmatch(name):
        return False
    return anywhere or name.startswith("remote_storage_plugin.") or "bucket_handle" in beside


def _refuse_document(document: Any, where: str, *, anywhere: bool = True) -> None:
    """Refuse a document that contains the setting `token`, or a secret in any of its texts.

    Args:
        document: Plain values of JSON or YAML.
        where: Description of the document, for errors.
        anywhere: Whether `token` is the setting in every mapping, not only in those of instances.
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
            if value.lstrip()[:1] == "{":  # extra_config may be JSON in a string
                waiting.append(_json(value))


def _refuse_secrets_below(directory: Path, excluded: Sequence[Any]) -> None:
    """Refuse a working directory whose configurations contain a secret: Ray uploads it, and every node keeps a copy."""
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
        with contextlib.suppress(OSError):  # Ray reports files that it cannot upload
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
    if document is None and settings and _TOKEN_LINE.search(text):  # the file cannot be parsed
        raise ConfigError(f"{where} holds a value of the setting token; {_INSTEAD}")
    _refuse_document(document, where, anywhere=False)


def _is_excluded(path: Path, patterns: Sequence[Any]) -> bool:
    """Return whether `excludes`, in the syntax of .gitignore, keeps a file from the upload; False if this is uncertain."""
    texts = [one for one in patterns if isinstance(one, str)]
    if any(one.startswith("!") for one in texts):  # revokes earlier patterns
        return False
    return any(_excludes(one, path) for one in texts)


def _excludes(pattern: str, path: Path) -> bool:
    """Return whether a pattern matches a file, or a directory above it."""
    directories = pattern.endswith("/")
    bare = pattern.removesuffix("/").removesuffix("/**").removeprefix("**/")
    anchored = "/" in bare
    wanted = bare.removeprefix("/").split("/")
    parts = path.parts[:-1] if directories else path.parts
    if not anchored:
        return any(fnmatch.fnmatchcase(part, bare) for part in parts)
    # A `*` in a path does not match a slash.
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
