"""The options that the commands share, and the instances that they name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import console, exit_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_TIMEOUT_SECS: Final = 10.0


def number(value: float) -> float:
    """Refuse what is not a number: older releases of Typer let `nan` through any bounds.

    Raises:
        typer.BadParameter: It is `nan`.
    """
    if math.isnan(value):
        raise typer.BadParameter("nan is not a number")
    return value


LMCacheConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The LMCache YAML of the engines. All bucket instances in it are meant."),
]
Instances = Annotated[
    list[str] | None, typer.Option("--instance", metavar="NAME", help="Only this instance of the YAML. Repeatable.")
]
L2Adapters = Annotated[
    list[str] | None,
    typer.Option("--l2-adapter", metavar="JSON", help="An adapter, as lmcache server takes it. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.1, max=3600, callback=number, metavar="SECS", help="Most seconds that one request may take."
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only keys of this model, under the name that the engine was given.")
]
Prefix = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Only keys that start with this, such as 'org/model@8@0@'.")
]


def chosen(
    lmcache_config: Path | None, instances: Sequence[str] | None, l2_adapters: Sequence[str] | None
) -> list[InstanceConfig]:
    """The instances that the options name; the command ends where they name none, or wrong ones."""
    try:
        return named_instances(lmcache_config, instances or (), l2_adapters or ())
    except ConfigError as error:
        console.end(str(error), exit_codes.USAGE)


def key_prefix(model: str | None, prefix: str | None) -> str:
    """The start of the keys that `--model` and `--prefix` select together; empty for all."""
    if model is None:
        return prefix or ""
    if not model:
        console.end(f"--model {model!r}: a model's name in a key is not empty", exit_codes.USAGE)
    head, prefix = f"{model}@", prefix or ""
    if not head.startswith(prefix) and not prefix.startswith(head):
        console.end(f"no key starts both with --prefix {prefix!r} and with {head!r}, as --model asks", exit_codes.USAGE)
    return max(head, prefix, key=len)


def listing_code(start: str, *, failed: bool, empty: bool) -> int:
    """The exit code of a command that lists; says so where `--model` or `--prefix` selected nothing."""
    if failed:
        return exit_codes.ERRORS
    if start and empty:
        console.complain(
            f"nothing matched: no key starts with {start!r}; `ls` without --model and --prefix shows what there is"
        )
        return exit_codes.WARNINGS
    return exit_codes.OK
