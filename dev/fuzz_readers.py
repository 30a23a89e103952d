"""Feed the readers of what others write with inputs that libFuzzer makes: `python -m dev.fuzz_readers answers -max_total_time=60`.

Needs the package atheris, which is installed for this alone (`pip install atheris`; it has wheels for Linux). The suite has the same
properties with hypothesis, bounded in time.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable


def _answers(data: bytes) -> None:
    from hfbucket_plugin.errors import TransportError
    from hfbucket_plugin.hub import answers

    answers.words(data)
    for read in (answers.document, answers.records):
        try:
            found = read(data, "fuzz", answers.PAGE)
        except TransportError:
            continue
        for record in found if isinstance(found, list) else [found]:
            if not isinstance(record, dict):
                continue
            for field in (answers.path_of, answers.content_of, answers.uploaded_at):
                try:
                    field(record)
                except ValueError:
                    continue


def _unpacking(data: bytes) -> None:
    from hfbucket_plugin.errors import TransportError
    from hfbucket_plugin.hub.answers import Unpacking

    for encoding in ("gzip", "deflate", ""):
        try:
            unpacking = Unpacking(encoding, "fuzz")
            for piece in unpacking.pieces(data):
                if len(piece) > max(len(data), 65536):
                    raise AssertionError("a piece is larger than it may be")
            unpacking.finish()
        except TransportError:
            continue


def _dates(data: bytes) -> None:
    from hfbucket_plugin.core.dates import http_date, iso_date

    text = data.decode("utf-8", "replace")
    http_date(text)
    try:
        iso_date(text)
    except ValueError:
        return


def _yaml(data: bytes) -> None:
    from hfbucket_plugin.config.yaml_file import parse_yaml
    from hfbucket_plugin.errors import ConfigError

    try:
        parse_yaml(data.decode("utf-8", "replace"), "fuzz")
    except ConfigError as error:
        if "\n" in str(error):
            raise AssertionError("an error of several lines") from error


READERS: Final[dict[str, Callable[[bytes], None]]] = {
    "answers": _answers,
    "unpacking": _unpacking,
    "dates": _dates,
    "yaml": _yaml,
}


def main(arguments: list[str]) -> None:
    """Fuzz one reader until libFuzzer ends; what breaks it is written to a file and ends this with an error.

    Args:
        arguments: The name of a reader, and options of libFuzzer.
    """
    if not arguments or arguments[0] not in READERS:
        sys.exit(f"name a reader: {', '.join(READERS)}; options of libFuzzer follow, such as -max_total_time=60")
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        sys.exit("the package atheris is missing: pip install atheris")
    with atheris.instrument_imports(include=["hfbucket_plugin"]):
        READERS[arguments[0]](b"")
    atheris.Setup([sys.argv[0], *arguments[1:]], READERS[arguments[0]])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
