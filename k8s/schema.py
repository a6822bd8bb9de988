#!/usr/bin/env python3
"""Makes `arc-topk/values.schema.json`, with which Helm refuses values that the chart does not know, at every level.

    python3 k8s/schema.py            writes it
    python3 k8s/schema.py --check    exit status 1 if it is not what would be written

Keys and simple types come from `values.yaml`, the rest from `schema.yaml`. Kubernetes' own types come with all that they hold from
the schemas in the package kubernetes-validate, and the names of the programs' settings from the sources that read them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from kubernetes_validate.utils import latest_version, schema_contents

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "common" / "src" / "config"
VALUES, RULES, SCHEMA = HERE / "arc-topk" / "values.yaml", HERE / "schema.yaml", HERE / "arc-topk" / "values.schema.json"

#: Settings that the chart itself gives to each worker.
GIVEN = {"shard_addresses", "rank", "workers", "admin"}
#: What a setting's value may be: the program judges the rest, and names the setting.
SETTING = {"type": ["string", "number", "boolean", "null"]}


def settings(group: str) -> list[str]:
    """Names of the settings in a group, as the programs' sources have them."""
    sources = {"algorithm": ("algorithm.rs", ""), "trainer": ("train.rs", ""), "connection": ("process.rs", "pub struct PeerArgs")}
    file, start = sources[group]
    text = (CONFIG / file).read_text()
    text = text[text.index(start) :]
    if start:
        text = text[: text.index("\n}\n")]
    names = {name.lower() for name in re.findall(r'env = "ARC_(\w+)"', text)}
    return sorted(names - GIVEN)


@cache
def kubernetes() -> dict[str, Any]:
    """Kubernetes' types of the newest version, by their full names."""
    version = latest_version()
    defs: dict[str, Any] = schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)["$defs"]
    return defs


class Schema:
    """The schema while it is made."""

    def __init__(self, rules: dict[str, Any]) -> None:
        self.rules = {path: rule for path, rule in rules.items() if not path.startswith("_")}
        self.unused = set(self.rules)
        self.definitions: dict[str, Any] = {}

    def of(self, path: str, default: object) -> dict[str, Any]:
        """Schema of the value at `path`."""
        if path in self.rules:
            self.unused.discard(path)
            own: dict[str, Any] = self.resolved(self.rules[path])
            return own
        if isinstance(default, dict) and default:
            inner = {key: self.of(f"{path}.{key}" if path else key, value) for key, value in default.items()}
            return {"type": "object", "additionalProperties": False, "properties": inner}
        if isinstance(default, bool):
            return {"type": "boolean"}
        if isinstance(default, int):
            return {"type": "integer", "minimum": 0}
        if isinstance(default, str):
            return {"type": "string"}
        raise SystemExit(f"schema.yaml must say what {path} is: its default is {default!r}")

    def resolved(self, rule: Any) -> Any:
        """A rule with our words replaced by JSON Schema."""
        if isinstance(rule, list):
            return [self.resolved(item) for item in rule]
        if not isinstance(rule, dict):
            return rule
        if "settings" in rule:
            names = settings(rule["settings"])
            return {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(names, SETTING)}
        if "k8s" in rule:
            name = rule["k8s"]
            if isinstance(name, list):
                return {"type": "array", "items": self.reference(name[0])}
            return self.reference(name)
        return {key: self.resolved(value) for key, value in rule.items()}

    def reference(self, name: str) -> dict[str, str]:
        """A reference to one of Kubernetes' types, which is taken in with all that it refers to."""
        name = name if name.startswith("io.k8s.") else f"io.k8s.api.{name}"
        if name not in self.definitions:
            self.definitions[name] = {}
            self.definitions[name] = self.taken(kubernetes()[name])
        return {"$ref": f"#/definitions/{name}"}

    def taken(self, node: Any) -> Any:
        """A part of Kubernetes' schema without its prose."""
        if isinstance(node, list):
            return [self.taken(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return self.reference(node["$ref"].rsplit("/", 1)[1])
        kept = {key: value for key, value in node.items() if key not in ("description", "default") and not key.startswith("x-")}
        if isinstance(properties := kept.get("properties"), dict):
            kept["properties"] = {name: self.taken(value) for name, value in properties.items()}
        return {key: value if key == "properties" else self.taken(value) for key, value in kept.items()}


def made() -> str:
    """The file's content."""
    values = yaml.safe_load(VALUES.read_text())
    schema = Schema(yaml.safe_load(RULES.read_text()))
    whole = schema.of("", values)
    # Helm puts the values of parent charts in, and those that are meant for all charts.
    whole["properties"]["global"] = {"type": "object"}
    schema.definitions["pool"] = whole["properties"]["workerDefaults"]
    whole["properties"]["workerDefaults"] = {"$ref": "#/definitions/pool"}
    if schema.unused:
        raise SystemExit(f"schema.yaml: values.yaml has no {', '.join(sorted(schema.unused))}")
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart arc-topk"} | whole
    whole["definitions"] = dict(sorted(schema.definitions.items()))
    return json.dumps(whole, indent=1) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look")
    text = made()
    if not parser.parse_args().check:
        SCHEMA.write_text(text)
    elif not SCHEMA.is_file() or SCHEMA.read_text() != text:
        print(f"{SCHEMA.relative_to(HERE.parent)} is out of date, run k8s/schema.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
