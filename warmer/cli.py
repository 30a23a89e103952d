"""`python -m warmer`: the command line. stdout holds the summary and nothing else; everything for people is on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path  # noqa: TC003 - Typer evaluates the annotations
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from hfbucket_plugin.errors import HFBucketError, ThrottledError, TransportError
from warmer import exits
from warmer.errors import ClusterError, Interrupted
from warmer.interrupt import StopSwitch
from warmer.moving import OBJECT_STORE_FRACTION, Moving
from warmer.node import CHUNK_TIMEOUT_SECS
from warmer.run import NODE_START_SECS, NothingToDoError, Order, run

if TYPE_CHECKING:
    from warmer.receive import Verify

# Tracebacks of Typer's show local variables, and with them a token.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _size(text: str) -> int:
    """A size such as 500MiB."""
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size; write it as 500MiB or 2GiB")
    return int(size)


def _verify(text: str) -> Verify:
    if text not in {"hash", "length"}:
        _end(f"--verify {text!r}: there are 'hash' and 'length'", exits.USAGE)
    return "length" if text == "length" else "hash"


@app.callback()
def main() -> None:
    """Fill node-local LMCache tiers from a Hugging Face Bucket, on every node of a Ray cluster."""


@app.command("run")
def run_command(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: Annotated[
        Path, typer.Option(help="The LMCache YAML of the engines: it declares the instance and the tier.")
    ],
    instance: Annotated[str, typer.Option(help="The bucket's instance in it, such as hfbucket.us.")],
    prefix: Annotated[
        list[str], typer.Option(help="Copy the chunks whose key starts with this, such as 'org/model@8@'. Repeatable.")
    ],
    tier: Annotated[str, typer.Option(help="The tier to fill: an fs plugin of the YAML, such as fs.warm.")],
    address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster, <host>:<port>. Default: RAY_ADDRESS, or the cluster of the job that this is; "
            "without either a local Ray is started."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a JSON line for every failed chunk, and the summary, to this file.")
    ] = None,
    fsync: Annotated[
        bool, typer.Option(help="Force each file to the disk before it appears: for nodes that may lose power.")
    ] = False,
    chunk_timeout: Annotated[
        float, typer.Option(min=1.0, help="Most seconds a chunk may take, its batch and retries included.")
    ] = CHUNK_TIMEOUT_SECS,
    node_timeout: Annotated[
        float, typer.Option(min=1.0, help="Most seconds a node may take to take part.")
    ] = NODE_START_SECS,
    direct: Annotated[
        bool, typer.Option("--direct", help="Have every node fetch for itself, and hand nothing to the others.")
    ] = False,
    object_store_fraction: Annotated[
        float, typer.Option(min=0.01, max=0.7, help="Most of each node's Ray object store that chunks may take.")
    ] = OBJECT_STORE_FRACTION,
    verify: Annotated[
        str, typer.Option(help="What is checked before a chunk appears: 'hash', or 'length' only.")
    ] = "hash",
    max_bandwidth: Annotated[
        int | None, typer.Option(parser=_size, help="Most bytes a second from the Hub in the whole run: 500MiB.")
    ] = None,
    max_node_bandwidth: Annotated[
        int | None, typer.Option(parser=_size, help="Most bytes a second that reach a node, from wherever: 100MiB.")
    ] = None,
    max_inflight_bytes: Annotated[
        int | None, typer.Option(parser=_size, help="Most bytes being fetched from the Hub in the whole run: 2GiB.")
    ] = None,
    max_duration: Annotated[
        float | None, typer.Option(min=1.0, help="Stop in good order after so many seconds of copying.")
    ] = None,
    replace_nodes: Annotated[
        bool, typer.Option("--replace-nodes", help="Have nodes that join take the places of those that are lost.")
    ] = False,
) -> None:
    """Copy chunks into a tier of every node; what is there already is passed by.

    Exits 0 when all are there, 2 for a wrong configuration or command, 3 when some failed, 4 when there was nothing
    to do, 5 when told to stop. Running again moves only what is missing.
    """
    if not all(prefix):
        message = "an empty --prefix would select the whole instance; name at least a model, such as 'org/model@'"
        _end(message, exits.USAGE)
    order = Order(
        config=lmcache_config,
        instance=instance,
        tier=tier,
        prefixes=tuple(prefix),
        address=address,
        report=report,
        fsync=fsync,
        chunk_timeout_secs=chunk_timeout,
        node_start_secs=node_timeout,
        moving=Moving(
            direct=direct,
            store_fraction=object_store_fraction,
            verify=_verify(verify),
            max_bandwidth=max_bandwidth,
            max_node_bandwidth=max_node_bandwidth,
            max_inflight_bytes=max_inflight_bytes,
            max_secs=max_duration,
            replace_nodes=replace_nodes,
        ),
    )
    logging.basicConfig(stream=sys.stderr, format="warmer: %(message)s", level=logging.WARNING)
    logging.getLogger("warmer").setLevel(logging.INFO)
    stop = StopSwitch()
    try:
        # Ray prints where it likes.
        with stop.listening(), contextlib.redirect_stdout(sys.stderr):
            summary = run(order, stop)
    except Interrupted:
        _end("told to stop; running again moves only what is missing", exits.INTERRUPTED)
    except (HFBucketError, OSError) as error:
        _end(_advised(error, instance), _code(error))
    typer.echo(json.dumps(summary))
    raise typer.Exit(summary["exit_code"])


def _code(error: Exception) -> int:
    if isinstance(error, NothingToDoError):
        return exits.REFUSED
    if isinstance(error, (TransportError, ThrottledError)):
        return exits.FAILED
    return exits.USAGE


def _advised(error: Exception, instance: str) -> str:
    """The error's words, and the setting to look at where they do not name it."""
    if isinstance(error, TransportError) and not isinstance(error, ClusterError):
        return f"{error}; if it stays so, look at remote_storage_plugin.{instance}.endpoint or HF_ENDPOINT"
    return str(error)


def _note(line: str) -> None:
    typer.echo(f"warmer: {line}", err=True)


def _end(message: str, code: int) -> NoReturn:
    _note(message)
    raise typer.Exit(code)
