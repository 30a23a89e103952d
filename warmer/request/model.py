"""Model of a whole warm-up, as `warm.yaml` and the command's flags describe it: every flag has its place in one model."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path  # noqa: TC003 - pydantic evaluates the annotations
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from hfbucket_plugin.core.units import parse_bytes
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.options import Option, flags_of
from hfbucket_plugin.tools.selection import Bytes, Length, Ranks, Seconds, Selection, Texts
from warmer.node.receive import Verify  # noqa: TC001 - as above
from warmer.node.worker import CHUNK_TIMEOUT_SECS

RANKS_LABEL: Final = "lmcache.workers"
NODE_START_SECS: Final = 60.0
"""Seconds to start a worker process on a node that is busy loading a model."""

WAIT_ENGINE: Final = timedelta(minutes=10)
"""Time to load a model of some hundred GB from a local disk."""

OBJECT_STORE_FRACTION: Final = 0.3
"""Ray spills objects to disk when a store is 80 % full; this leaves half of the store to others before that."""

_OCTAL: Final = 8


def _as_json(value: Any) -> Any:
    """Convert a mapping in YAML to the JSON text that `lmcache server` accepts."""
    return json.dumps(value) if isinstance(value, dict) else value


def _as_tiers(value: Any) -> Any:
    values = [value] if isinstance(value, (str, dict)) else value
    return [_as_json(one) for one in values] if isinstance(values, (list, tuple)) else values


def _as_size(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


def _as_mode(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return int(value, _OCTAL)
        except ValueError:
            raise ValueError(f"{value!r} is no mode of a file, in octal, such as '0640'") from None
    if isinstance(value, int):  # YAML reads 0640 as octal and 640 as decimal
        raise ValueError("write the mode as a text, such as '0640'")  # noqa: TRY004 - pydantic words ValueError only
    return value


def _as_selector(value: Any) -> Any:
    if isinstance(value, dict):
        return [f"{key}={text}" for key, text in value.items()]
    return [value] if isinstance(value, str) else value


def _as_names(value: Any) -> Any:
    """Split names separated by commas: `--nodes a,b` gives two."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) for one in values):
        return values
    return [name.strip() for one in values for name in one.split(",") if name.strip()]


def _ranks(texts: list[str]) -> dict[str, str]:
    """Convert texts such as `--ranks gpu-a=0-3` to the mapping that YAML has."""
    ranks: dict[str, str] = {}
    for text in texts:
        node, _, of = text.rpartition("=")
        if not node:
            raise ConfigError(f"--ranks {text!r} reads NODE=RANKS, as gpu-a=0-3")
        if node in ranks:
            raise ConfigError(f"--ranks names {node} twice; several ranges are joined by ',', as 0-3,8-11")
        ranks[node] = of
    return ranks


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceOptions(_Part):
    """Source of the chunks: an instance, named as in the engines' configuration."""

    lmcache_config: Annotated[Path | None, Option("FILE")] = Field(
        default=None, description="The LMCache YAML of the engines."
    )
    instance: Annotated[str | None, Option("NAME")] = Field(
        default=None,
        description="The bucket's instance in the YAML, such as hfbucket.us; optional if there is only one.",
    )
    l2_adapter: Annotated[str | None, BeforeValidator(_as_json), Option("JSON")] = Field(
        default=None, description="In MP mode, instead of a YAML: the JSON of the bucket that `lmcache server` takes."
    )


class FillOptions(_Part):
    """Options for filling tiers."""

    fsync: bool = Field(
        default=False,
        description="Force each file to disk before it appears. Off by default: only a power failure soon after the "
        "run could lose a file, but LMCache would not notice.",
    )
    max_bytes: Annotated[Bytes | None, Option("SIZE", name="--tier-max-bytes")] = Field(
        default=None, description="Maximum size of a tier's chunk files, including the engine's own, such as 500GiB."
    )
    min_free: Annotated[int, BeforeValidator(_as_size), Field(ge=0), Option("SIZE")] = Field(
        default=0, description="Space to leave free on a tier's file system, such as 20GiB. Default: 0."
    )
    evict: bool = Field(default=False, description="Delete the chunk files written longest ago to make room.")
    chown: Annotated[str | None, Option("OWNER")] = Field(
        default=None, description="Owner of the files, as user:group. Default: the directory's."
    )
    chmod: Annotated[
        Annotated[int, BeforeValidator(_as_mode), PlainSerializer("{:04o}".format)] | None, Option("MODE")
    ] = Field(
        default=None,
        description="Mode of the files, such as 0640. Default: as LMCache creates its own, less the umask.",
    )


class TransferOptions(_Part):
    """Options of the transfer: sharing between nodes, concurrency and bandwidth."""

    direct: bool = Field(default=False, description="Let every node fetch by itself, without passing chunks to others.")
    object_store_fraction: Annotated[float, Option("SHARE")] = Field(
        default=OBJECT_STORE_FRACTION,
        ge=0.01,
        le=0.7,
        description="Maximum share of each node's Ray object store for chunks. Default: 0.3. Ray begins to spill "
        "objects to disk at 0.8.",
    )
    verify: Annotated[Verify, Option("WHAT")] = Field(
        default="hash",
        description="What is checked before a chunk appears: hash (length and Xet hash), or length only. Chunks from "
        "an earlier tier of the run are always hashed. Default: hash.",
    )
    verify_present: bool = Field(
        default=False,
        description="Hash the chunks that a directory tier already holds, and replace those that differ from the "
        "bucket's. Off by default, since it reads all of them.",
    )
    max_bandwidth: Annotated[Bytes | None, Option("SIZE")] = Field(
        default=None, description="Maximum bytes per second from the Hub in the whole run, such as 500MiB."
    )
    max_node_bandwidth: Annotated[Bytes | None, Option("SIZE")] = Field(
        default=None,
        description="Maximum bytes per second that reach a node, from the Hub or from other nodes, such as 100MiB.",
    )
    max_inflight_bytes: Annotated[Bytes | None, Option("SIZE")] = Field(
        default=None,
        description="Maximum bytes in flight from the Hub in the whole run, such as 2GiB. Default: 256MiB per node, "
        "in at most four batches.",
    )


class NodeOptions(_Part):
    """Options that select nodes, and assign workers' chunks to them."""

    selector: Annotated[
        tuple[str, ...], BeforeValidator(_as_selector), Option("LABEL", name="--node-selector", many=True)
    ] = Field(
        default=(),
        description="Use only nodes with this Ray label, such as pool=serving; also pool=!serving, pool=in(a,b) and "
        "pool=!in(a,b). All selectors given must match.",
    )
    names: Annotated[tuple[str, ...], BeforeValidator(_as_names), Option("NAMES", name="--nodes", many=True)] = Field(
        default=(), description="Use only these nodes, by name or id, separated by commas."
    )
    ranks_label: Annotated[str, Option("NAME")] = Field(
        default=RANKS_LABEL,
        description="Node label that says whose chunks a node takes, such as 0-3; join several ranges with '_', since"
        " labels cannot contain commas. A node without it takes those of all workers.",
    )
    ranks: Annotated[dict[str, Ranks], Option("NODE=RANKS", many=True, parse=_ranks)] = Field(
        default_factory=dict,
        description="The same by name or id of the node, such as gpu-a=0-3; overrides the label.",
    )
    replace: Annotated[bool, Option(name="--replace-nodes")] = Field(
        default=False, description="Let nodes that join the cluster during the run replace lost ones."
    )


class LimitOptions(_Part):
    """Time limits."""

    chunk_timeout: Annotated[Seconds, Option("TIME")] = Field(
        default=CHUNK_TIMEOUT_SECS,
        description="Maximum time for a chunk with its batch (up to 64 MiB, or one larger chunk) and retries, in "
        "seconds or such as 5m. Default: 300.",
    )
    node_timeout: Annotated[Seconds, Option("TIME")] = Field(
        default=NODE_START_SECS,
        description="Maximum time until a node takes part, in seconds or such as 2m. Default: 60.",
    )
    wait_engine: Annotated[Length, Option("TIME")] = Field(
        default=WAIT_ENGINE,
        description="Maximum time that a tier in the memory of engines waits for the engine of each node, such as "
        "10m. Default: 10m.",
    )
    max_duration: Annotated[Seconds | None, Option("TIME")] = Field(
        default=None,
        description="Stop in good order, with exit code 5, after this time of copying, in seconds or such as 30m. "
        "Selecting chunks beforehand may take as long (1 h if not given), including pauses of the Hub.",
    )


class WarmRequest(_Part):
    """A whole warm-up."""

    source: SourceOptions = Field(default_factory=lambda: SourceOptions.model_validate({}))
    choose: Selection = Field(default_factory=lambda: Selection.model_validate({}))
    tiers: Annotated[Texts, BeforeValidator(_as_tiers), Option("NAME|JSON", name="--tier", many=True)] = Field(
        default=(),
        description="The tier to fill: an fs plugin of the YAML, such as fs.warm; the JSON of an fs or fs_native "
        "adapter of `lmcache server`; l1, the server's memory; local_cpu, that of the YAML's engine. "
        "Several are filled one after the other.",
    )
    filling: FillOptions = Field(default_factory=lambda: FillOptions.model_validate({}))
    moving: TransferOptions = Field(default_factory=lambda: TransferOptions.model_validate({}))
    nodes: NodeOptions = Field(default_factory=lambda: NodeOptions.model_validate({}))
    limits: LimitOptions = Field(default_factory=lambda: LimitOptions.model_validate({}))
    address: Annotated[str | None, Option("HOST:PORT")] = Field(
        default=None,
        description="The Ray cluster, <host>:<port>. Default: RAY_ADDRESS, or the cluster of the submitted job; "
        "without either, a local Ray is started.",
    )
    report: Annotated[Path | None, Option("FILE")] = Field(
        default=None,
        description="Write a JSON line for every failed chunk, and the summary as the last line, to this file.",
    )
    report_html: Annotated[Path | None, Option("FILE")] = Field(
        default=None, description="Write a self-contained HTML page with plots when the command is over."
    )


FLAGS: Final = flags_of(WarmRequest)
"""The options of the commands, one for each field."""
