"""What is made of something else is up to date."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

import readme
import schema
import sync
from chart import CHART


def test_dashboards_and_rules_are_those_of_the_repository() -> None:
    assert sync.differences() == [], "run k8s/sync.py"


def test_copying_brings_changes_and_removes_what_is_gone(tmp_path: Path) -> None:
    source, copies = tmp_path / "source", tmp_path / "copies"
    for path, content in sync.wanted().items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content)
    shutil.copytree(source, copies)
    (copies / "grafana" / "old.json").write_text("{}")
    (source / "prometheus" / "rules.yaml").write_text("groups: []")
    assert [str(path) for path in sync.differences(source, copies)] == ["grafana/old.json", "prometheus/rules.yaml"]
    sync.copy(source, copies)
    assert sync.differences(source, copies) == []


def test_the_readme_has_all_values() -> None:
    assert readme.README.read_text() == readme.made(), "run k8s/readme.py"


def test_a_value_without_a_comment_is_noticed() -> None:
    text = "a:\n  # -- yes\n  b: 1\n  c: 2\n"
    with pytest.raises(SystemExit, match=r"a\.c has no comment"):
        list(readme.rows(yaml.compose(text), text.splitlines()))


def test_the_schema_is_that_of_the_values_and_the_programs_settings() -> None:
    assert schema.SCHEMA.read_text() == schema.made(), "run k8s/schema.py"


def test_settings_are_read_from_the_sources() -> None:
    assert {"density", "wire_up", "bucket_bytes"} <= set(schema.settings("algorithm"))
    assert {"steps", "snapshot_every", "resume", "data"} <= set(schema.settings("trainer"))
    assert schema.settings("connection") == [
        "connect_timeout_seconds",
        "progress_timeout_seconds",
        "reconnect_timeout_seconds",
        "server_name",
    ]


def test_the_chart_has_the_workspaces_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    workspace = tomllib.loads((CHART.parents[1] / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert chart["version"] == chart["appVersion"] == workspace
