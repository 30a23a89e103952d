"""Reading of `warm.yaml` and flags into one warm-up; errors name the place and the nearest known name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, get_args

from pydantic import BaseModel, ValidationError

from hfbucket_plugin.config.yaml_file import read_yaml
from hfbucket_plugin.core.texts import did_you_mean
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.options import nested
from warmer.request.model import FLAGS, WarmRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hfbucket_plugin.tools.options import Flag

_INSTEAD: Final = {("choose", "all"): ("choose", "prefix"), ("choose", "prefix"): ("choose", "all")}
"""Options for which a value on the command line also replaces the other option in the file."""

_SOURCES: Final = ("lmcache_config", "instance"), ("l2_adapter",)


def load_request(path: Path | None, given: Mapping[Flag, Any], planned: Mapping[str, Any] | None = None) -> WarmRequest:
    """Read a warm-up from a file and flags.

    Args:
        path: Path of a `warm.yaml`; None for no file.
        given: Values of flags, which override those of the file.
        planned: Request from which a plan was made; the file overrides it, except for the choice of chunks.

    Raises:
        ConfigError: The file cannot be read, or values in the file or in flags are invalid; all of them are named.
    """
    document = _merged(dict(planned or {}), {} if path is None else _read(path))
    flagged = {flag.place for flag in given}
    if planned is not None:
        choosing = [flag.name for flag in given if flag.place[0] == "choose"]
        if choosing:
            raise ConfigError(
                f"{', '.join(choosing)}: the plan says which chunks; make a new plan, or leave the plan out"
            )
        document["choose"] = planned.get("choose", {})
    for place in flagged:
        if place in _INSTEAD:
            _drop(document, _INSTEAD[place], unless=flagged)
    for one, other in (_SOURCES, _SOURCES[::-1]):
        if any(("source", name) in flagged for name in one):
            for name in other:
                _drop(document, ("source", name), unless=flagged)
    return validated(_merged(document, nested(given)), str(path) if path else None)


def read_request(path: Path) -> WarmRequest:
    """Read a request from a `warm.yaml`, as `--config` does.

    Args:
        path: Path of the file.

    Raises:
        ConfigError: The file cannot be read, or values in it are invalid; all of them are named.
    """
    return load_request(path, {})


def validated(document: Mapping[str, Any], source: str | None) -> WarmRequest:
    """Validate values as a warm-up.

    Args:
        document: Values.
        source: File from which the values come, for errors; None for flags alone.

    Raises:
        ConfigError: Values are invalid; all of them are named.
    """
    try:
        return WarmRequest.model_validate(document)
    except ValidationError as error:
        words = "; ".join(_reason(item) for item in error.errors(include_url=False, include_input=False))
    # Raised outside of the handler, because a traceback of the cause would print the values.
    raise ConfigError(f"{source}: {words}" if source else words)


def _read(path: Path) -> dict[str, Any]:
    document = read_yaml(path, "--config")
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config {str(path)!r} is no mapping of settings")
    # The value of a section whose lines are all commented out is None.
    return {
        name: value for name, value in document.items() if value is not None or name not in WarmRequest.model_fields
    }


def _drop(document: dict[str, Any], place: tuple[str, ...], unless: set[tuple[str, ...]]) -> None:
    section = document.get(place[0])
    if place not in unless and isinstance(section, dict):
        document[place[0]] = {name: value for name, value in section.items() if name != place[1]}


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = dict(below)
    for name, value in above.items():
        # Sections are merged; a mapping inside a section, such as that of nodes, is replaced as a whole.
        deeper = name in WarmRequest.model_fields and isinstance(value, dict)
        merged[name] = _merged(merged.get(name, {}), value) if deeper else value
    return merged


def _reason(item: Any) -> str:
    place = tuple(str(step) for step in item["loc"] if not isinstance(step, int))
    name = ".".join(place)
    flags = [flag.name for flag in FLAGS if flag.place == place[: len(flag.place)]]
    where = f"{flags[0]} ({name})" if flags else name or "warm-up"
    if item["type"] == "extra_forbidden":
        return f"unknown setting {name}{_nearest(place)}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"


def _nearest(place: Sequence[str]) -> str:
    model: Any = WarmRequest
    for step in place[:-1]:
        found = model.model_fields[step].annotation
        model = next(
            (one for one in (found, *get_args(found)) if isinstance(one, type) and issubclass(one, BaseModel)),
            WarmRequest,
        )
    return did_you_mean(place[-1], model.model_fields)
