#!/usr/bin/env python3
"""Writes what a package of the workspace is made of, as a CycloneDX bill of materials, to standard output.

    python3 k8s/images/sbom.py arc-topk-ps > arc-ps.cdx.json

Cargo says which crates it is compiled from on this platform, macros included, with Cargo.lock's versions and checksums. The same
sources give the same bytes: it holds no time and no number of its own making.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def cargo_metadata() -> dict[str, Any]:
    """What Cargo knows of the workspace, for the platform that it builds for."""
    told = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    host = next(line.removeprefix("host: ") for line in told.splitlines() if line.startswith("host: "))
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", host]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout)
    return found


def linked(metadata: dict[str, Any], root: str) -> dict[str, list[str]]:
    """Packages that are compiled into `root`, itself included, by their id, each with those that it needs: neither what tests
    need nor what builds it."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    needs: dict[str, list[str]] = {}
    todo = [root]
    while todo:
        each = todo.pop()
        if each not in needs:
            own = [dep["pkg"] for dep in nodes[each]["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]
            needs[each] = sorted(own)
            todo += own
    return needs


def component(package: dict[str, Any], checksums: dict[tuple[str, str], str], kind: str = "library") -> dict[str, Any]:
    """A package in CycloneDX's words."""
    name, version = package["name"], package["version"]
    made: dict[str, Any] = {"type": kind, "bom-ref": f"{name}@{version}", "name": name, "version": version}
    if checksum := checksums.get((name, version)):
        made |= {"purl": f"pkg:cargo/{name}@{version}", "hashes": [{"alg": "SHA-256", "content": checksum}]}
    if licence := package["license"]:
        made["licenses"] = [{"expression": licence.replace("/", " OR ")}]
    return made


def bill(metadata: dict[str, Any], name: str, lock: dict[str, Any]) -> dict[str, Any]:
    """The whole bill."""
    packages = {package["id"]: package for package in metadata["packages"]}
    (root,) = (package["id"] for package in packages.values() if package["name"] == name and package["source"] is None)
    checksums = {(each["name"], each["version"]): each["checksum"] for each in lock["package"] if "checksum" in each}
    needs = linked(metadata, root)
    made = {each: component(packages[each], checksums) for each in needs if each != root}
    whole = component(packages[root], checksums, "application")
    references = {each: inner["bom-ref"] for each, inner in made.items()} | {root: whole["bom-ref"]}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": whole},
        "components": sorted(made.values(), key=lambda each: str(each["bom-ref"])),
        "dependencies": sorted(
            ({"ref": references[each], "dependsOn": sorted(references[need] for need in own)} for each, own in needs.items()),
            key=lambda each: str(each["ref"]),
        ),
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="a package of this workspace")
    name = parser.parse_args().package
    lock = tomllib.loads((REPOSITORY / "Cargo.lock").read_text())
    print(json.dumps(bill(cargo_metadata(), name, lock), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
