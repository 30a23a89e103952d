"""Command line: `python -m localhub serve --root DIR`."""

import argparse
import sys
from pathlib import Path

from localhub.app import Options
from localhub.http.access import TokensError, load_tokens
from localhub.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 1 with an error on stderr."""
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
    parser = argparse.ArgumentParser(prog="localhub", description="A local Hugging Face Hub with buckets, for tests.")
    serving = parser.add_subparsers(required=True, metavar="command").add_parser(
        "serve",
        help="serve a root directory until SIGTERM or SIGINT",
        description="Serve a root directory until SIGTERM or SIGINT. Prints one line of JSON when ready.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serving.add_argument(
        "--root",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of everything that the Hub stores; created when missing",
    )
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serving.add_argument("--port", type=_port, default=0, help="port to listen on; 0 for any free port")
    serving.add_argument(
        "--page-size",
        type=_positive,
        default=1000,
        metavar="N",
        help="maximum number of entries on a page of a listing",
    )
    serving.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="YAML file with tokens and their rights; without it, every caller may do everything",
    )
    serving.add_argument(
        "--cas-token-ttl",
        type=float,
        default=3600.0,
        metavar="S",
        help="validity of storage tokens and links, in seconds",
    )
    serving.add_argument(
        "--faults",
        action="store_true",
        help="accept faults at /_control/faults, without a token even if --tokens is given",
    )
    serving.add_argument("--until-stdin-closes", action="store_true", help="also exit when stdin, a pipe, is closed")
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
