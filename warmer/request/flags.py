"""The flags of the commands: a table of where each has its place in a warm-up, and Typer's options made of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hfbucket_plugin.errors import ConfigError
from warmer.request.model import WarmRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        name: As the user writes it.
        place: Of its value in a warm-up.
        metavar: What stands for the value in the help; empty for a switch.
        many: Whether it may be given several times.
    """

    name: str
    place: tuple[str, ...]
    metavar: str
    many: bool = False

    @property
    def variable(self) -> str:
        """The name of the parameter."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def help(self) -> str:
        """What the model says of it."""
        model: type[BaseModel] = WarmRequest
        for step in self.place[:-1]:
            model = model.model_fields[step].annotation  # type: ignore[assignment]
        text = model.model_fields[self.place[-1]].description or ""
        return f"{text} Repeatable." if self.many else text

    def parameter(self) -> inspect.Parameter:
        """The parameter that Typer makes an option of: always optional, since a file may say it."""
        kind: Any = list[str] if self.many else str if self.metavar else bool
        option = typer.Option(self.name, help=self.help, metavar=self.metavar or None, show_default=False)
        return inspect.Parameter(
            self.variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )


FLAGS: Final = (
    Flag("--lmcache-config", ("source", "lmcache_config"), "FILE"),
    Flag("--instance", ("source", "instance"), "NAME"),
    Flag("--l2-adapter", ("source", "l2_adapter"), "JSON"),
    Flag("--all", ("choose", "all"), ""),
    Flag("--prefix", ("choose", "prefix"), "TEXT", many=True),
    Flag("--model", ("choose", "model"), "NAME", many=True),
    Flag("--world-size", ("choose", "world_size"), "N"),
    Flag("--workers", ("choose", "workers"), "RANKS"),
    Flag("--include", ("choose", "include"), "GLOB", many=True),
    Flag("--exclude", ("choose", "exclude"), "GLOB", many=True),
    Flag("--since", ("choose", "since"), "TIME"),
    Flag("--newest", ("choose", "newest"), "N"),
    Flag("--hottest", ("choose", "hottest"), "N"),
    Flag("--max-bytes", ("choose", "max_bytes"), "SIZE"),
    Flag("--keys-from", ("choose", "keys_from"), "FILE", many=True),
    Flag("--prompts", ("choose", "prompts"), "FILE"),
    Flag("--chunk-size", ("choose", "chunk_size"), "N"),
    Flag("--hash-algorithm", ("choose", "hash_algorithm"), "NAME"),
    Flag("--tier", ("tiers",), "NAME|JSON", many=True),
    Flag("--fsync", ("filling", "fsync"), ""),
    Flag("--tier-max-bytes", ("filling", "max_bytes"), "SIZE"),
    Flag("--min-free", ("filling", "min_free"), "SIZE"),
    Flag("--evict", ("filling", "evict"), ""),
    Flag("--chown", ("filling", "chown"), "OWNER"),
    Flag("--chmod", ("filling", "chmod"), "MODE"),
    Flag("--direct", ("moving", "direct"), ""),
    Flag("--object-store-fraction", ("moving", "object_store_fraction"), "SHARE"),
    Flag("--verify", ("moving", "verify"), "WHAT"),
    Flag("--verify-present", ("moving", "verify_present"), ""),
    Flag("--max-bandwidth", ("moving", "max_bandwidth"), "SIZE"),
    Flag("--max-node-bandwidth", ("moving", "max_node_bandwidth"), "SIZE"),
    Flag("--max-inflight-bytes", ("moving", "max_inflight_bytes"), "SIZE"),
    Flag("--node-selector", ("nodes", "selector"), "LABEL", many=True),
    Flag("--nodes", ("nodes", "names"), "NAMES", many=True),
    Flag("--ranks-label", ("nodes", "ranks_label"), "NAME"),
    Flag("--ranks", ("nodes", "ranks"), "NODE=RANKS", many=True),
    Flag("--replace-nodes", ("nodes", "replace"), ""),
    Flag("--chunk-timeout", ("limits", "chunk_timeout"), "TIME"),
    Flag("--node-timeout", ("limits", "node_timeout"), "TIME"),
    Flag("--wait-engine", ("limits", "wait_engine"), "TIME"),
    Flag("--max-duration", ("limits", "max_duration"), "TIME"),
    Flag("--address", ("address",), "HOST:PORT"),
    Flag("--report", ("report",), "FILE"),
    Flag("--report-html", ("report_html",), "FILE"),
)

_CONFIG: Final = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config", help="A warm.yaml that says all this; flags win over it.", metavar="FILE", show_default=False
        ),
    ],
)


def flags_of(*sections: str) -> tuple[Flag, ...]:
    """The flags whose place begins with one of some names."""
    return tuple(flag for flag in FLAGS if flag.place[0] in sections)


def with_flags(flags: Iterable[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config` and some flags: it is called with the file, and with what flags gave, by place.

    The command takes `config` and `given`, and options of its own.
    """
    chosen = tuple(flags)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        kept = [parameter for name, parameter in own.items() if name not in {"config", "given"}]
        parameters = [*kept, _CONFIG, *(flag.parameter() for flag in chosen)]

        @wraps(command)
        def called(**values: Any) -> None:
            given = {flag: value for flag in chosen if (value := values.pop(flag.variable)) not in (None, [])}
            command(given=given, **values)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def nested(given: Mapping[Flag, Any]) -> dict[str, Any]:
    """What flags gave, as a warm-up has it.

    Raises:
        ConfigError: Ranks name no node, or one twice.
    """
    values: dict[str, Any] = {}
    for flag, value in given.items():
        section = values
        for step in flag.place[:-1]:
            section = section.setdefault(step, {})
        section[flag.place[-1]] = _ranks(value) if flag.name == "--ranks" else value
    return values


def _ranks(texts: Iterable[str]) -> dict[str, str]:
    ranks: dict[str, str] = {}
    for text in texts:
        node, _, of = text.rpartition("=")
        if not node:
            raise ConfigError(f"--ranks {text!r} reads NODE=RANKS, as gpu-a=0-3")
        if node in ranks:
            raise ConfigError(f"--ranks names {node} twice; several ranges are joined by ',', as 0-3,8-11")
        ranks[node] = of
    return ranks
