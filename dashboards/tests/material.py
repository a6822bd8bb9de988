"""What is tested: the dashboards, the rules, and the metrics that the sources define."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "dashboards"
RULES = HERE / "prometheus/rules.yaml"
NAMES = ("training", "communication", "shards", "workers")

# By the Prometheus client's process collector, which `observe_process` adds.
PROCESS_METRICS = {
    "process_cpu_seconds_total": "Total user and system CPU time spent in seconds.",
    "process_resident_memory_bytes": "Resident memory size in bytes.",
}
# What Prometheus itself, and the first group of rules, add.
OTHER_NAMES = {"up"}

_DEFINED = re.compile(r'(?:r\.(\w+)\(|(Opts)::new\()\s*"((?:arc)_[a-z0-9_]+)"')
_HISTOGRAM = ("histogram", "histograms")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"(?<![\w:$])(?:(?:arc|process)_[a-z0-9_]+|arc:[a-z0-9_:]+)")


class Query(NamedTuple):
    """A query of a panel."""

    dashboard: str
    panel: str
    expr: str
    legend: str

    def __str__(self) -> str:
        return f"{self.dashboard} / {self.panel} / {self.legend}"


def metric_sources() -> str:
    """The module in which all metrics are named, without its tests."""
    folder = ROOT / "common/src/metrics"
    return "\n".join((folder / f"{name}.rs").read_text() for name in ("mod", "shard", "worker"))


def defined_metrics() -> dict[str, bool]:
    """Every metric of the sources, and whether it is a histogram."""
    return {name: kind in _HISTOGRAM for kind, _, name in _DEFINED.findall(metric_sources())}


def series_of(name: str, histogram: bool) -> set[str]:
    """Names under which Prometheus stores a metric."""
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")} if histogram else {name}


def names_in(expr: str) -> set[str]:
    """Metrics and recorded rules that an expression reads."""
    return set(_NAME.findall(_STRING.sub('""', expr)))


def dashboard(name: str) -> dict[str, Any]:
    """A dashboard as it is committed."""
    loaded: dict[str, Any] = json.loads((HERE / f"grafana/{name}.json").read_text())
    return loaded


def panels(name: str) -> list[dict[str, Any]]:
    """A dashboard's panels without its headings."""
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Query]:
    """All queries of all panels."""
    for name in NAMES:
        for panel in panels(name):
            for target in panel["targets"]:
                yield Query(name, panel["title"], target["expr"], target["legendFormat"])


def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def filled_in(expr: str, variables: dict[str, str] | None = None) -> str:
    """An expression with values for Grafana's variables."""
    values = {"__rate_interval": "1m", "__range": "1h", "namespace": ".*", "job": ".*", "pool": ".*"} | (variables or {})
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)
