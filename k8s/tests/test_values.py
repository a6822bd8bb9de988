"""Values: misspelt ones are refused at every level, those that cannot be are explained, and what follows from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from chart import CHART, HELMS, VALUES, containers, environment, objects, of_kind, one, pods, refused, rendered
from cluster import Cluster

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def misspelt(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """A path with a wrong key in every map whose keys are known."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from misspelt(value, (*path, key))
    yield (*path, next(iter(node)) + "x")


#: Maps with keys of the user's own.
OPEN = {"metrics.dashboards.labels"}
PATHS = [path for path in misspelt(DEFAULTS) if ".".join(path[:-1]) not in OPEN and path[0] != "workerPools"]


def nested(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A map that holds `value` at `path`."""
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def schema() -> Any:
    """What judges values as Helm does."""
    return jsonschema.Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))


def test_the_defaults_fit(schema: Any) -> None:
    schema.validate(DEFAULTS)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_misspelt_key_is_refused_at_every_level(schema: Any, path: tuple[str, ...]) -> None:
    def complains(values: dict[str, Any]) -> bool:
        errors = [inner for error in schema.iter_errors(values) for inner in (error, *error.context)]
        return any(path[-1] in error.message for error in errors)

    assert complains(nested(path, 1))
    if path[0] == "workerDefaults":
        assert complains(nested(("workerPools", "a", *path[1:]), 1))


WRONG = [
    'shards={"replica": 3}',
    'workerPools={"a": {"replica": 3}}',
    'workerPools={"a": {"gpu": {"cuont": 1}}}',
    'workerPools={"a": {"tolerations": [{"keys": "x"}]}}',
    'workerPools={"a": {"affinity": {"podAffinities": {}}}}',
    'workerPools={"a": {"extraVolumes": [{"name": "x", "persistentVolumeClaim": {"claim": "y"}}]}}',
    'workerPools={"a": {"resources": {"limit": {"cpu": 1}}}}',
    'workerPools={"A_B": {}}',
    'workerPools={"a-name-that-is-long": {}}',
    'workerPools={"a": {"kind": "CronJob"}}',
    'workerPools={"a": {"trainer": {"thread": 1}}}',
    'job={"algorithm": {"densitty": 0.1}}',
    'job={"trainer": {"step": 1}}',
    'job={"trainer": {"shard_addresses": "a:1"}}',
    'shards={"snapshots": {"keep": 17}}',
    'shards={"snapshots": {"persistence": {"size": "10 GB"}}}',
    'shards={"livenessProbe": {"httpget": {}}}',
    'shards={"antiAffinity": "softer"}',
    'shards={"listenAddress": "::"}',
    'certificates={"provider": "vault"}',
    'certificates={"chart": {"authorityRotation": "begin"}}',
    'metrics={"serviceMonitor": {"relabelings": [{"source_labels": []}]}}',
]


@pytest.mark.parametrize("which", HELMS)
def test_helm_refuses_them_all_at_once(which: str) -> None:
    for wrong in WRONG[:: 4 if which == "helm4" else 2]:
        assert "values don't meet the specifications of the schema" in refused(wrong, which=which), wrong


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_values_are_refused(schema: Any, wrong: str) -> None:
    key, _, text = wrong.partition("=")
    assert list(schema.iter_errors({key: json.loads(text)}))


#: What fits the schema and cannot be, and a word of the reason.
IMPOSSIBLE = {
    'shards={"enabled": false}': "shards.remoteAddresses must list",
    'shards={"remoteAddresses": ["a:1"]}': "set shards.enabled to false",
    'shards={"enabled": false, "remoteAddresses": ["a:1"]}': "job.name",
    'shards={"external": {"enabled": true, "hosts": ["a"]}}': "1 entries for 2 shards",
    'workerPools={"a": {"minReplicas": 3}}': "more than the most pods",
    'workerPools={"a": {"autoscaling": {"enabled": true}}}': "StatefulSet or Deployment",
    'workerPools={"a": {"volumeClaimTemplates": [{}]}}': "kind StatefulSet",
    'workerPools={"a": {"torchDistributed": {"enabled": true}}, "b": {}}': "no other pool",
    'workerPools={"a": {"podDisruptionBudget": {"enabled": true, "maxUnavailable": 1}}}': "minAvailable alone",
    'workerPools={"a": {"podDisruptionBudget": {"enabled": true, "minAvailable": "50%"}}}': "as a number",
    'workerPools={"a": {"replicas": 3, "podDisruptionBudget": {"enabled": true, "minAvailable": 3}}}': "no node could",
    'workerPools={"shard": {"kind": "StatefulSet"}}': "objects of the shards",
    'workerPools={"shards": {}}': "objects of the shards",
    'shards={"external": {"enabled": true, "type": "NodePort", "trafficPolicy": "Cluster", "sourceRanges": ["::/0"]}}': "Local",
    'job={"minWorkers": 3}': "more than the 1 workers",
    'job={"quorum": 3}': "more than the most workers",
    'job={"workers": 4, "maxWorkers": 3}': "fewer than the 4 workers",
    'certificates={"chart": {"validityDays": 30}}': "below validityDays",
    'certificates={"provider": "existing"}': "certificates.existing.shardSecret",
}


@pytest.mark.parametrize("sets", IMPOSSIBLE)
def test_what_cannot_be_is_explained(sets: str) -> None:
    assert IMPOSSIBLE[sets] in refused(sets)


def test_workers_elsewhere_need_certificates_from_there() -> None:
    said = refused('shards={"enabled": false, "remoteAddresses": ["a:1"]}', 'job={"name": "a"}')
    assert "certificates.existing.workerSecret" in said


def shard_settings(*sets: str, values: str | None = None) -> dict[str, str]:
    """What shards are told."""
    return environment(
        one(objects(values, *sets), "StatefulSet", "demo-arc-topk-shard")["spec"]["template"]["spec"]["containers"][0]
    )


def test_shards_are_told_how_many_workers_the_pools_have() -> None:
    elastic = '{"minReplicas": 1, "maxReplicas": 5, "workersPerPod": 2}'
    told = shard_settings(f'workerPools={{"a": {{"replicas": 3}}, "b": {elastic}, "c": {{"enabled": false}}}}')
    assert (told["ARC_WORKERS"], told["ARC_MAX_WORKERS"]) == ("5", "13")
    told = shard_settings('workerPools={"a": {"replicas": 3}}', 'job={"workers": 2, "maxWorkers": 9}')
    assert (told["ARC_WORKERS"], told["ARC_MAX_WORKERS"]) == ("2", "9")
    assert (shard_settings()["ARC_WORKERS"], shard_settings()["ARC_MAX_WORKERS"]) == ("1", "1")


def test_a_pool_may_say_no_where_the_defaults_say_yes() -> None:
    defaults = 'workerDefaults={"spot": {"enabled": true, "provider": "gke"}, "replicas": 4}'
    jobs = of_kind(objects(None, defaults, 'workerPools={"a": {"spot": {"enabled": false}}, "b": {}}'), "Job")
    placed = {job["metadata"]["labels"]["arc-topk/pool"]: job["spec"]["template"]["spec"] for job in jobs}
    assert "nodeSelector" not in placed["a"] and placed["b"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert placed["b"]["terminationGracePeriodSeconds"] == 25 and placed["a"]["terminationGracePeriodSeconds"] == 120


def job_name(*sets: str, values: str | None = "laptop") -> str:
    """Name of the pool's Job."""
    name = one(objects(values, *sets), "Job")["metadata"]["name"]
    assert isinstance(name, str)
    return name


def test_a_changed_job_has_another_name_and_an_equal_one_the_same() -> None:
    # Two renderings of their own: certificates differ, names do not.
    assert job_name() == job_name("commonAnnotations={}")
    assert job_name() != job_name('job={"trainer": {"steps": 301}}')
    assert re.fullmatch(r"demo-arc-topk-cpu-[0-9a-f]{8}", job_name())


def test_a_changed_file_starts_its_pool_anew() -> None:
    pools = [json.dumps({"a": {"command": ["python", "a"], "files": {"a": text}}}) for text in ("one", "two")]
    assert job_name(f"workerPools={pools[0]}", values=None) != job_name(f"workerPools={pools[1]}", values=None)


def test_the_longest_names_still_fit() -> None:
    found = objects(None, 'workerPools={"abcdefghijklmnop": {"replicas": 4096}}', release="r" * 53)
    (job,) = of_kind(found, "Job")
    assert len(f"{job['metadata']['name']}-4095") <= 63
    other = objects(None, release="r" * 52 + "s")
    assert one(other, "StatefulSet")["metadata"]["name"] != one(found, "StatefulSet")["metadata"]["name"]
    # A StatefulSet's pods have a label with its name and a hash of ten.
    assert all(len(each["metadata"]["name"]) <= 52 for each in of_kind(found, "StatefulSet"))


def test_workers_dial_shards_by_names_that_exist() -> None:
    found = objects("laptop")
    told = environment(one(found, "Job")["spec"]["template"]["spec"]["containers"][0])
    shards = one(found, "StatefulSet")
    service, namespace = shards["spec"]["serviceName"], shards["metadata"]["namespace"]
    expected = [f"{shards['metadata']['name']}-{i}.{service}.{namespace}.svc:7400" for i in range(shards["spec"]["replicas"])]
    assert told["ARC_SHARD_ADDRESSES"].split(",") == expected


def test_the_two_halves_of_a_wide_job_agree() -> None:
    here, there = (yaml.safe_load(VALUES[name].read_text()) for name in ("wan-shards", "wan-workers"))
    assert here["job"]["name"] == there["job"]["name"]
    assert there["shards"]["remoteAddresses"] == [f"{host}:7400" for host in here["shards"]["external"]["hosts"]]
    (pool,) = there["workerPools"].values()
    assert (here["job"]["workers"], here["job"]["maxWorkers"]) == (pool["minReplicas"], pool["maxReplicas"])
    secret = there["certificates"]["existing"]["workerSecret"]
    assert f'name: "{secret}"' in VALUES["wan-shards"].read_text()
    # Monitoring must take both for one training job.
    jobs = {
        metadata["labels"].get("arc-topk/job") for name in ("wan-shards", "wan-workers") for _, metadata, _ in pods(objects(name))
    }
    assert jobs == {"wan"}


def test_a_process_group_is_told_who_it_is() -> None:
    found = objects("gpu-pool")
    job = one(found, "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    told = environment(container)
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert told["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{subdomain}.train.svc"
    assert told["WORLD_SIZE"] == str(job["spec"]["completions"])
    assert "batch.kubernetes.io/job-completion-index" in str([each for each in container["env"] if each["name"] == "RANK"])


def test_a_script_of_ones_own_gets_no_settings_of_the_trainer() -> None:
    for name, _, spec in pods(objects("two-pools-spot")):
        for container in containers(spec):
            if container["name"] == "worker":
                told = environment(container)
                assert {key for key in told if key.startswith("ARC_")} == {"ARC_CERTS", "ARC_JOB", "ARC_SHARD_ADDRESSES"}, name
                # PyTorch asks for it, and user 65532 has no entry in most images.
                assert told["USER"] == told["LOGNAME"] == "arc"


def test_the_users_name_is_said_once() -> None:
    pools = {"a": {"command": ["python"], "extraEnv": [{"name": "USER", "value": "me"}]}}
    found = one(objects(None, f"workerPools={json.dumps(pools)}"), "Job")["spec"]["template"]["spec"]["containers"][0]["env"]
    said = [(each["name"], each["value"]) for each in found if each["name"] in ("USER", "LOGNAME")]
    assert sorted(said) == [("LOGNAME", "arc"), ("USER", "me")]


def test_a_setting_of_nothing_is_no_setting() -> None:
    found = objects("laptop", 'job={"trainer": {"snapshot_every": null, "steps": 7}}')
    told = environment(one(found, "Job")["spec"]["template"]["spec"]["containers"][0])
    assert "ARC_SNAPSHOT_EVERY" not in told and told["ARC_STEPS"] == "7"


@pytest.mark.parametrize(("release", "name"), [("my.rel", "my-rel-arc-topk"), ("1job", "arc-1job-arc-topk")])
def test_names_of_services_begin_with_a_letter_and_have_no_dots(release: str, name: str) -> None:
    assert one(objects(None, release=release), "StatefulSet")["metadata"]["name"] == f"{name}-shard"


def test_a_job_is_done_early_only_where_that_is_asked_for() -> None:
    pool = {"minReplicas": 2, "maxReplicas": 4}
    plain, early = (
        one(objects(None, f"workerPools={json.dumps({'a': pool | {'job': job}})}"), "Job")["spec"]
        for job in ({}, {"succeedWithMinReplicas": True})
    )
    assert "successPolicy" not in plain and early["successPolicy"] == {"rules": [{"succeededCount": 2}]}


@pytest.mark.parametrize(("pool", "least"), [({"replicas": 4}, 3), ({"replicas": 1}, 0), ({"minReplicas": 2, "maxReplicas": 5}, 2)])
def test_a_pools_budget_lets_nodes_be_drained(pool: dict[str, int], least: int) -> None:
    pools = {"a": pool | {"podDisruptionBudget": {"enabled": True}}}
    budget = one(objects(None, f"workerPools={json.dumps(pools)}"), "PodDisruptionBudget", "demo-arc-topk-a")
    assert budget["spec"]["minAvailable"] == least


def who_dials(*sets: str) -> Any:
    """Whom the shards' policy lets dial them; ``None``: everybody."""
    policy = one(objects(None, *sets), "NetworkPolicy", "demo-arc-topk-shard")
    return policy["spec"]["ingress"][0].get("from")


def test_shards_are_open_to_whom_selectors_and_ranges_cannot_name() -> None:
    assert [list(each) for each in who_dials('workerPools={"a": {}}')] == [["podSelector"]]
    ranges = '"enabled": true, "sourceRanges": ["203.0.113.0/24"]'
    assert who_dials(f'shards={{"external": {{{ranges}}}}}')[1:] == [{"ipBlock": {"cidr": "203.0.113.0/24"}}]
    assert who_dials(f'shards={{"external": {{{ranges}, "trafficPolicy": "Cluster"}}}}') is None
    assert who_dials('shards={"external": {"enabled": true}}') is None
    assert who_dials('workerPools={"a": {"hostNetwork": true}}') is None
    found = objects(None, 'shards={"hostNetwork": true}', 'workerPools={"a": {}}')
    dialled = one(found, "NetworkPolicy", "demo-arc-topk-worker")["spec"]["egress"][1]
    assert dialled == {"ports": [{"port": 7400, "protocol": "UDP"}]}


def test_cert_managers_keys_are_as_they_are_asked_for() -> None:
    found = objects(None, 'certificates={"provider": "certManager", "certManager": {"privateKey": {"rotationPolicy": "Never"}}}')
    keys = [each["spec"]["privateKey"] for each in of_kind(found, "Certificate") if not each["spec"].get("isCA")]
    assert [key["rotationPolicy"] for key in keys] == ["Never", "Never"]


def notes(*sets: str) -> str:
    """What an installation says."""
    with Cluster() as cluster:
        more = [word for each in sets for word in ("--set-json", each)]
        done = cluster.helm("helm3", "install", "demo", str(CHART), "--dry-run=server", *more)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def test_notes_say_where_shards_are_from_outside() -> None:
    hosts = '"enabled": true, "hosts": ["ps0.example.org", "2001:db8::1"]'
    assert "ps0.example.org:7400\n  [2001:db8::1]:7400\n" in notes(f'shards={{"external": {{{hosts}}}}}')
    said = notes(f'shards={{"external": {{{hosts}, "type": "NodePort", "nodePorts": [30740, 30741]}}}}')
    assert "ps0.example.org:30740\n  [2001:db8::1]:30741\n" in said
    assert "ps0.example.org:NODEPORT" in notes(f'shards={{"external": {{{hosts}, "type": "NodePort"}}}}')


@pytest.mark.parametrize("which", HELMS)
def test_notes_hold_no_secret_and_say_what_is_next(which: str) -> None:
    for values in ("laptop", "wan-shards", "wan-workers", "defaults"):
        with Cluster() as cluster:
            done = cluster.helm(which, "install", "demo", str(CHART), "--dry-run=server", "--values", str(VALUES[values]))
        assert done.returncode == 0, done.stderr
        notes = done.stdout.partition("NOTES:")[2]
        assert "BEGIN" not in notes and "LS0t" not in notes and "kubectl" in notes
        assert not re.search(r"\n\n\n", notes), notes


def test_no_value_is_meant_to_hold_a_secret() -> None:
    text = (CHART / "values.yaml").read_text()
    keys = [key for key in re.findall(r"^\s*(\w+):", text, re.M) if re.search("password|token|privatekey$|apikey", key, re.I)]
    assert keys == ["privateKey"]  # Its algorithm and size, for cert-manager.
    assert "PRIVATE KEY" not in rendered("wan-workers")
