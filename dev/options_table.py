"""Writes the tables of options in docs/ from the command lines themselves: `make docs`. A test checks that it was run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer.main

import hfbucket_plugin.cli.app
import jobs.cli.app
import warmer.cli.app
from dev.generated import table, write

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
HEAD: Final = ("option", "meaning", "of")


def commands_of(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups within it, by the words that call them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def options(app: typer.Typer) -> str:
    """The table of all options of an application, each once: what `--help` says of it, and the commands that take it."""
    commands = dict(commands_of(typer.main.get_command(app)))
    meanings: dict[str, dict[str, list[str]]] = {}
    for name, command in commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record and parameter.param_type_name == "option":
                meanings.setdefault(record[0], {}).setdefault(record[1], []).append(name)
    rows = []
    for shown, by_meaning in meanings.items():
        users = [name for names in by_meaning.values() for name in names]
        texts = [
            f"{_names(names)}: {_escaped(text)}" if len(by_meaning) > 1 else _escaped(text)
            for text, names in by_meaning.items()
        ]
        rows.append(
            (
                f"`{shown.replace('|', ' or ')}`",
                "<br>".join(texts),
                "all" if len(users) == len(commands) else _names(users),
            )
        )
    return table(HEAD, rows)


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*")


def parts() -> dict[Path, dict[str, str]]:
    """The generated parts by page."""
    return {
        DOCS / "warm-options.md": {"warmer_options": options(warmer.cli.app.app)},
        DOCS / "jobs-options.md": {"jobs_options": options(jobs.cli.app.app)},
        DOCS / "doctor.md": {"plugin_options": options(hfbucket_plugin.cli.app.app)},
    }


if __name__ == "__main__":
    for page, texts in parts().items():
        write(page, texts)
