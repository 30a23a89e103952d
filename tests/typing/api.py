"""The public types, as a type checker sees them. Never run: `make lint` checks it."""

from datetime import timedelta
from pathlib import Path
from typing import assert_type

import hfbucket_plugin
import jobs
import warmer
from hfbucket_plugin import ConfigError, HFBucketError, SafetyError

assert_type(hfbucket_plugin.__version__, str)


def warm() -> int:
    request = warmer.WarmRequest(
        source=warmer.SourceOptions(lmcache_config=Path("lmcache.yaml"), instance="hfbucket.us"),
        choose=warmer.Selection(model=("org/model",), since=timedelta(hours=24)),
        tiers=("fs.warm",),
        filling=warmer.FillOptions(min_free=20 * 2**30),
        moving=warmer.TransferOptions(max_bandwidth=500 * 2**20),
        nodes=warmer.NodeOptions(selector=("pool=serving",)),
        limits=warmer.LimitOptions(max_duration=1800),
    )
    summary = warmer.warm_up(request)
    assert_type(summary, warmer.WarmSummary)
    assert_type(summary.copied, int)
    assert_type(summary.seconds, float)
    for node in summary.nodes:
        assert_type(node, warmer.WarmedNode)
        assert_type(node.error, str | None)
    for failure in summary.failures:
        assert_type(failure, warmer.WarmFailure)
        assert_type(failure.key, str | None)
    return summary.exit_code


assert_type(warmer.read_request(Path("warm.yaml")), warmer.WarmRequest)


def clean() -> str:
    policy = jobs.Policy(
        max_age=timedelta(days=14),
        models=jobs.Models(keep=("org/model",)),
        rules=(jobs.Rule(prefix="org/model@1@", max_idle=timedelta(days=3)),),
    )
    request = jobs.CleanupRequest(
        lmcache_config=Path("lmcache.yaml"),
        instance="hfbucket.us",
        policy=policy,
        max_delete=jobs.MaxDelete(percent=10),
    )
    try:
        summary = jobs.run_cleanup(request, apply=True)
    except SafetyError as error:
        return error.message
    assert_type(summary, jobs.DeletionSummary)
    assert_type(summary.planned, jobs.Extent)
    assert_type(summary.deleted.objects, int)
    assert_type(summary.unfinished.bytes, int)
    assert_type(summary.failures, tuple[dict[str, str], ...])
    assert_type(summary.exit_code, int)
    return summary.result


def copy() -> bool:
    request = jobs.ExportRequest(
        source="hfbucket.us",
        destination="hfbucket.eu",
        lmcache_config=Path("lmcache.yaml"),
        select=jobs.Selection(model=("org/model",)),
        on_conflict="newer",
        mode="copy",
    )
    summary = jobs.run_export(request)
    assert_type(summary, jobs.ExportSummary)
    assert_type(summary.moved, jobs.Extent)
    return summary.exit_code == 0


def look() -> int | None:
    try:
        status = jobs.read_status(lmcache_config=Path("lmcache.yaml"), instance="hfbucket.us")
    except (ConfigError, HFBucketError):
        return None
    assert_type(status, jobs.Status)
    assert_type(status.chunks, jobs.Extent)
    assert_type(status.by_model, dict[str, jobs.Extent])
    return status.chunks.objects
