"""What fits together inside one rendering: selectors, ports, quantities, references, and how little each pod may do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from chart import VALUES, Object, containers, objects, of_kind, pods

QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?|Ki)?$")
DNS_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
#: What a cluster must bring along; values files name such objects.
OUTSIDE = {
    "Secret": {"arc-wan-worker", "arc-shard", "arc-worker", "hub", "more", "pull"},
    "ConfigMap": {"outside-settings"},
    "PersistentVolumeClaim": {"training-data", "corpus"},
    "ServiceAccount": {"default", "trainer"},
}

pytestmark = pytest.mark.parametrize("values", VALUES)


def matches(selector: Object, labels: Object) -> bool:
    """Whether a selector of labels chooses something with these."""
    return all(labels.get(key) == value for key, value in selector.items())


def plain(selector: Object) -> Object:
    """A selector without the label that a StatefulSet's pods get one by one."""
    return {key: value for key, value in selector.items() if key != "statefulset.kubernetes.io/pod-name"}


def selectors(each: Object) -> Iterator[tuple[str, Object]]:
    """Every selector of pods in an object, with where it stands."""
    spec = each.get("spec", {})
    if each["kind"] == "Service":
        yield "spec.selector", spec["selector"]
    if each["kind"] in ("StatefulSet", "Deployment", "DaemonSet", "PodDisruptionBudget", "PodMonitor"):
        yield "spec.selector", spec["selector"]["matchLabels"]
    if each["kind"] == "NetworkPolicy":
        yield "spec.podSelector", spec["podSelector"]["matchLabels"]
    for constraint in spec.get("template", {}).get("spec", {}).get("topologySpreadConstraints", []):
        yield "topologySpreadConstraints", constraint["labelSelector"]["matchLabels"]


def test_every_selector_chooses_pods(values: str) -> None:
    found = objects(values)
    everybody = [metadata["labels"] for _, metadata, _ in pods(found)]
    for each in found:
        for where, selector in selectors(each):
            assert any(matches(plain(selector), labels) for labels in everybody), (
                f"{each['kind']}/{each['metadata']['name']}: {where} chooses nothing"
            )


def test_controllers_and_services_choose_one_kind_of_pod(values: str) -> None:
    found = objects(values)
    for each in found:
        if each["kind"] in ("StatefulSet", "Deployment", "DaemonSet", "Service", "PodDisruptionBudget"):
            ((_, selector), *_) = selectors(each)
            assert len([name for name, metadata, _ in pods(found) if matches(plain(selector), metadata["labels"])]) == 1


def test_templates_carry_the_labels_of_their_selector_and_no_version(values: str) -> None:
    for each in objects(values):
        if each["kind"] in ("StatefulSet", "Deployment", "DaemonSet"):
            labels = each["spec"]["template"]["metadata"]["labels"]
            assert matches(each["spec"]["selector"]["matchLabels"], labels)
            # They would restart every pod with each release of the chart.
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys()


def test_names_and_labels_are_such(values: str) -> None:
    seen = set()
    for each in objects(values):
        metadata = each["metadata"]
        assert DNS_LABEL.match(metadata["name"])
        key = (each["kind"], metadata.get("namespace"), metadata["name"])
        assert key not in seen
        seen.add(key)
        for value in metadata.get("labels", {}).values():
            assert isinstance(value, str) and LABEL_VALUE.match(value)
        for value in metadata.get("annotations", {}).values():
            assert isinstance(value, str)


def test_ports_that_are_named_are_there(values: str) -> None:
    found = objects(values)
    for name, _, spec in pods(found):
        for container in containers(spec):
            own = {port["name"]: port for port in container.get("ports", [])}
            numbers = [(port["containerPort"], port["protocol"]) for port in own.values()]
            assert len(set(numbers)) == len(numbers)
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                for action in container.get(probe, {}).values():
                    if isinstance(action, dict):
                        assert own[action["port"]]["protocol"] == "TCP", f"{name}: {probe}"
    for service in of_kind(found, "Service"):
        for port in service["spec"].get("ports", []):
            selector = plain(service["spec"]["selector"])
            (target,) = (spec for _, metadata, spec in pods(found) if matches(selector, metadata["labels"]))
            offered = {each["name"]: each for container in target["containers"] for each in container.get("ports", [])}
            assert offered[port["targetPort"]]["protocol"] == port["protocol"]
            if service["spec"].get("clusterIP") == "None":
                # A headless service translates nothing.
                assert offered[port["targetPort"]]["containerPort"] == port["port"]


def test_monitors_find_the_port_that_they_name(values: str) -> None:
    found = objects(values)
    for monitor in of_kind(found, "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        services = [each for each in of_kind(found, "Service") if matches(labels, each["metadata"]["labels"])]
        ports = [port["name"] for each in services for port in each["spec"]["ports"]]
        # Once: a shard that is behind two services must not be scraped twice.
        assert [ports.count(endpoint["port"]) for endpoint in monitor["spec"]["endpoints"]] == [1]
        assert all(monitor["spec"]["jobLabel"] in each["metadata"]["labels"] for each in services)
    for monitor in of_kind(found, "PodMonitor"):
        chosen = [
            (metadata, spec)
            for _, metadata, spec in pods(found)
            if matches(monitor["spec"]["selector"]["matchLabels"], metadata["labels"])
        ]
        assert chosen and all({monitor["spec"]["jobLabel"], "arc-topk/pool"} <= metadata["labels"].keys() for metadata, _ in chosen)


def test_network_policies_open_the_ports_of_their_pods(values: str) -> None:
    found = objects(values)
    for policy in of_kind(found, "NetworkPolicy"):
        chosen = [
            spec for _, metadata, spec in pods(found) if matches(policy["spec"]["podSelector"]["matchLabels"], metadata["labels"])
        ]
        there = {
            (port["containerPort"], port["protocol"])
            for spec in chosen
            for each in spec["containers"]
            for port in each.get("ports", [])
        }
        opened = {(port["port"], port["protocol"]) for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert there == opened


def quantities(node: Any, inside: bool = False) -> Iterator[object]:
    """Every amount of something below `node`."""
    if isinstance(node, list):
        for item in node:
            yield from quantities(item, inside)
    elif isinstance(node, dict):
        for key, value in node.items():
            if inside or key in ("sizeLimit", "averageValue"):
                yield value
            else:
                yield from quantities(value, key in ("limits", "requests"))


def test_quantities_are_such_and_requests_fit_limits(values: str) -> None:
    for each in objects(values):
        for amount in quantities(each):
            assert QUANTITY.match(str(amount)), amount
    for name, _, spec in pods(objects(values)):
        for container in containers(spec):
            resources = container.get("resources", {})
            for what in resources.get("limits", {}).keys() & resources.get("requests", {}).keys():
                assert bytes_of(resources["requests"][what]) <= bytes_of(resources["limits"][what]), name
            for what in resources.get("requests", {}).keys() | resources.get("limits", {}).keys():
                # Devices cannot be shared out, and only limits count.
                assert "/" not in what or isinstance(resources["limits"][what], int)


def bytes_of(amount: object) -> float:
    """A quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)(\D*)", str(amount)).groups()  # type: ignore[union-attr]
    scale: dict[str, float] = {"": 1, "m": 1e-3}
    for power, letter in enumerate("kMGTPE", 1):
        scale |= {letter: 1000**power, f"{letter.upper()}i": 1024**power}
    return float(number) * scale[unit]


def referred(spec: Object) -> Iterator[tuple[str, str]]:
    """Objects that a pod needs: kind and name."""
    yield "ServiceAccount", spec["serviceAccountName"]
    for secret in spec.get("imagePullSecrets", []):
        yield "Secret", secret["name"]
    for volume in spec.get("volumes", []):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in containers(spec):
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                yield "ConfigMap", source["configMapRef"]["name"]
            if "secretRef" in source:
                yield "Secret", source["secretRef"]["name"]
        for variable in container.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def made(found: list[Object]) -> dict[str, set[str]]:
    """Names by kind, with those that others will make of what is here."""
    names: dict[str, set[str]] = {}
    for each in found:
        names.setdefault(each["kind"], set()).add(each["metadata"]["name"])
        if each["kind"] == "Certificate":
            names.setdefault("Secret", set()).add(each["spec"]["secretName"])
    return names


def test_what_pods_refer_to_is_there(values: str) -> None:
    found = objects(values)
    names = made(found)
    for pod, _, spec in pods(found):
        for kind, name in referred(spec):
            assert name in names.get(kind, set()) | OUTSIDE.get(kind, set()), f"{pod}: {kind}/{name}"


def test_the_keys_of_mounted_secrets_are_there(values: str) -> None:
    found = objects(values)
    secrets = {each["metadata"]["name"]: set(each["data"]) for each in of_kind(found, "Secret")}
    secrets |= {each["spec"]["secretName"]: {"ca.crt", "tls.crt", "tls.key"} for each in of_kind(found, "Certificate")}
    for pod, _, spec in pods(found):
        for volume in spec.get("volumes", []):
            if (secret := volume.get("secret", {}).get("secretName")) in secrets:
                assert {item["key"] for item in volume["secret"]["items"]} <= secrets[secret], pod
                assert [item["path"] for item in volume["secret"]["items"]] == ["ca.pem", "cert.pem", "key.pem"]


def test_mounts_have_volumes_and_volumes_mounts(values: str) -> None:
    for each in objects(values):
        spec = each.get("spec", {}).get("template", {}).get("spec")
        if spec is None:
            continue
        claims = {claim["metadata"]["name"] for claim in each["spec"].get("volumeClaimTemplates", [])}
        volumes = [volume["name"] for volume in spec.get("volumes", [])]
        mounts = [mount for container in containers(spec) for mount in container.get("volumeMounts", [])]
        assert len(set(volumes)) == len(volumes)
        assert {mount["name"] for mount in mounts} == set(volumes) | claims, each["metadata"]["name"]
        for container in containers(spec):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            assert len(set(paths)) == len(paths)


def test_names_of_services_are_those_that_are_used(values: str) -> None:
    found = objects(values)
    services = {each["metadata"]["name"]: each for each in of_kind(found, "Service")}
    for each in of_kind(found, "StatefulSet"):
        assert services[each["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
    for name, _, spec in pods(found):
        if "subdomain" in spec:
            assert services[spec["subdomain"]]["spec"]["clusterIP"] == "None", name
    for each in of_kind(found, "HorizontalPodAutoscaler"):
        target = each["spec"]["scaleTargetRef"]
        (scaled,) = (one for one in of_kind(found, target["kind"]) if one["metadata"]["name"] == target["name"])
        assert scaled["apiVersion"] == target["apiVersion"] and "replicas" not in scaled["spec"]


def test_issuers_are_there(values: str) -> None:
    found = objects(values)
    issuers = {each["metadata"]["name"] for each in of_kind(found, "Issuer")}
    for each in of_kind(found, "Certificate"):
        reference = each["spec"]["issuerRef"]
        assert reference["kind"] == "ClusterIssuer" or reference["name"] in issuers
    secrets = {each["spec"]["secretName"] for each in of_kind(found, "Certificate")}
    assert all(each["spec"]["ca"]["secretName"] in secrets for each in of_kind(found, "Issuer") if "ca" in each["spec"])


def test_every_pod_is_restricted(values: str) -> None:
    for name, _, spec in pods(objects(values)):
        if name.endswith("-socket-buffers"):
            continue  # Off by default, and said to need more.
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert not {"hostPID", "hostIPC"} & spec.keys()
        if not name.endswith("-loose"):  # Its values ask for it.
            assert "hostNetwork" not in spec
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0 and pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in spec.get("volumes", []))
        for container in containers(spec):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]} and not own.get("privileged")
            assert not any("hostPort" in port for port in container.get("ports", []))


def test_accounts_have_no_token_and_nobody_has_rights(values: str) -> None:
    found = objects(values)
    assert all(each["automountServiceAccountToken"] is False for each in of_kind(found, "ServiceAccount"))
    assert not {each["kind"] for each in found} & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


def test_no_pod_mounts_the_authority(values: str) -> None:
    for name, _, spec in pods(objects(values)):
        for kind, secret in referred(spec):
            assert not (kind == "Secret" and "authority" in secret), name


def test_numbers_are_not_written_as_floats(values: str) -> None:
    for name, _, spec in pods(objects(values)):
        for container in containers(spec):
            for variable in container.get("env", []):
                assert not re.match(r"^[0-9.]+e\+", variable.get("value", "")), f"{name}: {variable}"


def test_udp_services_have_nothing_in_the_way(values: str) -> None:
    for service in of_kind(objects(values), "Service"):
        assert service["spec"].get("sessionAffinity", "None") == "None"
        for port in service["spec"].get("ports", []):
            assert port["protocol"] == ("TCP" if port["name"] == "admin" else "UDP")
