"""One export: plan → apply → report. It adds, it replaces where that was ordered, and it never deletes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import secrets
import tempfile
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import ConfigError, HFBucketError, RefusedError
from hfbucket_plugin.workers import WorkerPool
from jobs import exits
from jobs.apply import Applier
from jobs.directory_destination import DirectoryDestination, Known
from jobs.directory_source import DirectorySource
from jobs.export_plan import CONFLICT, REPLACED, Header, Place, PlanFile, PlanWriter
from jobs.export_planning import PAGE, ExportPlanning, OnConflict
from jobs.export_report import NAMED_CONFLICTS, ExportSummary, conflict_record
from jobs.instance_end import InstanceEnd
from jobs.manifest import Line
from jobs.moving import How, Method, Moved, Mover, find_out
from jobs.report import Tally
from jobs.run import code_of, coded, default_plan_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.named import NamedInstance
    from jobs.apply import Executor
    from jobs.apply import End as Ended_
    from jobs.batch import Batch, Ended, Result
    from jobs.choosing import Wanted
    from jobs.ends import Destination, Source
    from jobs.export_plan import Move
    from jobs.rename import Renames
    from jobs.report import ReportFile
    from warmer.interrupt import StopSwitch

_ATTEMPT_SECS: Final = 600.0
"""Most seconds of a try: a window of bytes between two continents takes minutes."""

_LOOK_UP_SECS: Final = 330.0
"""A look-up waits out the longest pause that the Hub asks for."""


def _safe(text: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in text)[-60:]
