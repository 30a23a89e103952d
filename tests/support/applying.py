"""A plan applied to one node's tier without Ray, in this process, or in another one that kills itself at some step of it."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path

import pytest

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.tools.signals import ShutdownSignal
from tests.support.warming import INSTANCE
from warmer.cluster.placement import Assignment
from warmer.cluster.ray import Node
from warmer.cluster.schedule_setup import schedule_of
from warmer.node.worker import NodeWarmer
from warmer.plan.plan_file import WarmPlanFile
from warmer.request.model import TransferOptions
from warmer.tiers import declared_tier, open_tier

STEPS = {
    "open", "close", "write", "pwrite", "truncate", "ftruncate", "fallocate", "posix_fallocate", "copy_file_range", "sendfile",
    "rename", "replace", "link", "unlink", "mkdir", "chmod", "fchmod", "chown", "fchown", "flock", "fsync",
}  # fmt: skip
"""What is called of the system, on a tier's files among others."""

PLACES = ("/warmer/tiers/", "/pathlib", "/shutil.py")


def applied(config: Path, plan: Path, ranks, batches=None):
    """Apply a plan, all of it or as far as it came before it was stopped; returns the outcomes."""
    settings = EngineConfig.read(config).instance(INSTANCE)
    bucket = open_bucket(settings, INSTANCE, telemetry.MemorySink(), 60.0)
    node = NodeWarmer(bucket, open_tier(declared_tier(EngineConfig.read(config), "fs.warm")))
    try:
        assigned = [Assignment(Node("n", "n"), ranks)]
        schedule = schedule_of(
            TransferOptions.model_validate({}), assigned, WarmPlanFile.open(plan), bucket, ShutdownSignal()
        )
        schedule.started("n")
        outcomes = []
        while not schedule.done and batches != 0:
            for order in schedule.orders(0.0):
                ended = node.copy(order.chunks[:2] if batches else order.chunks)
                outcomes += ended
                if len(ended) == len(order.chunks):
                    schedule.fetched(order.number, ended, shared=False, now=0.0)
            batches = None if batches is None else 0
        return outcomes
    finally:
        node.close()
        bucket.close()


def _apply_and_die(config: Path, plan: Path, ranks, step: int) -> None:
    left = step

    def count(frame, event: str, function) -> None:
        nonlocal left
        if event == "c_return" and function.__name__ in STEPS:
            file = frame.f_code.co_filename
            if any(place in file for place in PLACES):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)  # of threads that are yet to start
    sys.setprofile(count)
    applied(config, plan, ranks)


def _forkserver():
    """Processes that begin with all modules loaded: the server would else not find this one, and say nothing of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def applied_until_killed(config: Path, plan: Path, ranks, step: int) -> bool:
    """Apply a plan in a process that is killed just after its step number `step` on files; whether it was."""
    process = _forkserver().Process(target=_apply_and_die, args=(config, plan, ranks, step))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
