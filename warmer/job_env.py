"""Where a job is submitted to, and its runtime environment: read, and refused where a secret would travel in it.

Ray keeps a job's runtime environment and command line in its records and shows them in its dashboard to everybody.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.yaml_file import read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ADDRESS_VARIABLES: Final = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""As `ray job submit` has them: the first that is set."""

_SECRET_NAME: Final = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_KEY)$", re.IGNORECASE)
_HUB_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_LEAST_SECRET: Final = 8
"""A shorter value of a variable such as CI_TOKEN=1 may stand anywhere by chance."""

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
        except ValueError:
            raise ConfigError("--runtime-env-json is no JSON") from None
    where = "--runtime-env" if file is not None else "--runtime-env-json"
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is no mapping of settings")
    _refuse_secrets(found, where)
    if working_dir is None:
        return found
    _refuse_value(working_dir, "--working-dir")  # it may be an address
    return found | {"working_dir": working_dir}


def refuse_secrets_in(command: Sequence[str]) -> None:
    """Refuse a command line with a secret in it.

    Raises:
        ConfigError: It holds one; the message never does.
    """
    for word in command:
        _refuse_value(word, "the command of the job")


def _from_file(file: Path) -> Any:
    found = read_yaml(file, "--runtime-env")
    return {} if found is None else found


def _refuse_secrets(found: dict[str, Any], where: str) -> None:
    variables = found.get("env_vars")
    for name, value in variables.items() if isinstance(variables, dict) else ():
        if value and _SECRET_NAME.search(str(name)):
            raise ConfigError(f"{where}: env_vars gives {name} a value; {_INSTEAD}")
    for text in _texts(found):
        _refuse_value(text, where)


def _refuse_value(text: str, where: str) -> None:
    if _HUB_TOKEN.search(text):
        raise ConfigError(f"{where} holds what looks like a token of the Hub; {_INSTEAD}")
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET and value in text:
            raise ConfigError(f"{where} holds the value of {name}; {_INSTEAD}")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a document, names included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
