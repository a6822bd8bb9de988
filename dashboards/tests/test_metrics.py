"""Names in dashboards and rules, and names in the sources, are the same."""

from __future__ import annotations

import re

import pytest

from material import (
    NAMES,
    OTHER_NAMES,
    PROCESS_METRICS,
    defined_metrics,
    metric_sources,
    names_in,
    queries,
    rules,
    series_of,
)

# Metrics that no dashboard and no rule shows, and why. Empty is best.
UNUSED: dict[str, str] = {}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def used() -> set[str]:
    exprs = [query.expr for query in queries()] + [rule["expr"] for rule in rules()]
    return set().union(*map(names_in, exprs))


def known() -> set[str]:
    series = (series_of(name, histogram) for name, histogram in defined_metrics().items())
    return set().union(*series) | set(PROCESS_METRICS) | OTHER_NAMES | recorded()


def test_the_sources_are_understood() -> None:
    named = set(re.findall(r'"(arc_[a-z0-9_]+)"', metric_sources()))
    assert named == set(defined_metrics())
    assert len(named) > 50
    assert {"arc_round_seconds", "arc_step_phase_seconds"} <= {name for name, histogram in defined_metrics().items() if histogram}


def test_names_are_found_in_expressions() -> None:
    expr = 'rate(arc_x_total{job=~"arc_no"}[5m]) / arc:y:rate5m and on (job) process_z{instance="process_no"}'
    assert names_in(expr) == {"arc_x_total", "arc:y:rate5m", "process_z"}


def test_what_is_shown_exists() -> None:
    assert used() - known() == set()


def test_what_exists_is_shown() -> None:
    shown = used()
    silent = {name for name, histogram in defined_metrics().items() if not series_of(name, histogram) & shown}
    assert silent == set(UNUSED), "show it, or say in UNUSED why not"
    assert set(PROCESS_METRICS) <= shown


@pytest.mark.parametrize("name", NAMES)
def test_dashboards_do_without_recording_rules(name: str) -> None:
    """So that they work where nobody may add rules."""
    read = set().union(*(names_in(query.expr) for query in queries() if query.dashboard == name))
    assert not read & recorded()
