"""The dashboard shows the metrics that there are, with the labels that they have."""

import json
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from hfbucket_plugin.core.telemetry import PrometheusSink

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "lmcache-hfbucket.json"
OF_PROMETHEUS = {"exported_instance", "le"}


def expressions():
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def known():
    registry = CollectorRegistry()
    PrometheusSink(registry)
    return {
        name: set(collector._labelnames) for collector, names in registry._collector_to_names.items() for name in names
    }


def test_every_metric_is_shown_and_every_one_shown_is_a_metric():
    shown = {name for text in expressions() for name in re.findall(r"hfbucket_\w+", text)}
    families = {re.sub(r"_(total|created|bucket|sum|count)$", "", name) for name in known()}

    assert shown <= known().keys()
    assert {re.sub(r"_(total|bucket)$", "", name) for name in shown} == families


def test_labels_are_those_of_the_metric():
    for text in expressions():
        labels = set().union(*(known()[name] for name in re.findall(r"hfbucket_\w+", text)))
        used = {label for group in re.findall(r"by \(([^)]*)\)", text) for label in re.split(r",\s*", group)}
        used |= set(re.findall(r'(\w+)(?:=~|!=|=)"', text))

        assert used <= labels | OF_PROMETHEUS, text
