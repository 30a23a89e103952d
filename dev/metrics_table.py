"""Writes the tables of metrics in docs/metrics.md from their definitions: `make docs`. A test checks that it was run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import prometheus_client
import ray.util.metrics

from dev.generated import table, write
from hfbucket_plugin.core.telemetry import PrometheusSink
from jobs.batch.ray_pool import RayCounts
from jobs.report import GAUGES
from warmer.report.metrics import PREFIX, RunMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEAD: Final = ("name", "kind", "labels", "meaning")


def _row(name: str, kind: str, labels: tuple[str, ...], meaning: str) -> tuple[str, ...]:
    return f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), meaning.rstrip(".")


def of_the_plugin() -> Iterator[tuple[str, ...]]:
    """The metrics of engines, in the order of their definition."""
    registry = prometheus_client.CollectorRegistry()
    PrometheusSink(registry)
    for collector in registry._collector_to_names:  # noqa: SLF001 - the labels are in no public place
        (family,) = collector.collect()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield _row(name, family.type, getattr(collector, "_labelnames", ()), family.documentation)


def metrics_within(value: object) -> Iterator[Any]:
    """All metrics of Ray that an object holds, however deep."""
    if isinstance(value, ray.util.metrics.Metric):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from metrics_within(inner)
    elif hasattr(value, "__dict__"):
        yield from metrics_within(vars(value))


def on_ray(holder: object) -> Iterator[tuple[str, ...]]:
    """The metrics of the Ray cluster that an object reports."""
    for metric in metrics_within(holder):
        info = metric.info
        counter = isinstance(metric, ray.util.metrics.Counter)
        name = f"{PREFIX}{info['name']}" + "_total" * counter
        yield _row(name, type(metric).__name__.lower(), info["tag_keys"], info["description"])


def of_a_textfile() -> Iterator[tuple[str, ...]]:
    """The metrics that jobs write for the textfile collector."""
    for name, meaning in GAUGES.items():
        yield _row(name, "gauge", ("instance", "job_name"), meaning)


def parts() -> dict[str, str]:
    """The generated parts of the page."""
    rows = {
        "plugin_metrics": of_the_plugin(),
        "warmer_metrics": on_ray(RunMetrics()),
        "jobs_metrics": of_a_textfile(),
        "jobs_ray_metrics": on_ray(RayCounts("")),
    }
    return {name: table(HEAD, sorted(some)) for name, some in rows.items()}


if __name__ == "__main__":
    write(PAGE, parts())
