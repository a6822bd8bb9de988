"""The compose file, the images and what they share with the chart: names, users, files, settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import schema
from chart import CHART, REPOSITORY, Loader, Object

K8S = REPOSITORY / "k8s"
IMAGES = K8S / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))


@pytest.fixture(scope="module")
def compose() -> Object:
    """The compose file."""
    found: Object = yaml.safe_load((K8S / "compose.yaml").read_text())
    return found


def test_what_services_refer_to_is_there(compose: Object) -> None:
    services, volumes = compose["services"], set(compose["volumes"])
    used = set()
    for name, service in services.items():
        assert set(service.get("depends_on", [])) <= set(services), name
        if "build" in service:
            assert (K8S / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for mount in service.get("volumes", []):
            source = mount["source"] if isinstance(mount, dict) else mount.split(":")[0]
            if source.startswith("."):
                assert (K8S / source).exists(), mount
            else:
                used.add(source)
    assert used == volumes
    built = {service["image"] for service in services.values() if "build" in service}
    assert {service["image"] for service in services.values() if service["image"].startswith("arc-topk/")} == built


def test_no_peer_sees_the_authoritys_key(compose: Object) -> None:
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            if "certs" in str(mount) and name != "certs":
                assert mount["volume"]["subpath"] == ("worker" if name == "worker" else "shard") and mount["read_only"]


def test_services_are_confined(compose: Object) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], (
            name
        )
        # Nothing is open to other machines.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert not {"privileged", "network_mode"} & service.keys() or name == "certs"


def test_settings_are_those_of_the_programs(compose: Object) -> None:
    known = {
        name
        for file in ("process.rs", "elastic.rs", "train.rs", "algorithm.rs")
        for name in re.findall(r'env = "(ARC_\w+)"', (schema.CONFIG / file).read_text())
    }
    for name, service in compose["services"].items():
        given = {key for key in service.get("environment", {}) if key.startswith("ARC_")}
        assert given <= known, name
        assert all(isinstance(value, str) for value in service.get("environment", {}).values())


def test_peers_agree(compose: Object) -> None:
    services = compose["services"]
    shards = [name for name in services if name.startswith("shard")]
    worker = services["worker"]["environment"]
    assert worker["ARC_SHARD_ADDRESSES"].split(",") == [f"{name}:7400" for name in shards]
    for index, name in enumerate(shards):
        own = services[name]["environment"]
        assert own["ARC_SHARD"] == str(index) and own["ARC_SHARDS"] == str(len(shards)) and own["ARC_JOB"] == worker["ARC_JOB"]
        assert own["ARC_WORKERS"] == f"${{WORKERS:-{services['worker']['deploy']['replicas']}}}"
        assert f"--host {name}" in services["certs"]["command"][0]


def test_prometheus_asks_every_service(compose: Object) -> None:
    config = yaml.load((K8S / "compose" / "prometheus.yaml").read_text(), Loader)
    shards, workers = config["scrape_configs"]
    names = [name for name in compose["services"] if name.startswith("shard")]
    assert shards["static_configs"] == [{"targets": [f"{name}:9400" for name in names]}]
    assert workers["dns_sd_configs"][0]["names"] == ["worker"]
    jobs = {
        rule["replacement"] for each in (shards, workers) for rule in each["relabel_configs"] if rule.get("target_label") == "job"
    }
    assert jobs == {compose["services"]["worker"]["environment"]["ARC_JOB"]}


def test_images_carry_the_charts_version_and_user(compose: Object) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for service in compose["services"].values():
        if service["image"].startswith("arc-topk/"):
            assert service["image"].endswith(f":{chart['appVersion']}")
    users = {values[which]["podSecurityContext"]["runAsUser"] for which in ("shards", "workerDefaults")}
    assert users == {65532}
    for path in DOCKERFILES:
        text = path.read_text()
        stages = re.split(r"^FROM ", text, flags=re.M)[1:]
        for stage in stages:
            assert "AS build" in stage.splitlines()[0] or "USER 65532:65532" in stage, path.name
        assert f":{chart['appVersion']}" in text
    assert {f"arc-topk/{path.stem}" for path in DOCKERFILES} == set(
        re.findall(r"^\| `.*?` \| `(.*?)`", (IMAGES / "README.md").read_text(), re.M)
    )


def test_images_are_built_from_pinned_tools() -> None:
    toolchain = re.search(r'channel = "(.*)"', (REPOSITORY / "rust-toolchain.toml").read_text())
    torch = re.search(r"^torch==(.*)$", (REPOSITORY / "worker/python/requirements.txt").read_text(), re.M)
    maturin = re.search(r"^maturin==(.*)$", (REPOSITORY / "worker/python/requirements.txt").read_text(), re.M)
    assert toolchain and torch and maturin
    for path in DOCKERFILES:
        text = path.read_text()
        assert (
            f"rust:{toolchain[1]}-" in text and "cargo build --release --locked" in text
        ) or "maturin build --release --locked" in text
        # No base moves under a name such as latest.
        for base in re.findall(r"^ARG \w+=(docker\.io/\S+)", text, re.M):
            assert re.search(r":[a-z0-9.-]*(\d|bookworm-slim)", base) and "latest" not in base
    text = (IMAGES / "arc-worker-torch.Dockerfile").read_text()
    assert f"ARG TORCH={torch[1]}\n" in text and f"ARG MATURIN={maturin[1]}\n" in text


def test_every_dockerfile_ignores_the_same_and_copies_what_is_there() -> None:
    ignored = {path.with_name(f"{path.name}.dockerignore").read_text() for path in DOCKERFILES}
    assert len(ignored) == 1
    allowed = [line[1:] for line in ignored.pop().splitlines() if line.startswith("!")]
    members = re.search(r"^members = \[(.*)\]", (REPOSITORY / "Cargo.toml").read_text(), re.M)
    assert members
    for member in re.findall(r'"(.*?)"', members[1]):
        assert any(member == each or member.startswith(f"{each}/") for each in allowed), member
    assert all((REPOSITORY / each).exists() for each in allowed if each != "target/image")


def test_the_bill_of_materials_is_that_of_the_lock() -> None:
    made = [
        subprocess.run([sys.executable, IMAGES / "sbom.py", "arc-topk-ps"], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert made[0] == made[1]
    bill = json.loads(made[0])
    names = {each["name"]: each for each in bill["components"]}
    assert {"quinn", "tokio", "arc-topk-common"} <= names.keys()
    # Neither what tests need nor the trainer.
    assert not {"proptest", "candle-core", "arc-topk-worker"} & names.keys()
    lock = Path(REPOSITORY / "Cargo.lock").read_text()
    assert all(each["hashes"][0]["content"] in lock for each in names.values() if "hashes" in each)
    assert all("hashes" in each or each["name"].startswith("arc-topk-") for each in names.values())
    references = {each["bom-ref"] for each in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert {each["ref"] for each in bill["dependencies"]} == references
