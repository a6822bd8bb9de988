"""The chart, rendered by Helm 3 or 4."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools import HELM3, HELM4, fetch

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parents[1]
CHART = TESTS.parent / "arc-topk"
VALUES = {path.stem: path for path in sorted([*CHART.glob("examples/*.yaml"), *TESTS.glob("values/*.yaml")])}
HELMS = {"helm3": HELM3, "helm4": HELM4}
#: Lowest and highest Kubernetes that the chart is for, and what the lowest calls itself in Chart.yaml.
LOWEST, HIGHEST = "1.28", "1.37"

Object = dict[str, Any]


class Loader(yaml.CSafeLoader):  # type: ignore[misc]
    """YAML in which a key that stands twice in a map is an error, as for the API server's strict decoding."""


def _once(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{twice} stand twice", node.start_mark)
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


Loader.add_constructor("tag:yaml.org,2002:map", _once)


def helm(which: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Helm; the caller looks at the status."""
    # No plugins, repositories or clusters of whoever runs the tests.
    home = fetch(HELMS[which]).parent / "home"
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "HELM_CACHE_HOME": str(home / "cache")}
    return subprocess.run(
        [str(fetch(HELMS[which])), *arguments], capture_output=True, text=True, env=environment, check=False, timeout=600
    )


def refused(*sets: str, values: str | None = None, which: str = "helm3") -> str:
    """What Helm says when it refuses to render with these `--set-json` values."""
    done = helm(which, "template", "demo", str(CHART), *_value_flags(values, sets))
    assert done.returncode != 0, f"{sets} were not refused"
    return done.stderr


def _value_flags(values: str | None, sets: tuple[str, ...]) -> list[str]:
    flags = [] if values is None else ["--values", str(VALUES[values])]
    return flags + [word for each in sets for word in ("--set-json", each)]


@cache
def rendered(values: str | None = None, *sets: str, which: str = "helm3", kube: str = HIGHEST, release: str = "demo") -> str:
    """What Helm makes of the chart."""
    where = ["--namespace", "train", "--kube-version", f"{kube}.0"]
    done = helm(which, "template", release, str(CHART), *where, *_value_flags(values, sets))
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _parsed(text: str) -> tuple[Object, ...]:
    return tuple(document for document in yaml.load_all(text, Loader) if document)


def objects(
    values: str | None = None, *sets: str, which: str = "helm3", kube: str = HIGHEST, release: str = "demo"
) -> list[Object]:
    """The same as objects. They are shared: change none."""
    return list(_parsed(rendered(values, *sets, which=which, kube=kube, release=release)))


def of_kind(found: list[Object], kind: str) -> list[Object]:
    """Those of a kind."""
    return [each for each in found if each["kind"] == kind]


def one(found: list[Object], kind: str, name: str | None = None) -> Object:
    """The only one of a kind, or of a kind and name."""
    (only,) = (each for each in of_kind(found, kind) if name is None or each["metadata"]["name"] == name)
    return only


def pods(found: list[Object]) -> list[tuple[str, Object, Object]]:
    """Everything that becomes a pod: a name to tell it by, its metadata, its spec."""
    made = []
    for each in found:
        label = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            made.append((label, each["metadata"], each["spec"]))
        elif "template" in each.get("spec", {}):
            template = each["spec"]["template"]
            made.append((label, template["metadata"], template["spec"]))
    return made


def containers(spec: Object) -> list[Object]:
    """All containers of a pod."""
    found: list[Object] = spec.get("initContainers", []) + spec["containers"]
    return found


def environment(container: Object) -> dict[str, str]:
    """Its variables that have a plain value."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}
