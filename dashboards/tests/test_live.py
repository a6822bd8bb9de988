"""A real Prometheus watches a real job, which is disturbed; then every panel and every rule must have data."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from job import NAME, Job, Prometheus, await_that, watched
from material import defined_metrics, filled_in, queries, rules, series_of

# Queries (dashboard / panel / legend) without data in this job, and why.
MAY_BE_EMPTY: dict[str, str] = {}
# Metrics without a series in this job, and why.
MAY_BE_SILENT: dict[str, str] = {}
VARIABLES = {"__rate_interval": "5s", "__range": "5m", "namespace": ".*", "job": NAME, "pool": "fast|slow"}


class Watched(NamedTuple):
    """The job's time, and who can tell of it."""

    prometheus: Prometheus
    start: float
    end: float


def slow_down(job: Job) -> None:
    """Rounds close without worker 1, until it is called a straggler."""

    def called() -> bool:
        # Stopped for so short a time that it does not count as lost, and long enough for Prometheus to see what is said of it.
        job.signal("worker-1", signal.SIGSTOP)
        time.sleep(2)
        said = job.value("shard-0", 'arc_persistent_straggler{rank="1"}')
        job.signal("worker-1", signal.SIGCONT)
        return said == 1

    await_that(called, "worker 1 is called a straggler")
    job.await_steps("worker-1", 5)


def disturb(job: Job) -> None:
    """All that a job may suffer, once."""
    # Before anything changes they know of each other, and of nothing that happened.
    for name in ("worker-0", "worker-1", "worker-2"):
        assert job.value(name, "arc_members") == 3
        assert 'arc_reconnects_total{shard="1"} 0\n' in job.metrics(name)
    assert 'arc_late_contributions_total{rank="1"} ' in job.metrics("shard-0")
    job.certs("--renew", "--days", "30")
    job.signal("shard-0", signal.SIGHUP)
    slow_down(job)
    job.worker("worker-3")
    # One with other settings is refused.
    job.worker("refused", "--density=0.3")
    # Frames that shards delay come too late now and then.
    job.await_value("shard-0", "arc_lateness_seconds_count", 5)
    # One that is lost, and comes back.
    job.signal("worker-2", signal.SIGSTOP)
    job.await_value("shard-0", "arc_members_away", 1)
    # Long enough to be scraped, and not to be taken off the list of members.
    time.sleep(1)
    job.signal("worker-2", signal.SIGCONT)
    job.await_value("shard-0", "arc_returned_workers_total", 1)
    job.await_value("worker-3", 'arc_steps_total{outcome="applied"}', 5)
    # A shard that dies.
    job.signal("shard-1", signal.SIGKILL)
    job.processes["shard-1"].wait()
    time.sleep(2)
    job.shard(1)
    job.await_value("shard-1", "arc_recoveries_total", 1)
    job.await_steps("worker-0", 20)


@pytest.fixture(scope="module")
def live(arc_bin: Path, prometheus_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    start = time.time()
    with watched(arc_bin, prometheus_bin, tmp_path_factory.mktemp("live")) as (job, prometheus):
        disturb(job)
        time.sleep(2)
        yield Watched(prometheus, start, time.time())


def test_every_panel_has_data(live: Watched) -> None:
    filled = {str(query): filled_in(query.expr, VARIABLES) for query in queries()}
    empty = {name for name, expr in filled.items() if not live.prometheus.over_time(expr, live.start, live.end)}
    assert empty == set(MAY_BE_EMPTY), "show something, or say in MAY_BE_EMPTY why not"


def test_queries_for_another_job_have_none(live: Watched) -> None:
    """So that data means something."""
    other = VARIABLES | {"job": "another"}
    for query in queries():
        assert not live.prometheus.over_time(filled_in(query.expr, other), live.start, live.end), query


def test_every_rule_has_data(live: Watched) -> None:
    known = {rule["name"]: rule for group in live.prometheus.ask("rules")["groups"] for rule in group["rules"]}
    assert set(known) == {rule.get("record") or rule["alert"] for rule in rules()}
    assert {name for name, rule in known.items() if rule["health"] != "ok"} == set()
    for rule in rules():
        if "record" in rule:
            assert live.prometheus.over_time(f'{rule["record"]}{{job="{NAME}"}}', live.start, live.end), rule["record"]


def test_all_say_when_their_certificates_end(live: Watched) -> None:
    ends = f'arc_certificate_expiry_timestamp_seconds{{job="{NAME}"}} > time()'
    silent = f'arc_build_info{{job="{NAME}"}} unless on (instance) ({ends})'
    assert live.prometheus.over_time(ends, live.end - 1, live.end)
    assert not live.prometheus.over_time(silent, live.end - 1, live.end)


def test_alerts_see_the_shard_that_died(live: Watched) -> None:
    down = live.prometheus.over_time(f'ALERTS{{alertname="ArcShardDown",job="{NAME}"}}', live.start, live.end)
    assert down
    firing = live.prometheus.over_time(f'ALERTS{{alertstate="firing",job="{NAME}"}}', live.start, live.end)
    assert not firing, "it was down for seconds"


def test_every_metric_of_the_sources_is_served_and_no_other(live: Watched) -> None:
    served = {name for name in live.prometheus.ask("label/__name__/values") if re.match("arc_", name)}
    defined = {name: series_of(name, histogram) for name, histogram in defined_metrics().items()}
    assert served <= set().union(*defined.values())
    assert {name for name, series in defined.items() if not series & served} == set(MAY_BE_SILENT)
