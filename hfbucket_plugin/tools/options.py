"""Command-line options: those declared by the fields of a model, and those shared by the commands."""

from __future__ import annotations

import inspect
import keyword
import math
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import console, exit_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Option:
    """Command-line form of a model's field, given in the field's annotation; a field without one is a switch.

    Attributes:
        metavar: Placeholder of the value in the help; empty for a switch.
        name: Name of the option; None for the field's own name.
        many: Whether the option is repeatable.
        parse: Converts the given value to one that the field accepts.
        hidden: Whether the help omits the option.
    """

    metavar: str = ""
    name: str | None = None
    many: bool = False
    parse: Callable[[Any], Any] | None = None
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Flag:
    """Option of a command, and the field that it sets.

    Attributes:
        name: Name of the option.
        place: Names of the fields that lead to its value in the model.
        help: Description of the field.
        option: The field's annotation.
    """

    name: str
    place: tuple[str, ...]
    help: str
    option: Option

    @property
    def variable(self) -> str:
        """Name of the parameter."""
        name = self.name.removeprefix("--").replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name

    def parameter(self) -> inspect.Parameter:
        """Return the parameter for Typer; it has no default, since a file may provide the value."""
        many, metavar = self.option.many, self.option.metavar
        kind: Any = list[str] if many else str if metavar else bool
        text = f"{self.help} Repeatable." if many else self.help
        option = typer.Option(
            self.name, help=text, metavar=metavar or None, show_default=False, hidden=self.option.hidden
        )
        return inspect.Parameter(
            self.variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )


def flags_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> tuple[Flag, ...]:
    """Return the flags of a model's fields, and of the models nested in it.

    Args:
        model: Model of the options.
        above: Names of the fields that lead to the model from the outermost one.
    """
    flags: list[Flag] = []
    for name, field in model.model_fields.items():
        place = (*above, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            flags += flags_of(field.annotation, place)
        else:
            option = next((one for one in field.metadata if isinstance(one, Option)), Option())
            flags.append(Flag(option.name or f"--{name.replace('_', '-')}", place, field.description or "", option))
    return tuple(flags)


def with_flags(flags: Iterable[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add flags to a command, which receives their values by flag as `given`."""
    chosen = tuple(flags)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [one for name, one in own.items() if name != "given"] + [flag.parameter() for flag in chosen]

        @wraps(command)
        def called(**values: Any) -> None:
            given = {flag: value for flag in chosen if (value := values.pop(flag.variable)) not in (None, [])}
            command(given=given, **values)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def nested(given: Mapping[Flag, Any]) -> dict[str, Any]:
    """Return the values of flags as a nested mapping for their model.

    Raises:
        ConfigError: If a value cannot be parsed.
    """
    values: dict[str, Any] = {}
    for flag, value in given.items():
        section = values
        for step in flag.place[:-1]:
            section = section.setdefault(step, {})
        section[flag.place[-1]] = value if flag.option.parse is None else flag.option.parse(value)
    return values


def request_of(model: type[M], given: Mapping[Flag, Any]) -> M:
    """Create a model from the values of its flags.

    Raises:
        ConfigError: If values are invalid or missing; the message names each flag with its value.
    """
    try:
        return model.model_validate(nested(given))
    except ValidationError as error:
        flags = {flag.place: flag for flag in flags_of(model)}
        told = [_in_words(one, flags) for one in error.errors(include_url=False)]
    raise ConfigError("; ".join(told))


def _in_words(problem: Any, flags: Mapping[tuple[str, ...], Flag]) -> str:
    place = tuple(str(step) for step in problem["loc"])
    flag = next((flags[place[:length]] for length in range(len(place), 0, -1) if place[:length] in flags), None)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if flag is None or message.startswith(flag.name):
        return message
    if problem["type"] == "missing":
        return f"give {flag.name} {flag.option.metavar}"
    value = repr(problem["input"])
    return f"{flag.name}: {message}" if value in message else f"{flag.name} {value}: {message}"


DEFAULT_TIMEOUT_SECS: Final = 10.0


def number(value: float) -> float:
    """Refuse `nan`, which older releases of Typer accept within any bounds.

    Raises:
        typer.BadParameter: If the value is `nan`.
    """
    if math.isnan(value):
        raise typer.BadParameter("nan is not a number")
    return value


LMCacheConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The LMCache YAML of the engines: all its bucket instances, unless --instance names some."
    ),
]
Instances = Annotated[
    list[str] | None, typer.Option("--instance", metavar="NAME", help="Only this instance of the YAML. Repeatable.")
]
L2Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--l2-adapter", metavar="JSON", help="The JSON of an adapter, as lmcache server takes it. Repeatable."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.1, max=3600, callback=number, metavar="SECS", help="Maximum seconds of one request."
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only keys of this model, by the name in the engine's configuration.")
]
Prefix = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Only keys that start with this, such as 'org/model@8@0@'.")
]


def chosen(
    lmcache_config: Path | None, instances: Sequence[str] | None, l2_adapters: Sequence[str] | None
) -> list[InstanceConfig]:
    """Return the instances that the options name; end the command if there are none, or unknown ones."""
    try:
        return named_instances(lmcache_config, instances or (), l2_adapters or ())
    except ConfigError as error:
        console.end(str(error), exit_codes.USAGE)


def key_prefix(model: str | None, prefix: str | None) -> str:
    """Return the key prefix that `--model` and `--prefix` select together; empty for all."""
    if model is None:
        return prefix or ""
    if not model:
        console.end(f"--model {model!r}: a model's name in a key is not empty", exit_codes.USAGE)
    head, prefix = f"{model}@", prefix or ""
    if not head.startswith(prefix) and not prefix.startswith(head):
        console.end(f"no key starts both with --prefix {prefix!r} and with {head!r}, as --model asks", exit_codes.USAGE)
    return max(head, prefix, key=len)


def listing_code(start: str, *, failed: bool, empty: bool) -> int:
    """Return the exit code of a listing command; report if `--model` or `--prefix` matched nothing."""
    if failed:
        return exit_codes.ERRORS
    if start and empty:
        console.print_error(
            f"nothing matched: no key starts with {start!r}; `ls` without --model and --prefix shows what there is"
        )
        return exit_codes.WARNINGS
    return exit_codes.OK
