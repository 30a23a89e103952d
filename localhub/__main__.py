"""Command line: `python -m localhub serve --root DIR`."""

import argparse
import sys
from pathlib import Path

from localhub.app import Options
from localhub.http.access import TokensError, load_tokens
from localhub.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 1 with a message on stderr."""
    given = _parser().parse_args(arguments)
    try:
        options = Options(
            root=given.root.absolute(),
            page_size=given.page_size,
            tokens=None if given.tokens is None else load_tokens(given.tokens),
            cas_token_ttl_s=given.cas_token_ttl,
            faults=given.faults,
        )
        serve(options, given.host, given.port, until_stdin_closes=given.until_stdin_closes)
    except (OSError, RuntimeError, TokensError) as error:
        sys.stderr.write(f"localhub: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="localhub", description="A Hugging Face Hub with buckets, on loopback.")
    serving = parser.add_subparsers(required=True, metavar="command").add_parser(
        "serve",
        help="serve a root directory until SIGTERM or SIGINT",
        description="Serve a root directory until SIGTERM or SIGINT. Prints one line of JSON when ready.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serving.add_argument("--root", type=Path, required=True, metavar="DIR", help="where everything is stored")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serving.add_argument("--port", type=_port, default=0, help="port to listen on, 0 for any that is free")
    serving.add_argument("--page-size", type=_positive, default=1000, metavar="N", help="entries on a listing's page")
    serving.add_argument(
        "--tokens", type=Path, metavar="FILE", help="YAML of who may do what; default: anybody anything"
    )
    serving.add_argument(
        "--cas-token-ttl",
        type=float,
        default=3600.0,
        metavar="S",
        help="seconds that storage tokens and links hold",
    )
    serving.add_argument(
        "--faults",
        action="store_true",
        help="take orders for faults at /_control/faults, from anybody: with --tokens too, without a token",
    )
    serving.add_argument("--until-stdin-closes", action="store_true", help="end as well when stdin, a pipe, is closed")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _port(text: str) -> int:
    number = int(text)
    if number not in range(65536):
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return number


if __name__ == "__main__":
    sys.exit(main())
