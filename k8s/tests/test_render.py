"""Rendering: both Helms agree, golden files tell what changed, and Kubernetes' own schemas have no complaint."""

from __future__ import annotations

import copy
import json
import tarfile
from functools import lru_cache
from pathlib import Path

import kubernetes_validate.utils as validation
import pytest
import yaml

from chart import CHART, HELMS, HIGHEST, LOWEST, TESTS, VALUES, Object, helm, objects, one
from foreign import FOREIGN

# Each object would read a megabyte of definitions.
validation.schema_contents = lru_cache(maxsize=None)(validation.schema_contents)


@pytest.mark.parametrize("which", HELMS)
@pytest.mark.parametrize("values", VALUES)
def test_helm_lint_has_no_complaint(which: str, values: str) -> None:
    done = helm(which, "lint", "--strict", "--values", str(VALUES[values]), str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def normal(found: list[Object]) -> list[Object]:
    """Without what is random (keys) or somebody else's (dashboards, rules), in a fixed order."""
    kept = copy.deepcopy(found)
    for each in kept:
        if each["kind"] == "Secret":
            each["data"] = dict.fromkeys(each["data"], "<made>")
            notes = each["metadata"]["annotations"]
            notes.update({note: "<made>" for note in ("arc-topk/not-after", "arc-topk/signer") if note in notes})
        if each["metadata"]["labels"].get("app.kubernetes.io/component") == "monitoring":
            if each["kind"] == "ConfigMap":
                each["data"] = dict.fromkeys(each["data"], "<dashboards/grafana>")
            else:
                each["spec"]["groups"] = [group["name"] for group in each["spec"]["groups"]]
    return sorted(kept, key=lambda each: (each["kind"], each["metadata"]["name"]))


@pytest.mark.parametrize("values", VALUES)
def test_what_is_rendered_is_what_was_agreed(values: str, update: bool) -> None:
    golden = TESTS / "golden" / f"{values}.yaml"
    extra = [each for each in objects(values) if "labels" in each["metadata"]]
    text = yaml.safe_dump_all(normal(extra), sort_keys=True, width=120)
    if update:
        golden.write_text(text)
    assert golden.read_text() == text, "look at the difference, and if it is wanted: pytest --update"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in (TESTS / "golden").iterdir()} == set(VALUES)


@pytest.mark.parametrize("values", VALUES)
def test_both_helms_make_the_same(values: str) -> None:
    labelled = [[each for each in objects(values, which=which) if "labels" in each["metadata"]] for which in HELMS]
    assert normal(labelled[0]) == normal(labelled[1])


@pytest.mark.parametrize("kube", [LOWEST, HIGHEST])
@pytest.mark.parametrize("values", VALUES)
def test_kubernetes_knows_every_field(values: str, kube: str) -> None:
    for each in objects(values, kube=kube):
        if each["apiVersion"].split("/")[0] in FOREIGN:
            FOREIGN[each["apiVersion"].split("/")[0]](each)
        else:
            # An unknown kind is an exception here, not a warning.
            assert validation.validate(each, kube, strict=True) == kube


@pytest.mark.parametrize("spoilt", [{"replica": 1}, {"replicas": "two"}])
def test_the_validation_would_notice(spoilt: Object) -> None:
    wrong = copy.deepcopy(one(objects(), "StatefulSet"))
    wrong["spec"] |= spoilt
    with pytest.raises(validation.ValidationError):
        validation.validate(wrong, HIGHEST, strict=True)


def test_the_supported_versions_are_those_of_the_chart() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={LOWEST}.0-0"
    assert validation.major_minor(validation.latest_version()) == HIGHEST
    assert f"Kubernetes {LOWEST} to {HIGHEST}" in (CHART / "README.md").read_text()


@pytest.mark.parametrize("which", HELMS)
def test_the_package_holds_what_the_chart_needs(which: str, tmp_path: Path) -> None:
    done = helm(which, "package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as archive:
        names = {name.removeprefix("arc-topk/") for name in archive.getnames()}
    assert {"values.schema.json", "README.md", "files/prometheus/rules.yaml", "examples/laptop.yaml"} <= names
    assert len([name for name in names if name.startswith("files/grafana/")]) == len(list(CHART.glob("files/grafana/*.json")))
    # Helm keeps it with every release, in a secret of a megabyte at most.
    assert next(tmp_path.glob("*.tgz")).stat().st_size < 300_000


def test_only_new_kubernetes_gets_a_success_policy() -> None:
    for kube, there in [("1.30", False), ("1.31", True)]:
        job = one(objects("wan-workers", kube=kube), "Job")
        assert ("successPolicy" in job["spec"]) == there


def test_golden_files_hold_no_key() -> None:
    for path in (TESTS / "golden").iterdir():
        text = path.read_text()
        assert "BEGIN" not in text and "LS0tLS1" not in text, path


def test_json_dashboards_survive() -> None:
    for name in ("gpu-pool", "everything"):
        found = [
            each
            for each in objects(name)
            if each["kind"] == "ConfigMap" and "grafana_dashboard" in each["metadata"].get("labels", {})
        ]
        assert found
        for each in found:
            ((file, text),) = each["data"].items()
            assert json.loads(text) == json.loads((CHART / "files" / "grafana" / file).read_text())
