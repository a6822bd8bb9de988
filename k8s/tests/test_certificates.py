"""Certificates: made once, kept over upgrades, made anew when they must be, and such as the programs take."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chart import CHART, HELMS, REPOSITORY, VALUES, Object, environment, objects, of_kind, one
from cluster import Cluster, text

DAY = 86400
SHARD, WORKER, AUTHORITY = "demo-arc-topk-shard-certs", "demo-arc-topk-worker-certs", "demo-arc-topk-authority"
BIN = Path(os.environ.get("ARC_BIN", REPOSITORY / "target" / "debug"))


def secrets(found: list[Object]) -> dict[str, Object]:
    """Secrets by name."""
    return {each["metadata"]["name"]: each for each in of_kind(found, "Secret")}


def data(found: list[Object]) -> dict[str, dict[str, str]]:
    """Their contents."""
    return {name: each["data"] for name, each in secrets(found).items()}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """An empty cluster."""
    with Cluster() as made:
        yield made


@pytest.mark.parametrize("which", HELMS)
def test_they_are_kept_over_upgrades(cluster: Cluster, which: str) -> None:
    first = cluster.upgrade(which=which)
    assert data(cluster.upgrade("--set", "shards.replicas=5", which=which)) == data(first)
    assert {AUTHORITY, SHARD, WORKER} == data(first).keys()
    # Without a look into the cluster, others are made: what README warns of.
    assert data(objects(which=which))[SHARD] != data(first)[SHARD]


def test_another_name_makes_another_certificate_for_shards_alone(cluster: Cluster) -> None:
    first = data(cluster.upgrade())
    second = data(cluster.upgrade("--set", "certificates.extraHosts={ps.example.org,192.0.2.1}"))
    assert second[SHARD]["tls.crt"] != first[SHARD]["tls.crt"]
    assert second[WORKER] == first[WORKER] and second[AUTHORITY] == first[AUTHORITY]


def test_another_generation_makes_both_anew_of_the_same_authority(cluster: Cluster) -> None:
    first = data(cluster.upgrade())
    second = data(cluster.upgrade("--set", "certificates.chart.generation=2"))
    assert second[AUTHORITY] == first[AUTHORITY]
    for name in (SHARD, WORKER):
        assert second[name]["tls.key"] != first[name]["tls.key"] and second[name]["ca.crt"] == first[name]["ca.crt"]
    assert data(cluster.upgrade("--set", "certificates.chart.generation=2")) == second


@pytest.mark.parametrize(("days", "kept"), [(121, True), (119, False), (-1, False)])
def test_those_near_their_end_are_made_anew(cluster: Cluster, days: int, kept: bool) -> None:
    found = cluster.upgrade()
    for each in of_kind(found, "Secret"):
        if "arc-topk/not-after" in each["metadata"]["annotations"]:
            each["metadata"]["annotations"]["arc-topk/not-after"] = str(int(time.time()) + days * DAY)
    cluster.apply(found)
    before = data(found)
    after = cluster.upgrade()
    assert (data(after)[SHARD] == before[SHARD]) == kept and (data(after)[WORKER] == before[WORKER]) == kept
    assert data(after)[AUTHORITY] == before[AUTHORITY]
    ends = int(secrets(after)[SHARD]["metadata"]["annotations"]["arc-topk/not-after"])
    assert kept or abs(ends - time.time() - 365 * DAY) < 600


def rotation(stage: str) -> list[str]:
    """Flags of an upgrade."""
    return ["--set", f"certificates.chart.authorityRotation={stage}"]


def trusted(found: list[Object], name: str) -> list[str]:
    """Certificates that a role trusts."""
    return re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", text(secrets(found)[name], "ca.crt"), re.S)


def signed_by(found: list[Object], name: str, authority: str) -> bool:
    """Whether OpenSSL says that a role's certificate is of an authority (PEM)."""
    Path("ca.pem").write_text(authority)
    Path("cert.pem").write_text(text(secrets(found)[name], "tls.crt"))
    done = subprocess.run(["openssl", "verify", "-CAfile", "ca.pem", "cert.pem"], capture_output=True, check=False)
    return done.returncode == 0


def test_the_authority_is_replaced_in_three_upgrades(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = cluster.upgrade()
    (old,) = trusted(first, SHARD)
    prepared = cluster.upgrade(*rotation("prepare"))
    assert trusted(prepared, SHARD)[0] == old and len(set(trusted(prepared, WORKER))) == 2
    (new,) = set(trusted(prepared, SHARD)) - {old}
    # Nobody shows a new certificate before everybody trusts its authority.
    assert data(prepared)[SHARD]["tls.crt"] == data(first)[SHARD]["tls.crt"]
    assert data(cluster.upgrade(*rotation("prepare"))) == data(prepared)
    assert data(cluster.upgrade()) == data(prepared), "an upgrade in between changes nothing"
    switched = cluster.upgrade(*rotation("switch"))
    for name in (SHARD, WORKER):
        assert set(trusted(switched, name)) == {old, new}
        assert signed_by(switched, name, new) and not signed_by(switched, name, old)
    assert data(cluster.upgrade()) == data(switched)
    finished = cluster.upgrade(*rotation("finish"))
    for name in (SHARD, WORKER):
        assert trusted(finished, name) == [new] and data(finished)[name]["tls.crt"] == data(switched)[name]["tls.crt"]
    assert set(data(finished)[AUTHORITY]) == {"ca.crt", "ca.key"}
    assert data(cluster.upgrade(*rotation("finish"))) == data(cluster.upgrade()) == data(finished)


@pytest.mark.parametrize(
    ("stages", "says"), [(["switch"], "upgrade with prepare first"), (["prepare", "finish"], "upgrade with switch first")]
)
def test_no_stage_can_be_left_out(cluster: Cluster, stages: list[str], says: str) -> None:
    cluster.upgrade()
    for stage in stages[:-1]:
        cluster.upgrade(*rotation(stage))
    done = cluster.helm("helm3", "template", "demo", str(CHART), "--dry-run=server", *rotation(stages[-1]))
    assert done.returncode != 0 and says in done.stderr


def test_cert_manager_is_taken_where_it_is_and_never_over_what_was_made() -> None:
    with Cluster(cert_manager=True) as both:
        assert of_kind(both.upgrade(), "Certificate") and not of_kind(both.upgrade(), "Secret")
    with Cluster() as plain:
        found = plain.upgrade()
    with Cluster(cert_manager=True) as later:
        later.apply(found)
        assert data(later.upgrade()) == data(found)


def test_roles_of_cert_manager_are_those_that_the_programs_ask_for() -> None:
    found = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects("two-pools-spot"), "Certificate")}
    shard, worker = found["demo-arc-topk-shard"], found["demo-arc-topk-worker"]
    assert shard["usages"] == ["digital signature", "server auth"] and worker["usages"] == ["digital signature", "client auth"]
    # One that names no host can serve nobody.
    assert "dnsNames" not in worker and "*.demo-arc-topk-shards.train.svc" in shard["dnsNames"]


def test_hosts_outside_are_in_the_charts_own_certificate() -> None:
    pem = text(secrets(objects("wan-shards"))[SHARD], "tls.crt")
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName"], input=pem, capture_output=True, text=True, check=True
    )
    names = set(re.findall(r"DNS:([^,\s]+)", shown.stdout))
    assert names == {"localhost", "*.demo-arc-topk-shards.train.svc", "ps0.train.example.org", "ps1.train.example.org"}


def test_hosts_outside_are_in_the_certificate() -> None:
    names = [each["spec"] for each in of_kind(objects("everything"), "Certificate") if "dnsNames" in each["spec"]]
    assert {"ps0.example.org", "shards.example.org"} <= set(names[0]["dnsNames"])
    assert "198.51.100.7" in names[0]["ipAddresses"] and all(ipaddress.ip_address(ip) for ip in names[0]["ipAddresses"])


# With the programs themselves, where they are built.

is_built = (BIN / "arc-ps").is_file() and (BIN / "arc-worker").is_file()
built = pytest.mark.skipif(not is_built, reason="arc-ps or arc-worker is not built")


def write(found: list[Object], folder: Path) -> None:
    """Puts certificates where a volume would."""
    for role, name in (("shard", SHARD), ("worker", WORKER)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        for key, file in (("ca.crt", "ca.pem"), ("tls.crt", "cert.pem"), ("tls.key", "key.pem")):
            (folder / role / file).write_text(text(secrets(found)[name], key))


def free_port(kind: socket.SocketKind) -> int:
    """A port that nobody has now."""
    with socket.socket(socket.AF_INET, kind) as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
        assert isinstance(port, int)
        return port


@contextmanager
def shard(settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A shard with these variables, once it says that it is ready."""
    process = subprocess.Popen(
        [BIN / "arc-ps", "--ready-json"], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line and json.loads(line)["ready"], process.stderr.read()
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=600)


@built
def test_the_programs_take_what_the_chart_makes(tmp_path: Path) -> None:
    """A shard and a worker with the very variables and certificates of a rendering train together."""
    found = objects("laptop", 'shards={"replicas": 1, "startGraceSeconds": 0}', 'workerPools={"cpu": {"replicas": 1}}')
    write(found, tmp_path)
    quic, admin = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_STREAM)
    for_shard = environment(one(found, "StatefulSet")["spec"]["template"]["spec"]["containers"][0])
    for_shard |= {
        "ARC_LISTEN": f"127.0.0.1:{quic}",
        "ARC_ADMIN": f"127.0.0.1:{admin}",
        "ARC_CERTS": str(tmp_path / "shard"),
        "ARC_SHARD": "0",
    }
    job = one(found, "Job")["spec"]["template"]["spec"]["containers"][0]
    for_worker = environment(job)
    dialled = for_worker["ARC_SHARD_ADDRESSES"].rpartition(":")[0]
    for_worker |= {"ARC_SHARD_ADDRESSES": f"127.0.0.1:{quic}", "ARC_SERVER_NAME": dialled, "ARC_CERTS": str(tmp_path / "worker")}
    for_worker |= {"ARC_ADMIN": "off", "ARC_STEPS": "2", "ARC_VALIDATE_BATCHES": "1", "ARC_BATCH": "1"}
    with shard(for_shard):
        for path in ("healthz", "readyz"):
            assert urllib.request.urlopen(f"http://127.0.0.1:{admin}/{path}", timeout=60).status == 200
        worker = subprocess.run(
            [BIN / "arc-worker", *job["args"]], env=for_worker, capture_output=True, text=True, timeout=600, check=False
        )
        assert worker.returncode == 0, worker.stderr
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=60).read().decode()
        assert re.search(r'^arc_build_info\{component="shard"', metrics, re.M)


@built
def test_a_workers_certificate_serves_nobody(tmp_path: Path) -> None:
    """What sprig makes may serve by its usage; that it names no host keeps a worker from posing as a shard."""
    found = objects("laptop", 'workerPools={"cpu": {"replicas": 1}}')
    write(found, tmp_path)
    quic = free_port(socket.SOCK_DGRAM)
    settings = {"ARC_LISTEN": f"127.0.0.1:{quic}", "ARC_ADMIN": "off", "ARC_WORKERS": "1", "ARC_CERTS": str(tmp_path / "worker")}
    with shard(settings):
        dial = {
            "ARC_SHARD_ADDRESSES": f"127.0.0.1:{quic}",
            "ARC_CERTS": str(tmp_path / "worker"),
            "ARC_CONNECT_TIMEOUT_SECONDS": "1",
        }
        worker = subprocess.run([BIN / "arc-worker", "train"], env=dial, capture_output=True, text=True, timeout=600, check=False)
    assert worker.returncode == 1 and "name" in worker.stderr, worker.stderr


@built
def test_the_settings_of_every_rendering_are_settings(tmp_path: Path) -> None:
    """Whatever values are given: the shards' variables are accepted, up to the missing certificates."""
    for values in VALUES:
        for each in of_kind(objects(values), "StatefulSet"):
            container = each["spec"]["template"]["spec"]["containers"][0]
            if container["name"] != "shard":
                continue
            settings = environment(container) | {"ARC_SHARD": "0", "ARC_CERTS": str(tmp_path)}
            done = subprocess.run([BIN / "arc-ps"], env=settings, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 1 and "ca.pem" in done.stderr, f"{values}: {done.stderr}"
