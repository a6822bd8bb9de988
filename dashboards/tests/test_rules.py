"""Recording rules and alerts, by promtool, and their runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from material import HERE, RULES, rules

ALERTS = [rule for rule in rules() if "alert" in rule]
RUNBOOK = "https://github.com/arc-topk/arc-topk/blob/main/dashboards/RUNBOOK.md#"


def promtool(folder: Path, *arguments: str, cwd: Path = RULES.parent) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / "promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def cases() -> list[tuple[str, bool]]:
    """Alerts that the tests ask for, and whether they are to fire."""
    tests: list[dict[str, Any]] = yaml.safe_load((RULES.parent / "rules_test.yaml").read_text())["tests"]
    return [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]


def test_rules_are_legal(prometheus_bin: Path) -> None:
    said = promtool(prometheus_bin, "check", "rules", RULES.name)
    assert said.returncode == 0, said.stdout + said.stderr
    said = promtool(prometheus_bin, "check", "config", "prometheus.yaml")
    assert said.returncode == 0, said.stdout + said.stderr


def test_alerts_fire_and_do_not_fire(prometheus_bin: Path) -> None:
    said = promtool(prometheus_bin, "test", "rules", "rules_test.yaml")
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize("expr", ["vector(1)", "vector(1) == 0"], ids=["always", "never"])
def test_alerts_that_always_or_never_fire_would_be_seen(expr: str, prometheus_bin: Path, tmp_path: Path) -> None:
    loaded = yaml.safe_load(RULES.read_text())
    for group in loaded["groups"]:
        group["rules"] = [rule | {"expr": expr} if "alert" in rule else rule for rule in group["rules"]]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(loaded))
    (tmp_path / "rules_test.yaml").write_bytes((RULES.parent / "rules_test.yaml").read_bytes())
    said = promtool(prometheus_bin, "test", "rules", "rules_test.yaml", cwd=tmp_path)
    assert said.returncode != 0
    assert set(re.findall(r"alertname: (\w+)", said.stdout + said.stderr)) == {alert["alert"] for alert in ALERTS}


def test_each_alert_is_tested_both_ways() -> None:
    assert set(cases()) == {(alert["alert"], fires) for alert in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["alert"].startswith("Arc")
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    link: str = alert["annotations"]["runbook_url"]
    assert link.startswith(RUNBOOK)
    text = (HERE / "RUNBOOK.md").read_text()
    headings = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^## (.*)$", text, re.M)}
    assert link.removeprefix(RUNBOOK) in headings
    assert f"`{alert['alert']}`" in text


def test_the_runbook_has_no_other_alerts() -> None:
    named = set(re.findall(r"`(Arc[A-Za-z]+)`", (HERE / "RUNBOOK.md").read_text()))
    assert named == {alert["alert"] for alert in ALERTS}
